"""WeSpeaker's avg_model.pt with the config.yaml beside it: github.com/wenet-e2e/wespeaker.

    {"conv1.weight": ..., "seg_1.bias": ..., "projection.weight": (classes, D)}    a bare state dict, its head included

Without a config.yaml the head is what tells the file from 3D-Speaker's of the same network. Features are Kaldi's with a Hamming
window of 16-bit samples. CAM++ of 192 dimensions is what WeSpeaker took over from 3D-Speaker, and its command line then uses
3D-Speaker's features; so does this. Three times as many classes as speakers are speeds; no file names its speakers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from spknet.checkpoints.file import CheckpointError
from spknet.checkpoints.imports import Found, beside, tensors_of, without
from spknet.checkpoints.shapes import network_of
from spknet.config import FeaturesConfig

HEAD = r"projection\."
# Their poolings under our names.
POOLINGS = {"TAP": "TAP", "TSTP": "TSTP", "TSDP": "TSDP", "ASTP": "ASTP", "MQMHASTP": "MQMHA"}
NOT_THEIRS = ("ERes2NetV2", "GE2E-LSTM")


def config_of(path: Path) -> dict:
    """Its config.yaml; {} where there is none, or another project's."""
    config = beside(path, "config.yaml")
    return config if "model_args" in config else {}


def recognize(state: Any, path: Path) -> Found | None:
    """What the file is, or None where it is not WeSpeaker's. Raises CheckpointError for what is and is not here."""
    weights, config = tensors_of(state, "model"), config_of(path)
    weights, notes = without(weights, HEAD, "its head, which names no speakers, is")
    weights, tables = without(weights, r"frontend\.", "its front end's tables are")
    model = network_of(weights)
    if config and model is None:
        raise CheckpointError(
            f"{path} was recognised as WeSpeaker's {config.get('model')} by its config.yaml; spknet has no such network, or"
            " this is not its avg_model.pt"
        )
    if model is None or model.name in NOT_THEIRS or model.variant == "speechbrain":
        return None
    notes += tables
    what, variant = f"WeSpeaker's {model.name}", "auto"
    if model.name == "CAM++" and model.embedding_size == 192:
        variant = "3dspeaker"
        notes.append("192 dimensions are 3D-Speaker's, which WeSpeaker took over: its features are taken")
    args, data = config.get("model_args") or {}, config.get("dataset_args") or {}
    if args.get("pooling_func") in POOLINGS and model.name.startswith(("ResNet", "DF-ResNet", "CAM++", "Res2Net")):
        model = replace(model, encoder=POOLINGS[args["pooling_func"]])
    if args.get("feat_dim"):
        model = replace(model, n_mels=args["feat_dim"])
    if not config:
        notes.append("there is no config.yaml beside it, so its features are taken to be WeSpeaker's defaults")
    rate = data.get("resample_rate") or 16000
    features = _features(data, not model.name.startswith("ReDimNet"), path)
    return Found(what, replace(model, variant=variant), weights, features if config else FeaturesConfig(), rate, notes)


def _features(data: dict, kaldi: bool, path: Path) -> FeaturesConfig:
    """Of dataset_args. kaldi: such features are the network's own. Raises CheckpointError for features that are not here."""
    kind, options = data.get("frontend") or "fbank", data.get("fbank_args") or {}
    wrong = [] if kind in ("fbank", "tfmel") else [f"frontend {kind}"]
    wrong += [f"fbank_args.frame_length {options['frame_length']}"] if options.get("frame_length", 25) != 25 else []
    wrong += [f"resample_rate {data['resample_rate']}"] if not isinstance(data.get("resample_rate", 1), int) else []
    cmvn = data.get("cmvn_args") or {}
    wrong += ["cmvn_args.norm_var true"] if cmvn.get("norm_var") else []
    if wrong:
        raise CheckpointError(f"{path}: its config.yaml asks for {', '.join(wrong)}, which spknet has not")
    if kind == "tfmel":  # which takes the mean away itself, whatever cmvn says
        wave = (data.get("tfmel_args") or {}).get("norm_signal", False)
        return FeaturesConfig("tfmel", normalize_wave=bool(wave))
    hop = float(options.get("frame_shift", 10))
    mean = data.get("cmvn", True) and cmvn.get("norm_mean", True)
    return FeaturesConfig("auto" if kaldi else "kaldi", hop_ms=None if hop == 10 else hop, remove_mean=bool(mean))
