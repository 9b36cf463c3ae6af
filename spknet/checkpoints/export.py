"""Checkpoints in voxceleb_trainer's format: `spknet export runs/a a.model --to voxceleb_trainer`.

The file is its oldest wrapping, {"__S__.KEY": network, "__L__.KEY": loss}, which all its versions read. Its window and filter
bank go along; whether it feeds 16-bit integers or [-1, 1] is up to the version that reads it.

    print(voxceleb_trainer("runs/a", "a.model"))
"""

from __future__ import annotations

from pathlib import Path

import torch

from shards.format import atomic_write
from spknet.checkpoints import file as checkpoint
from spknet.checkpoints.averages import with_averages
from spknet.checkpoints.network import load_network
from spknet.checkpoints.voxceleb_trainer import to_legacy
from spknet.config import ConfigError
from spknet.losses import build_loss

# Encoders that voxceleb_trainer's networks have.
THEIR_ENCODERS = {
    "ResNetSE34": ("SAP",),
    "ResNetSE34L": ("SAP", "ASP"),
    "ResNetSE34V2": ("SAP", "ASP"),
    "VGGVox": ("SAP", "TAP", "MAX"),
    "VGGVox40": ("SAP", "TAP", "MAX"),
    "RawNet3": ("ECA", "ASP"),
}


def voxceleb_trainer(path: str | Path, out: str | Path, weights: str | None = None) -> str:
    """Writes a run folder's or a checkpoint's network and loss for voxceleb_trainer; says how it is called there.

    weights: "averaged" or "trained"; None: as the run evaluates.
    Raises CheckpointError, or ConfigError where voxceleb_trainer has no such network.
    """
    model, config, meta = load_network(path, weights=weights)
    chosen = config.model
    if chosen.name not in THEIR_ENCODERS:
        raise ConfigError(f"{path} holds a {chosen.name}; voxceleb_trainer has {', '.join(THEIR_ENCODERS)}")
    if model.sample_rate != 16000:
        raise ConfigError(f"{path} is of a network for {model.sample_rate} Hz; voxceleb_trainer takes 16000 Hz only")
    if config.features.name != "auto":
        raise ConfigError(f"features.name {config.features.name}: voxceleb_trainer has no such front end")
    if chosen.width != 1:
        raise ConfigError(f"model.width {chosen.width}: voxceleb_trainer's networks have a width of 1 only")
    if chosen.encoder not in THEIR_ENCODERS[chosen.name]:
        fits = ", ".join(THEIR_ENCODERS[chosen.name])
        raise ConfigError(f"model.encoder {chosen.encoder}: voxceleb_trainer's {chosen.name} takes {fits}")
    state = checkpoint.read(meta["path"])
    loss = None
    if checkpoint.is_ours(state) and "head" not in state:  # a head in pieces is too large to go along
        head = with_averages(state, weights or config.eval.weights)["loss"]
        rows = [value.shape[0] for name, value in head.items() if name.endswith("weight")]
        loss = build_loss(config.loss, chosen.embedding_size, max(rows, default=1), config.data.utterances_per_speaker)
        loss.load_state_dict(head)
    with atomic_write(out) as file:
        torch.save(to_legacy(model, loss), file)
    version = "newer (samples in [-1, 1])" if chosen.input_scale == "unit" else "2020 (16-bit samples)"
    flags = (
        f"--model {chosen.name} --encoder_type {chosen.encoder} --nOut {chosen.embedding_size} --n_mels {chosen.n_mels}"
    )
    return f"{out}: for voxceleb_trainer {version}, {flags} --log_input {chosen.log_input}"
