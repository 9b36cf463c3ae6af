"""A network to hand on, in one safetensors file: weights, what is needed to use them, and what is known of them.

    8 bytes                length of the header, little endian
    header (JSON)          "__metadata__": {"format": "spknet network 1", "config", "sample_rate", "card", "provenance": JSON each,
                           "sha256": of the above and of all tensors}, and for each tensor its type, shape and place
    tensors                of the network, averages taken; no head, no optimizer

https://huggingface.co/docs/safetensors has the format; any program that knows it reads the tensors. `config` holds the options
without paths, so nothing of the maker's machine or of the speakers' names goes along. The file cannot hold code.

    save("a.safetensors", network, config, meta); state = read("a.safetensors")
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from shards.format import atomic_write
from spknet import config as configuration
from spknet.checkpoints import file as checkpoint
from spknet.checkpoints.file import CheckpointError
from spknet.config import Config

FORMAT = "spknet network 1"
LONGEST_HEADER = 100 * 2**20  # safetensors' own limit
# Options that name a place on the maker's machine, by group.
PATHS = {
    "": ["run_dir"],
    "data": ["train_shards", "train_list", "train_root", "cache_dir", "dev_speakers"],
    "augment": ["noise_shards", "rir_shards"],
    "train": ["initial_model", "resume"],
    "eval": ["trials", "dev_trials", "shards", "root", "scores"],
}


def read(path: str | Path) -> Any:
    """The content of a checkpoint of any program, or of a file to hand on in the terms of one of our checkpoints.

    Raises CheckpointError as spknet.checkpoints.file.read does, and UserError where the file cannot be read at all.
    """
    if not is_safetensors(path):
        return checkpoint.read(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            said, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if said.get("format") != FORMAT:
            return tensors
        if said.get("sha256") != _digest(said, tensors):
            raise CheckpointError(f"{path} is damaged: its checksum does not fit; get it anew")
        facts = {name: json.loads(said[name]) for name in ("config", "sample_rate", "card", "provenance")}
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {str(error).splitlines()[0]}") from None
    kept = {name: facts["provenance"].get(name) for name in ("step", "epoch")}
    return {"format": checkpoint.FORMAT, "model": tensors, **kept, **facts}


def is_safetensors(path: str | Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header, and its brace."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER


def save(path: str | Path, network: torch.nn.Module, config: Config, meta: dict[str, Any]) -> None:
    """Writes a network of spknet.checkpoints.network.load_network with its options, rate, card and provenance."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    said = {
        "config": configuration.to_dict(without_paths(config)),
        "sample_rate": network.sample_rate,
        "card": meta.get("card"),
        "provenance": meta.get("provenance") or provenance(meta),
    }
    texts = {"format": FORMAT} | {name: json.dumps(value) for name, value in said.items()}
    texts["sha256"] = _digest(texts, tensors)
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, texts))


def provenance(meta: dict[str, Any]) -> dict[str, Any]:
    """Where a network comes from: file (name, sha256, what it was recognised as), step, epoch, version of spknet."""
    path = Path(meta["path"])
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    said = {name: meta[name] for name in ("recognized", "step", "epoch", "data_fingerprint") if name in meta}
    return {"file": path.name, "sha256": digest.hexdigest(), "spknet": metadata.version("spknet")} | said


def without_paths(config: Config) -> Config:
    """The options without those that name a place on this machine."""
    defaults, groups = Config(), {}
    for group, names in PATHS.items():
        source, plain = (getattr(c, group) if group else c for c in (config, defaults))
        changed = dataclasses.replace(source, **{name: getattr(plain, name) for name in names})
        if group:
            groups[group] = changed
        else:
            config = changed
    return dataclasses.replace(config, **groups)


def _digest(texts: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(texts.keys() - {"sha256"}):
        digest.update(f"{name}={texts[name]}\n".encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
