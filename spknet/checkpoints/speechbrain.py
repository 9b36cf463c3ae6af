"""SpeechBrain's ECAPA-TDNN: embedding_model.ckpt with the hyperparams.yaml beside it (speechbrain/spkrec-ecapa-voxceleb).

    {"blocks.0.conv.conv.weight": ..., "mfa...", "asp...", "asp_bn...", "fc.conv.bias": ...}     a bare state dict

The statistics in mean_var_norm_emb.ckpt are not used there either when two files are compared. Names say conv.conv and norm.norm
because of SpeechBrain's wrappers; the network's `renames` turns them into ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spknet.checkpoints.file import CheckpointError
from spknet.checkpoints.imports import Found, beside, tensors_of
from spknet.checkpoints.shapes import network_of


def recognize(state: Any, path: Path) -> Found | None:
    """What the file is, or None where it is not SpeechBrain's. Raises CheckpointError where its hyperparams.yaml disagrees."""
    weights = tensors_of(state)
    model = network_of(weights)
    if model is None or model.variant != "speechbrain":
        return None
    said = beside(path, "hyperparams.yaml")
    bands = said.get("n_mels", model.n_mels)
    if str(bands) != str(model.n_mels):
        raise CheckpointError(f"{path} takes {model.n_mels} mel bands; its hyperparams.yaml says {bands}")
    notes = [] if said else ["there is no hyperparams.yaml beside it, so its features are taken to be SpeechBrain's"]
    return Found(f"SpeechBrain's {model.name}", model, weights, notes=notes)
