"""A network to hand on, in one safetensors file: weights, what is needed to use them, and what is known of them.

    8 bytes                length of the header, little endian
    header (JSON)          "__metadata__": {"spknet": JSON {"format": "spknet network 1", "config", "sample_rate", "card",
                           "provenance", "sha256": of all this and the tensors}}; for each tensor its type, shape and place
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

from shards.format import sha256_file, write_file
from spknet import config as configuration
from spknet.checkpoints import file as checkpoint
from spknet.checkpoints.card import weights_digest
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
        if "spknet" not in said:
            return tensors
        facts = json.loads(said["spknet"])
        if facts.pop("sha256") != _digest(facts, tensors):
            raise CheckpointError(f"{path} is damaged: its checksum does not fit; get it anew")
        if facts.pop("format") != FORMAT:
            raise CheckpointError(f"{path} is of another version of spknet; expected {FORMAT!r}")
        kept = {name: facts["provenance"].get(name) for name in ("step", "epoch")}
    except (safetensors.SafetensorError, LookupError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {str(error).splitlines()[0]}") from None
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
    facts = {
        "format": FORMAT,
        "config": configuration.to_dict(without_paths(config)),
        "sample_rate": network.sample_rate,
        "card": meta.get("card"),
        "provenance": meta.get("provenance") or provenance(meta),
    }
    facts["sha256"] = _digest(facts, tensors)
    write_file(path, safetensors.torch.save(tensors, {"spknet": json.dumps(facts)}))


def provenance(meta: dict[str, Any]) -> dict[str, Any]:
    """Where a network comes from: file (name, sha256, what it was recognised as), step, epoch, version of spknet."""
    path = Path(meta["path"])
    said = {name: meta[name] for name in ("kind", "step", "epoch", "data_fingerprint") if name in meta}
    return {"file": path.name, "sha256": sha256_file(path), "spknet": metadata.version("spknet")} | said


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


def _digest(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(f"{json.dumps(facts, sort_keys=True)}\n{weights_digest(tensors)}".encode()).hexdigest()
