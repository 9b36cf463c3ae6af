"""The network of a run folder or of a checkpoint file, ours or another program's.

network, config, meta = load_network("runs/a")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spknet import config as configuration
from spknet.checkpoints import imports, redimnet, resemblyzer, speechbrain, threed_speaker, wespeaker
from spknet.checkpoints import voxceleb_trainer as legacy
from spknet.checkpoints.averages import with_averages
from spknet.checkpoints.file import CheckpointError, is_ours, load_weights, newest, path_of, sample_rate, steps
from spknet.checkpoints.portable import read
from spknet.config import Config, ConfigError, ModelConfig
from spknet.messages import say, warn
from spknet.models import build_model

PROJECTS = (redimnet, resemblyzer, threed_speaker, speechbrain, wespeaker)  # 3D-Speaker has SpeechBrain's names, too
WANTED = ("step", "epoch", "sample_rate", "speakers", "dev_speakers", "labels", "data_fingerprint")
WANTED += ("card", "provenance")


def load_network(
    path: str | Path, device: str | torch.device = "cpu", model: ModelConfig | None = None, weights: str | None = None
):
    """(network in eval mode, Config, meta) of a run folder (its best checkpoint, else its newest), a checkpoint file of
    spknet, a file to hand on, or a file or folder of voxceleb_trainer, WeSpeaker, 3D-Speaker, SpeechBrain, ReDimNet, ReDimNet2 or
    Resemblyzer.

    weights: "averaged" (where the checkpoint has averages) or "trained"; None: the checkpoint's option eval.weights.
    model: the network's options, for voxceleb_trainer's files, which do not hold them; None: guessed from the weights.
    meta: path, step, epoch, sample_rate, speakers, dev_speakers, labels, data_fingerprint, card, provenance as far as the file has
    them, and `kind`, what another project's file was recognised as, which is also told. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir() and steps(path):
        path, state = _of_run(path)
    else:
        path = imports.file_in(path) if path.is_dir() else path
        state = read(path)
    meta: dict[str, Any] = {"path": str(path)}
    if is_ours(state):
        config = _options(state, path)
        network = build_model(config.model, sample_rate(state), config.features)
        if config.train.precision == "float64":
            network = network.double()
        load_weights(network, _weights(state, path, weights or config.eval.weights), f"{path}, `model`,")
    elif found := recognize(state, path):
        network, config = imports.build(found, path), Config(model=found.model, features=found.features)
        meta |= {"kind": found.what, "sample_rate": found.sample_rate}
        say("; ".join([f"{path}: recognised as {found.what}", *found.notes]))
    else:
        try:
            config = Config(model=model or legacy.guess_model(state))
            network = build_model(config.model)
            legacy.load_into(network, None, state, allow_partial=False)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        meta["kind"] = f"voxceleb_trainer's {config.model.name}"
    if is_ours(state):
        meta |= {name: state[name] for name in WANTED if state.get(name) is not None}
        meta |= {name: value for name, value in meta.get("provenance", {}).items() if name == "kind"}
    return network.to(device).eval(), config, meta


def recognize(state: Any, path: str | Path) -> imports.Found | None:
    """What another project's file is; None where it is none of those in PROJECTS. Raises CheckpointError."""
    try:
        return next((found for project in PROJECTS if (found := project.recognize(state, Path(path)))), None)
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: shapes, or the configuration beside it, that no network has: {reason}"
        ) from None


def _options(state: dict[str, Any], path: Path) -> Config:
    try:
        return configuration.from_dict(state["config"])
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{path}: its options are missing, or not those of this version ({error})") from error


def _weights(state: dict[str, Any], path: Path, which: str) -> Any:
    try:
        return with_averages(state, which)["model"]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} lacks weights ({error}); use another checkpoint") from error


def _of_run(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    there = steps(run_dir)
    found = newest(run_dir, warn=warn)
    best = (found[1].get("best") or {}).get("step")
    if best in there and best != found[1]["step"]:
        path = path_of(run_dir, best)
        return path, read(path)
    return found
