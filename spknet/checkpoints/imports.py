"""Checkpoints of other projects: whose it is, which network, and every entry in its place.

A file is recognised by what is in it: the names of its entries, their shapes, and where these leave it open the project's own
configuration beside it. Each project has a module with `recognize(state, path)`; here is what they share. The network is built
with the options found; then every entry must have its name and shape, or the file is refused. Heads, front ends' tables and
optimizers are left out, which is said.

    found = wespeaker.recognize(state, Path("avg_model.pt"))  # None: not WeSpeaker's
    network = build(found, "avg_model.pt")                    # in float32, training mode
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from spknet.checkpoints.file import CheckpointError, few
from spknet.config import FeaturesConfig, ModelConfig
from spknet.models import build_model

# Where a folder of another project has its network; the first one that is there.
FILES = ("avg_model.pt", "embedding_model.ckpt", "pretrained.pt")


@dataclasses.dataclass
class Found:
    """What a file was recognised as. weights: the network's entries, under the project's names."""

    what: str  # "WeSpeaker's ResNet34"
    model: ModelConfig
    weights: dict[str, Tensor]
    features: FeaturesConfig = dataclasses.field(default_factory=FeaturesConfig)
    sample_rate: int = 16000  # Hz
    notes: list[str] = dataclasses.field(default_factory=list)


def file_in(folder: Path) -> Path:
    """The checkpoint in a folder that another project left. Raises CheckpointError where there is none."""
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder} holds no checkpoints/step-*.pt, nor {' or '.join(FILES)}; give a run folder or a checkpoint file"
    )


def tensors_of(state: Any, *names: str) -> dict[str, Tensor]:
    """The state dict in a file: its content, or what stands under the first of `names` there is; without `module.`.

    Empty where there is none.
    """
    if not isinstance(state, dict):
        return {}
    inner = next((state[name] for name in names if isinstance(state.get(name), dict)), state)
    if not inner or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in inner.items()):
        return {}
    return {re.sub(r"^(module\.)+", "", key): value for key, value in inner.items()}


def without(weights: dict[str, Tensor], pattern: str, what: str) -> tuple[dict[str, Tensor], list[str]]:
    """(the entries that do not begin so, a note on those that do)."""
    out = [key for key in weights if re.match(pattern, key)]
    notes = [f"{what} left out: {', '.join(f'{k} {tuple(weights[k].shape)}' for k in out[:2])}"] if out else []
    return {key: value for key, value in weights.items() if key not in out}, notes


def beside(path: Path, name: str, above: int = 0) -> dict:
    """The YAML or JSON file of this name beside a checkpoint, or up to so many folders above; {}: there is none.

    Tags as SpeechBrain's (`!new:`) are read as if they were not there: nothing is made, imported or run.
    """
    place = next((f / name for f in path.absolute().parents[: 1 + above] if (f / name).is_file()), None)
    if place is None:
        return {}
    try:
        content = yaml.load(place.read_text(encoding="utf-8"), _Plain)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{place}, which belongs to {path}, cannot be read: {reason}") from None
    return content if isinstance(content, dict) else {}


class _Plain(yaml.SafeLoader):
    """YAML's plain types alone."""


def _untagged(loader: _Plain, _tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else str(node.value)


_Plain.add_multi_constructor("!", _untagged)


def build(found: Found, path: str | Path) -> nn.Module:
    """The network with a file's weights. Raises CheckpointError naming entries that are missing, unknown or do not fit."""
    network = build_model(found.model, found.sample_rate, found.features)
    theirs = {network.our_name(key): key for key in found.weights}
    weights, own = network.from_official(found.weights), network.state_dict()
    problems = [f"{_their_name(key, theirs)} is missing" for key in own if key not in weights and not _counts(key)]
    for key, value in weights.items():
        if key not in own:
            problems.append(f"{theirs[key]} is unknown")
        elif value.shape != own[key].shape:
            problems.append(f"{theirs[key]} has shape {tuple(value.shape)}, not {tuple(own[key].shape)}")
        elif value.is_complex() or (own[key].is_floating_point() and not value.is_floating_point()):
            problems.append(f"{theirs[key]} is {str(value.dtype)[6:]}, not {str(own[key].dtype)[6:]}")
        elif not value.isfinite().all():
            problems.append(f"{theirs[key]} holds values that are not finite")
    if problems:
        raise CheckpointError(
            f"{path} was recognised as {found.what} and does not fit it: {few(problems)}; get the file anew, or the configuration"
            " that belongs to it"
        )
    # Not strictly: BatchNorm's counters may be missing. An average keeps them as floats, which are converted.
    network.load_state_dict(weights, strict=False)
    return network


def _counts(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _their_name(ours: str, theirs: dict[str, str]) -> str:
    """The project's name of an entry that is not in its file, by that of an entry beside it; ours where there is none."""
    part, _, last = ours.rpartition(".")
    near = next((theirs[key] for key in theirs if key.rpartition(".")[0] == part), None)
    return ours if near is None else f"{near.rpartition('.')[0]}.{last}"


def options_of(found: Found) -> str:
    """The command line's options for the same network and features, for messages."""
    words = [f"--model.name {found.model.name}"]
    for group, values, plain in (
        ("model", found.model, ModelConfig(found.model.name)),
        ("features", found.features, FeaturesConfig()),
    ):
        for field in dataclasses.fields(values):
            if getattr(values, field.name) != getattr(plain, field.name):
                words.append(f"--{group}.{field.name} {getattr(values, field.name)}")
    return " ".join(words)
