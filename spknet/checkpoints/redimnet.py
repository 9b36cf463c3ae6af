"""ReDimNet's and ReDimNet2's released files: github.com/IDRnD/redimnet and github.com/PalabraAI/redimnet2.

    {"model_config": {"F": 72, "C": 16, "hop_length": 240, ...}, "state_dict": {"backbone.stem.0.weight": ..., "spec...": ...}}

The front end's tables (spec.) are in the file: they are compared with ours, and a file whose filters or window differ is refused.
Group norms (backbone.stem_gnorm) tell ReDimNet2's files of July 2026 from those of April.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from spknet.checkpoints import wespeaker
from spknet.checkpoints.file import CheckpointError
from spknet.checkpoints.imports import Found, tensors_of
from spknet.checkpoints.shapes import has, network_of
from spknet.config import FeaturesConfig, ModelConfig
from spknet.models.front_ends import build_features

TABLES = "spec."
TOLERANCE = 1e-3  # of filters and window, whose largest values are about 1


def recognize(state: Any, path: Path) -> Found | None:
    """What the file is, or None where it is not ReDimNet's. Raises CheckpointError for what is and is not here."""
    weights = tensors_of(state, "state_dict")
    if not has(weights, "backbone.stage0.") or has(weights, "projection.") or wespeaker.config_of(path):
        return None
    model = network_of(weights)
    if model is None:
        return None
    said = state.get("model_config")
    said = said if isinstance(said, dict) else {}
    features = _features(said, model, path)
    tables = {key: value for key, value in weights.items() if key.startswith(TABLES)}
    _check_tables(tables, model, features, path)
    weights = {key: value for key, value in weights.items() if key not in tables}
    notes = [] if said else ["it has no model_config, so its features are taken to be those of the released files"]
    return Found(f"the {model.name} of its authors", model, weights, features, notes=notes)


def _features(said: dict, model: ModelConfig, path: Path) -> FeaturesConfig:
    """Of model_config. Raises CheckpointError for a front end that is not here."""
    second = model.name.startswith("ReDimNet2")
    published = {"feat_type": "tf" if second else "pt", "hop_length": 160 if second else 240}
    params = said.get("spec_params") or {}
    kind, hop = (said.get(name) or value for name, value in published.items())
    if kind not in ("pt", "tf") or params.get("do_preemph", True) is not True:
        raise CheckpointError(f"{path}: its model_config asks for feat_type {kind}, {params}, which spknet has not")
    return FeaturesConfig(
        name="auto" if kind == published["feat_type"] else {"pt": "redimnet", "tf": "tfmel"}[kind],
        hop_ms=None if hop == published["hop_length"] else hop / 16,
        normalize_wave=params.get("norm_signal"),
    )


def _check_tables(tables: dict[str, Tensor], model: ModelConfig, features: FeaturesConfig, path: Path) -> None:
    variant = "redimnet2" if model.name.startswith("ReDimNet2") else "redimnet"
    front_end = build_features(model, 16000, features, variant)
    ours = {"mel_scale.fb": front_end.filters, "spectrogram.window": front_end.window}
    ours["melbanks_pt"] = front_end.filters.T[:, :, None]
    for key, value in tables.items():
        table = next((t for name, t in ours.items() if key.endswith(name)), None)
        if table is not None and (value.shape != table.shape or (value.float() - table).abs().max() > TOLERANCE):
            shapes = f"{tuple(value.shape)}, ours {tuple(table.shape)}"
            raise CheckpointError(f"{path}: its front end's {key} is another than that of {model.name} here ({shapes})")
