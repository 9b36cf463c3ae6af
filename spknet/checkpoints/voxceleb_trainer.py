"""voxceleb_trainer's checkpoints: state dicts under other names, in three wrappings.

    {"__S__.conv1.weight": ..., "__L__.w": ...}                       2020
    {"model_state_dict": {the same}, "optimizer_state_dict": ..., "scheduler_state_dict": ..., "epoch": ...}     newer
    {"model": {"conv1.filterbank.low_hz_": ...}}                      RawNet3; an optimizer, a scheduler and an epoch may lie beside

`module.` may stand before keys of a network that was trained on several GPUs. One table of rules turns our names into
theirs; reading goes through the same table backwards. A window or filter bank in the file replaces the network's own: it is
what the weights were trained with.

    notes = load_into(model, loss, torch.load(path, weights_only=True))
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spknet.checkpoints.file import CheckpointError
from spknet.config import ModelConfig
from spknet.models import MODELS

HEAD = [
    (r"^head\.encoder\.vector$", "attention"),
    (r"^head\.encoder\.linear\.", "sap_linear."),
    (r"^head\.encoder\.squeeze\.", "attention.0."),
    (r"^head\.encoder\.norm\.", "attention.2."),
    (r"^head\.encoder\.expand\.", "attention.3."),
    (r"^head\.fc\.", "fc."),
]
SPECTRUM = [(r"^features\.window$", "torchfb.spectrogram.window"), (r"^features\.filters$", "torchfb.mel_scale.fb")]
EMPHASIZED = [
    (r"^features\.taps$", "torchfb.0.flipped_filter"),
    (r"^features\.window$", "torchfb.1.spectrogram.window"),
    (r"^features\.filters$", "torchfb.1.mel_scale.fb"),
]
RESNET = [
    (r"^stem\.", "conv1."),
    (r"^norm\.", "bn1."),
    (r"^stages\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"(?<=\.)norm(\d)\.", r"bn\1."),
    (r"\.gate\.squeeze\.", ".se.fc.0."),
    (r"\.gate\.excite\.", ".se.fc.2."),
    (r"\.shortcut\.", ".downsample."),
]
RAWNET3 = [
    (r"^features\.taps$", "preprocess.0.flipped_filter"),
    (r"^features\.norm\.", "preprocess.1."),
    (r"^features\.sinc\.low$", "conv1.filterbank.low_hz_"),
    (r"^features\.sinc\.band$", "conv1.filterbank.band_hz_"),
    (r"^features\.sinc\.window$", "conv1.filterbank.window_"),
    (r"^features\.sinc\.time$", "conv1.filterbank.n_"),
    (r"^block(\d)\.", r"layer\1."),
    (r"(?<=\.)norms\.", "bns."),
    (r"(?<=\d\.)norm(\d)\.", r"bn\1."),
    (r"\.gate\.shift$", ".afms.alpha"),
    (r"\.gate\.fc\.", ".afms.fc."),
    (r"\.shortcut\.", ".residual.0."),
    (r"^mix\.", "layer4."),
    (r"^head\.encoder\.0\.squeeze\.", "attention.0."),
    (r"^head\.encoder\.0\.norm\.", "attention.2."),
    (r"^head\.encoder\.0\.expand\.", "attention.3."),
    (r"^head\.encoder\.1\.", "bn5."),
    (r"^head\.fc\.", "fc6."),
    (r"^unused\.0\.", "bn1."),
    (r"^unused\.1\.", "bn6."),
]
NETWORK_RULES = {
    "ResNetSE34": RESNET + HEAD + SPECTRUM,
    "ResNetSE34L": RESNET + HEAD + SPECTRUM,
    "ResNetSE34V2": RESNET + HEAD + EMPHASIZED,
    "VGGVox": [(r"^layers\.", "netcnn."), *HEAD, *SPECTRUM],
    "RawNet3": RAWNET3,
}
LOSS_RULES = {
    "Softmax": [(r"^", "fc.")],
    "AMSoftmax": [(r"^weight$", "W")],
    "SoftmaxPrototypical": [(r"^softmax\.", "softmax.fc.")],
}
# What a file may lack: it can be computed, is a counter, or is never used.
OPTIONAL = re.compile(r"features\.(window|filters|taps|sinc\.window|sinc\.time)|unused\..*|.*num_batches_tracked")


@dataclass(frozen=True)
class Misfit:
    """Keys, under the file's names, that do not fit a module."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = []
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", self.misshapen)):
            if names:
                parts.append(f"{len(names)} {kind}: {', '.join(names)}")
        return "; ".join(parts)


