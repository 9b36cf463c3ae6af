"""Everything a run needs to continue, in one file of tensors and plain values.

    RUN/checkpoints/step-00001200.pt = {"format": "spknet checkpoint 1", "step", "epoch", "config", "sample_rate", "model", "loss",
        "averaging", "optimizer", "scheduler", "scaler", "speakers", "labels", "data_fingerprint", "versions", "window", "best", "seconds",
        "head": the index of a head in pieces (spknet.checkpoints.head), whose rows lie beside it in a folder}

Written to a temporary name, synced, renamed: a file under its final name is whole. `torch.load(weights_only=True)` reads it;
the zip container's CRC of every tensor is checked first, since torch does not look at all of them.

    save(run_dir, state); path, state = newest(run_dir); model, config, meta = load_network("runs/a")
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from shards.format import atomic_write, remove_leftovers
from spknet import config as configuration
from spknet.checkpoints.averages import with_averages
from spknet.config import Config, ModelConfig, flatten
from spknet.errors import UserError

FORMAT = "spknet checkpoint 1"

# Options that may differ when a run continues: they change where, how fast and how long it runs, not its numbers.
MAY_CHANGE = re.compile(
    r"run_dir|data\.(train_shards|train_list|train_root|workers|cache_dir|cache_gib)|augment\.(noise|rir)_shards"
    r"|loss\.sharded|train\.(epochs|max_steps|save_\w+|keep_checkpoints|resume\w*|initial_model|allow_partial|timeout_seconds|profile|threads)"
    r"|(eval|log)\..*"
)


class CheckpointError(UserError):
    """A checkpoint cannot be written, read or continued from; the message says what to do."""


def folder_of(path: str | Path) -> Path:
    """Where the rows of a head in pieces lie that belongs to a checkpoint file (spknet.checkpoints.head)."""
    return Path(path).with_suffix("")


def path_of(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}.pt"


def save(run_dir: str | Path, state: dict[str, Any], keep: int, best_step: int | None = None) -> Path:
    """Writes the checkpoint of state["step"] and removes all but the `keep` newest and the best one.

    Raises CheckpointError where it cannot be written (a full disk); earlier checkpoints are then untouched.
    """
    path = path_of(run_dir, state["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(
            f"cannot write checkpoint {path}: {error} ({free / 2**20:.0f} MiB free there); earlier checkpoints are intact:"
            " make room and start the same command again"
        ) from error
    for old in _steps(run_dir)[keep:] if keep > 0 else []:
        if old not in (state["step"], best_step):
            path_of(run_dir, old).unlink(missing_ok=True)
    remove_orphans(run_dir)
    return path


def remove_orphans(run_dir: str | Path) -> None:
    """Deletes rows of heads whose checkpoint file is gone, or was never written by a run that was killed."""
    for folder in (p for p in (Path(run_dir) / "checkpoints").glob("step-*") if p.is_dir()):
        if folder.with_suffix(".pt").exists():
            remove_leftovers(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _steps(run_dir: str | Path) -> list[int]:
    """Steps of the checkpoints that lie there, newest first."""
    found = (re.fullmatch(r"step-(\d+)\.pt", p.name) for p in (Path(run_dir) / "checkpoints").glob("step-*.pt"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read(path: str | Path) -> dict[str, Any]:
    """The content of one checkpoint file of any program, on the CPU. Raises CheckpointError where it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint; give a file, or a run folder that holds checkpoints/step-*.pt"
        )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise CheckpointError(
                    f"{path} is damaged: the checksum of {damaged} does not fit; use an earlier checkpoint"
                )
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch and zipfile raise many types for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}; use an earlier checkpoint") from error


def _check_head(path: Path, state: dict[str, Any]) -> None:
    for entry in state.get("head", {}).get("files", []):
        rows = folder_of(path) / entry["name"]
        size = rows.stat().st_size if rows.is_file() else 0
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: {rows} has {size} bytes, expected {entry['bytes']}: it is cut or missing")


