"""The network of a run folder or of a checkpoint file, ours or another program's.

network, config, meta = load_network("runs/a")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spknet import config as configuration
from spknet.checkpoints import voxceleb_trainer as legacy
from spknet.checkpoints.averages import with_averages
from spknet.checkpoints.file import CheckpointError, is_ours, load_weights, newest, path_of, read, sample_rate, steps
from spknet.config import Config, ConfigError, ModelConfig
from spknet.messages import warn
from spknet.models import build_model


def load_network(
    path: str | Path,
    device: str | torch.device = "cpu",
    model: ModelConfig | None = None,
    weights: str | None = None,
):
    """(network in eval mode, Config, meta) of a run folder (its best checkpoint, else its newest), a checkpoint file of
    spknet, or one of voxceleb_trainer.

    weights: "averaged" (where the checkpoint has averages) or "trained"; None: the checkpoint's option eval.weights.
    model: the network's options, for voxceleb_trainer's files, which do not hold them; None: guessed from the weights. meta: path, step,
    epoch, speakers, labels, data_fingerprint, as far as the file has them. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        path, state = _of_run(path)
    else:
        state = read(path)
    if is_ours(state):
        config = _options(state, path)
        network = build_model(config.model, sample_rate(state), config.features)
        if config.train.precision == "float64":
            network = network.double()
        load_weights(network, _weights(state, path, weights or config.eval.weights), f"{path}, `model`,")
    else:
        config = Config(model=model or legacy.guess_model(state))
        network = build_model(config.model)
        legacy.load_into(network, None, state, allow_partial=False)
    wanted = ("step", "epoch", "sample_rate", "speakers", "dev_speakers", "labels", "data_fingerprint")
    meta = {"path": str(path)} | {name: state[name] for name in wanted if name in state}
    return network.to(device).eval(), config, meta


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
    if not there:
        raise CheckpointError(f"{run_dir} holds no checkpoints/step-*.pt; give a run folder or a checkpoint file")
    found = newest(run_dir, warn=warn)
    best = (found[1].get("best") or {}).get("step")
    if best in there and best != found[1]["step"]:
        path = path_of(run_dir, best)
        return path, read(path)
    return found
