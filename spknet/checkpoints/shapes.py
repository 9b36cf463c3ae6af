"""Which network a state dict of another project is of, by the names and shapes of its entries.

    network_of(weights)  # ModelConfig(name="ResNet34", embedding_size=256), or None

A part is looked for by the beginning of its names, so that one entry that is missing does not hide the network: it is found, and
then refused because of that entry. What shapes cannot tell (whose features, which floor of a variance) is left at its default.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from spknet.checkpoints.file import CheckpointError
from spknet.config import ConfigError, ModelConfig
from spknet.models import MODELS, build_model
from spknet.models.redimnet import LAYOUTS
from spknet.models.resnet import Bottleneck, ResNet

SIZES = {n: (kind.block is Bottleneck, kind.blocks[2]) for n, kind in MODELS.items() if issubclass(kind, ResNet)}
DF_SIZES = {9: "DF-ResNet60", 27: "DF-ResNet114", 45: "DF-ResNet183", 63: "DF-ResNet237"}  # blocks of the third stage
SIMAM_SIZES = {6: "SimAM-ResNet34", 24: "SimAM-ResNet100"}


def network_of(weights: dict[str, Tensor]) -> ModelConfig | None:
    """The options of the network; None: none of those that other projects have here.

    Raises CheckpointError for a network of a known kind in a size that is not here.
    """
    for parts, options in KINDS:
        if has(weights, *parts):
            return options(weights)
    return None


def has(weights: dict[str, Tensor], *parts: str) -> bool:
    """Whether there are entries below each of these parts."""
    return all(any(key.startswith(part) for key in weights) for part in parts)


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    """How many parts are numbered, from 0, by the pattern's group."""
    numbers = [int(match[1]) for key in weights if (match := re.match(pattern, key))]
    return max(numbers, default=-1) + 1


def _size(weights: dict[str, Tensor], *keys: str, axis: int = 0) -> int | None:
    """Length of an axis of the first of these entries that is there; None where none is."""
    return next((weights[k].shape[axis] for k in keys if k in weights and weights[k].dim() > axis), None)


def _known(what: str, size: object, names: dict) -> str:
    if size not in names:
        raise CheckpointError(f"it holds a {what} of size {size}; spknet has {', '.join(names.values())}")
    return names[size]


def _residual(weights: dict[str, Tensor]) -> ModelConfig:
    size = _size(weights, "seg_1.bias", "seg_1.weight")
    if has(weights, "fuse34."):
        variant = {2: "w26s2e2", 4: "w24s4e4"}.get(_count(weights, r"layer1\.0\.convs\.(\d+)\."), "w26s2e2")
        return ModelConfig("ERes2NetV2", embedding_size=size, variant=variant)
    if has(weights, "fuse_mode"):
        raise CheckpointError("it holds an ERes2Net of the first version; spknet has the second, ERes2NetV2")
    if has(weights, "layer1.0.convs."):
        return ModelConfig("Res2Net34", embedding_size=size)
    kind = (has(weights, "layer1.0.conv3."), _count(weights, r"layer3\.(\d+)\."))
    name = _known("ResNet (bottlenecks, blocks of the third stage)", kind, {v: k for k, v in SIZES.items()})
    return ModelConfig(name, embedding_size=size, two_emb_layer=has(weights, "seg_2."))


def _df_resnet(weights: dict[str, Tensor]) -> ModelConfig:
    name = _known("DF-ResNet (blocks of the third stage)", _count(weights, r"stages\.2\.(\d+)\."), DF_SIZES)
    return ModelConfig(name, embedding_size=_size(weights, "seg_1.bias", "seg_1.weight"))


def _simam(weights: dict[str, Tensor]) -> ModelConfig:
    blocks = _count(weights, r"front\.layer3\.(\d+)\.")
    name = _known("SimAM-ResNet (blocks of the third stage)", blocks, SIMAM_SIZES)
    width = (_size(weights, "front.bn1.weight", "front.bn1.bias") or 64) / 64
    return ModelConfig(name, width=width, embedding_size=_size(weights, "bottleneck.bias", "bottleneck.weight"))