def newest(run_dir: str | Path, warn, head: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run, or None where it has none.

    warn: called with a message for each damaged one passed over; head: the rows of a head in pieces must be there too.
    Raises CheckpointError where all are damaged.
    """
    steps = _steps(run_dir)
    for step in steps:
        path = path_of(run_dir, step)
        try:
            state = read(path)
            if head:
                _check_head(path, state)
            return path, state
        except CheckpointError as error:
            warn(f"{error} (using the one before it)")
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {run_dir}/checkpoints can be read; start anew elsewhere"
        )
    return None


def changed_options(old: dict[str, Any], new: Config) -> list[str]:
    """`key: old -> new` for each option that differs and may not, when a run of config `old` continues with `new`."""
    before, after = flatten(configuration.to_dict(configuration.from_dict(old))), flatten(configuration.to_dict(new))
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in after
        if before[key] != after[key] and not MAY_CHANGE.fullmatch(key)
    ]


def _changed_data(old: str, new: str) -> list[str]:
    """What differs between two fingerprints of `Corpus.fingerprint`: audio, settings of the batches, noise."""
    before, after = (old + "--").split("-")[:3], (new + "--").split("-")[:3]
    changed = []
    if before[:2] != after[:2]:
        changed.append("the training data (or N, M, the cap or the seed of the batches)")
    if before[2] != after[2]:
        changed.append("the noise data or impulse responses of augment.noise_shards and augment.rir_shards")
    return changed


def check_resume(state: dict[str, Any], path: Path, config: Config, fingerprint: str) -> None:
    """Raises CheckpointError naming the options or the data that changed since the checkpoint."""
    if config.train.resume_override:
        return
    changed = changed_options(state["config"], config)
    changed += _changed_data(state["data_fingerprint"], fingerprint)
    if changed:
        raise CheckpointError(
            f"{path} was made with other settings: {'; '.join(changed)}. Undo that, give another --run_dir, or continue"
            " nonetheless with --train.resume_override true"
        )


def load_head_by_speaker(loss, state: dict[str, Any], speakers: list[str], labels) -> dict[str, torch.Tensor]:
    """The checkpoint's loss parameters with the rows of a classification head moved to where this run's speakers are.

    Rows of speakers that the checkpoint does not know keep their initial values; each must be trained.
    """
    old_labels = dict(zip(state["speakers"], state["labels"]))
    merged = {}
    for name, value in loss.state_dict().items():
        theirs = state["loss"].get(name)
        if theirs is None or theirs.shape[1:] != value.shape[1:]:
            merged[name] = value
        elif theirs.dim() == 0 or theirs.shape[0] != max(old_labels.values(), default=-1) + 1:
            merged[name] = theirs if theirs.shape == value.shape else value
        else:
            merged[name] = value.clone()
            for speaker, label in zip(speakers, labels):
                if speaker in old_labels:
                    merged[name][int(label)] = theirs[old_labels[speaker]]
    return merged


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
    from spknet.models import build_model

    path = Path(path)
    if path.is_dir():
        path, state = _of_run(path)
    else:
        state = read(path)
    if isinstance(state, dict) and state.get("format") == FORMAT:
        config = configuration.from_dict(state["config"])
        network = build_model(config.model, sample_rate(state), config.features)
        if config.train.precision == "float64":
            network = network.double()
        network.load_state_dict(with_averages(state, weights or config.eval.weights)["model"])
    else:
        from spknet.train import voxceleb_trainer as legacy

        config = Config(model=model or legacy.guess_model(state))
        network = build_model(config.model)
        legacy.load_into(network, None, state, allow_partial=False)
    wanted = ("step", "epoch", "sample_rate", "speakers", "dev_speakers", "labels", "data_fingerprint")
    meta = {"path": str(path)} | {name: state[name] for name in wanted if name in state}
    return network.to(device).eval(), config, meta


def sample_rate(state: dict[str, Any]) -> int:
    """Hz that the network of one of our checkpoints is given. Old ones do not say; their 25 ms window tells."""
    window = state["model"].get("features.window")
    return state.get("sample_rate") or (16000 if window is None else 40 * len(window))


def _of_run(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    steps = _steps(run_dir)
    if not steps:
        raise CheckpointError(f"{run_dir} holds no checkpoints/step-*.pt; give a run folder or a checkpoint file")
    found = newest(run_dir, warn=print, head=False)
    best = (found[1].get("best") or {}).get("step")
    if best in steps and best != found[1]["step"]:
        path = path_of(run_dir, best)
        return path, read(path)
    return found