def their_name(module: nn.Module, key: str) -> str:
    """voxceleb_trainer's name of an entry of a network's or loss's state dict."""
    kind = type(module).__name__
    for pattern, name in NETWORK_RULES.get(kind) or LOSS_RULES.get(kind, []):
        key = re.sub(pattern, name, key)
    return key


def is_legacy_checkpoint(state: object) -> bool:
    """Whether a file's content is one of the wrappings above; what lies beside the weights (optimizer, epoch) does not count."""
    if not isinstance(state, dict) or "format" in state:
        return False
    inner = _inner(state)
    return "model_state_dict" in state or bool(inner) and all(isinstance(v, Tensor) for v in inner.values())


def _inner(state: dict) -> dict:
    """What the file holds of weights."""
    wrapped = (state[name] for name in ("model_state_dict", "model") if isinstance(state.get(name), dict))
    return next(wrapped, state)


def split(state: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's and the loss's state dict of a checkpoint, without wrapping and prefixes."""
    if not is_legacy_checkpoint(state):
        kind = f"keys {', '.join(map(str, list(state)[:8]))}" if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"not a checkpoint of spknet or of a project that it reads: found {kind}; expected a state dict, alone, under"
            " model_state_dict or under model"
        )
    network, loss = {}, {}
    for key, value in _inner(state).items():
        part, name = re.fullmatch(r"(?:module\.)*(?:__([SL])__\.)?(?:module\.)*(.*)", key).groups()
        (loss if part == "L" else network)[name] = value
    return network, loss


def fit(module: nn.Module, theirs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Misfit]:
    """The entries of a file that fit a module, under our names and in our shapes, and what does not fit."""
    own = module.state_dict()
    names = {their_name(module, key): key for key in own}
    found, misshapen = {}, []
    for name, key in names.items():
        if name not in theirs:
            continue
        counter = name.endswith("num_batches_tracked")  # a mean of checkpoints makes floats of these
        if not (counter and isinstance(theirs[name], Tensor)) and not same_kind(theirs[name], own[key]):
            misshapen.append(f"{name} {getattr(theirs[name], 'dtype', type(theirs[name]).__name__)}")
            continue
        value = theirs[name].mT if name == "W" else theirs[name]
        if value.numel() == own[key].numel() and name.endswith("flipped_filter"):
            value = value.reshape(own[key].shape)
        if value.shape == own[key].shape:
            found[key] = value
        else:
            misshapen.append(f"{name} {tuple(value.shape)} instead of {tuple(own[key].shape)}")
    missing = [name for name, key in names.items() if name not in theirs and not OPTIONAL.fullmatch(key)]
    return found, Misfit(missing, [name for name in theirs if name not in names], misshapen)


def same_kind(value: object, own: Tensor) -> bool:
    """Whether a file's entry can be taken for one of a module.

    Numbers of another width can, and counters kept as floats; complex numbers and integers for a weight cannot.
    """
    return isinstance(value, Tensor) and not value.is_complex() and value.is_floating_point() >= own.is_floating_point()


def load_into(model: nn.Module, loss: nn.Module | None, state: dict, allow_partial: bool = False) -> list[str]:
    """Loads a checkpoint of voxceleb_trainer; returns what a user should know.

    Raises CheckpointError naming missing, unexpected and misshapen keys of the network, unless `allow_partial`. A loss takes
    what fits it: another loss, or other speakers, start anew with a note.
    """
    theirs, their_loss = split(state)
    found, misfit = fit(model, theirs)
    notes = load_fitting(model, found, misfit, "network", allow_partial)
    if loss is not None:
        found, misfit = fit(loss, their_loss)
        notes += load_fitting(loss, found, misfit, "loss", allow_partial=True)
    return notes


def load_fitting(
    module: nn.Module, found: dict[str, Tensor], misfit: Misfit, what: str, allow_partial: bool, options: str = ""
) -> list[str]:
    """Loads the entries that fit, returns a note where some did not; or raises CheckpointError, unless `allow_partial`.

    options: of the command line that the file was made with, where they are known.
    """
    if misfit and not allow_partial:
        raise CheckpointError(
            f"the checkpoint does not fit {type(module).__name__}: {misfit}. Give the options it was trained with"
            f" ({options or '--model.name, --model.encoder, --model.n_mels, ...'}), or --train.allow_partial true to start from"
            " what fits"
        )
    module.load_state_dict(found, strict=False)
    return [f"warning: the {what} is loaded in part: {misfit}"] if misfit else []


def guess_model(state: dict) -> ModelConfig:
    """The network's options as far as a checkpoint's keys and shapes tell; a Hann window in a ResNet means the input scale
    of 2020. `log_input` and RawNet3's `sinc_stride` cannot be seen: their defaults."""
    keys, _ = split(state)
    name = _guess_name(keys)
    filters = next((v for k, v in keys.items() if k.endswith("mel_scale.fb")), None)
    last = keys.get("fc6.weight", keys.get("fc.weight"))
    if last is None:
        raise CheckpointError(
            f"none of the networks that spknet has of other projects: found {', '.join(list(keys)[:4])}, ..., and no last layer"
            " of voxceleb_trainer (fc.weight)"
        )
    old = name == "ResNetSE34" or (name != "VGGVox" and window_of(keys) == "hann")
    return ModelConfig(
        name=name,
        encoder=_guess_encoder(name, keys, last.shape[1]),
        embedding_size=last.shape[0],
        n_mels=filters.shape[1] if filters is not None else ModelConfig().n_mels,
        input_scale="int16" if old else "unit",
    )


def _guess_name(keys: dict[str, Tensor]) -> str:
    marks = {"netcnn.0.weight": "VGGVox", "conv1.filterbank.low_hz_": "RawNet3", "conv1.bias": "ResNetSE34V2"}
    for key, name in marks.items():
        if key in keys:
            return name
    return "ResNetSE34L" if any(key.startswith("torchfb.") for key in keys) else "ResNetSE34"


def _guess_encoder(name: str, keys: dict[str, Tensor], pooled: int) -> str:
    if name == "RawNet3":
        return "ASP" if keys["attention.3.weight"].shape[0] == 1 else "ECA"
    if "sap_linear.weight" in keys:
        return "SAP" if pooled == keys["sap_linear.weight"].shape[0] else "ASP"
    if "attention.3.weight" in keys:
        return "SAP" if pooled == keys["attention.3.weight"].shape[0] else "ASP"
    return "TAP"  # MAX looks the same


def window_of(keys: dict[str, Tensor]) -> str | None:
    """hann or hamming, by the first value of the analysis window in a checkpoint; None where it has none."""
    window = next((v for k, v in keys.items() if k.endswith("spectrogram.window")), None)
    return None if window is None else "hann" if float(window[0]) < 0.04 else "hamming"


def to_legacy(model: nn.Module, loss: nn.Module | None) -> dict[str, Tensor]:
    """The 2020 wrapping of a network and its loss, which every version reads."""
    state = {}
    for prefix, module in (("__S__.", model), ("__L__.", loss)):
        for key, value in module.state_dict().items() if module is not None else ():
            name = their_name(module, key)
            if name == "W":
                value = value.T.contiguous()
            elif name.endswith("flipped_filter"):
                value = value.reshape(1, 1, 2)
            if not (type(module) is MODELS["ResNetSE34"] and key == "features.window"):  # theirs makes it at each call
                state[prefix + name] = value.detach().to("cpu", _plain(value))
    return state


def _plain(value: Tensor) -> torch.dtype:
    return torch.float32 if value.is_floating_point() else value.dtype