def _ecapa(weights: dict[str, Tensor]) -> ModelConfig:
    channels, pooled = _size(weights, "layer1.bn.weight", "layer1.bn.bias"), _size(weights, "conv.bias", "conv.weight")
    context = _size(weights, "pool.linear1.weight", axis=1)
    return ModelConfig(
        _known("ECAPA-TDNN (channels)", channels, {512: "ECAPA-512", 1024: "ECAPA-1024"}),
        encoder="ASTP" if context == pooled else "ASTP-GLOB",
        embedding_size=_size(weights, "linear.bias", "linear.weight"),
        n_mels=_size(weights, "layer1.conv.weight", axis=1),
    )


def _speechbrain(weights: dict[str, Tensor]) -> ModelConfig:
    channels = _size(weights, "blocks.0.norm.norm.weight", "blocks.0.norm.norm.bias")
    return ModelConfig(
        _known("ECAPA-TDNN (channels)", channels, {512: "ECAPA-512", 1024: "ECAPA-1024"}),
        variant="speechbrain",
        embedding_size=_size(weights, "fc.conv.bias", "fc.conv.weight"),
        n_mels=_size(weights, "blocks.0.conv.conv.weight", axis=1),
    )


def _campplus(weights: dict[str, Tensor]) -> ModelConfig:
    last = "xvector.dense."
    size = _size(weights, f"{last}nonlinear.batchnorm.running_mean", f"{last}linear.weight")
    return ModelConfig("CAM++", embedding_size=size)


def _ge2e(weights: dict[str, Tensor]) -> ModelConfig:
    size, bands = _size(weights, "linear.bias", "linear.weight"), _size(weights, "lstm.weight_ih_l0", axis=1)
    return ModelConfig("GE2E-LSTM", embedding_size=size, n_mels=bands)


def _redimnet(weights: dict[str, Tensor]) -> ModelConfig:
    """Of all sizes with the stem's channels the one that shares most names with their shapes."""
    if has(weights, "backbone.inputs_weights."):
        raise CheckpointError("it holds WeSpeaker's own ReDimNet, which has other layers; spknet has the authors'")
    channels = _size(weights, "backbone.stem.1.weight", "backbone.stem.1.bias")
    rows = _size(weights, "backbone.fin_wght1d.w", axis=2)
    names = [name for name, layout in LAYOUTS.items() if layout.channels == channels]
    if not names:
        known = sorted({layout.channels for layout in LAYOUTS.values()})
        raise CheckpointError(f"it holds a ReDimNet of {channels} channels; spknet has {', '.join(map(str, known))}")
    bands = rows // channels if rows else None
    options = {"n_mels": bands, "embedding_size": _size(weights, "linear.bias", "linear.weight")}
    options["agg_gnorm"] = has(weights, "backbone.stem_gnorm.")
    return max((ModelConfig(name, **options) for name in names), key=lambda config: _agreeing(weights, config))


def _agreeing(weights: dict[str, Tensor], config: ModelConfig) -> int:
    try:
        with torch.device("meta"):
            network = build_model(config)
    except ConfigError:  # bands that the strides do not divide
        return -1
    own = network.state_dict()
    shapes = {network.our_name(key): value.shape for key, value in weights.items()}
    return sum(own[key].shape == shape for key, shape in shapes.items() if key in own)


KINDS = [
    (("backbone.stage0.", "pool."), _redimnet),
    (("xvector.", "head."), _campplus),
    (("downsample_layers.", "stages."), _df_resnet),
    (("front.layer1.", "bottleneck."), _simam),
    (("layer1.conv.", "layer2.se_res2block."), _ecapa),
    (("blocks.0.", "mfa.", "asp."), _speechbrain),
    (("layer1.0.", "layer4.", "seg_1."), _residual),
    (("lstm.", "linear."), _ge2e),
]
