"""3D-Speaker's files: github.com/modelscope/3D-Speaker, and what ModelScope has of it (campplus_voxceleb.bin, ...).

    {"conv1.weight": ..., "seg_1.bias": ...}     a bare state dict; the head lies in classifier.ckpt

Released files are told by ModelScope's configuration.json beside them, a run's embedding_model.ckpt by the config.yaml of its exp
folder. Without either, CAM++ and ResNets with a second embedding layer are taken for 3D-Speaker's where they have no head, and
an ECAPA-TDNN, whose names are SpeechBrain's, is not. Features are Kaldi's with a Povey window of samples in [-1, 1].
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from spknet.checkpoints import wespeaker
from spknet.checkpoints.imports import Found, beside, tensors_of
from spknet.checkpoints.shapes import has, network_of
from spknet.config import FeaturesConfig

FEATURES = FeaturesConfig(name="kaldi", window="povey", scale="unit")


def is_theirs(path: Path) -> bool:
    """Whether the configuration beside a file is 3D-Speaker's, or ModelScope's of a speaker network."""
    run, released = beside(path, "config.yaml", above=2), beside(path, "configuration.json")
    return "speakerlab" in str(run.get("embedding_model")) or "speaker-verification" in str(released.get("task"))


def recognize(state: Any, path: Path) -> Found | None:
    """What the file is, or None where it is not 3D-Speaker's. Raises CheckpointError for what is and is not here."""
    weights, theirs = tensors_of(state, "state_dict"), is_theirs(path)
    if not theirs and (wespeaker.config_of(path) or has(weights, "projection.")):
        return None
    model = network_of(weights)
    if model is None:
        return None
    if model.name == "ERes2NetV2":
        return Found("3D-Speaker's ERes2NetV2", model, weights)
    if model.variant == "speechbrain":  # ECAPA-TDNN
        return Found(f"3D-Speaker's {model.name}", model, weights, FEATURES) if theirs else None
    if not (model.name == "CAM++" or model.two_emb_layer or theirs and model.name.startswith("ResNet")):
        return None
    notes = [] if theirs else ["it has no configuration beside it and no head, so it is taken for 3D-Speaker's"]
    return Found(f"3D-Speaker's {model.name}", replace(model, variant="3dspeaker"), weights, notes=notes)
