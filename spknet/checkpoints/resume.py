"""Whether a run may go on from a checkpoint, and what is told where it does so differently.

Refused, unless train.resume_override: options, data or a length that change the numbers. Told: facts that move the last bits
(threads, versions), which change by themselves when a job is requeued on another machine.

    for note in check_resume(state, path, config, fingerprint, facts): say(note)
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from spknet import config as configuration
from spknet.checkpoints.file import FORMAT, CheckpointError, is_ours
from spknet.config import Config, ConfigError, flatten
from spknet.data.presets import composition

# Options that may differ when a run continues: where its data and files lie, how fast it goes, what is watched. Noise data
# may lie elsewhere, but must be the same (their fingerprint is that of the data); a length may change where no rate hangs on it.
MAY_CHANGE = re.compile(
    r"run_dir|data\.(train_shards|train_list|train_root|workers|cache_dir|cache_gib)|augment\.(noise|rir)_shards"
    r"|loss\.sharded|train\.(epochs|max_steps|save_\w+|keep_checkpoints|resume\w*|initial_\w+|allow_partial|timeout_seconds|profile|threads)"
    r"|(eval|log)\..*"
)
LENGTH_MATTERS = ("cosine", "warmup_cosine", "exponential")  # optim.schedule: rates that hang on the last step's number
NEEDED = {
    "step": int,
    "epoch": (int, float),
    "config": dict,
    "model": dict,
    "loss": dict,
    "optimizer": dict,
    "scaler": dict,
    "speakers": list,
    "labels": list,
    "data_fingerprint": str,
    "window": dict,
    "seconds": (int, float),
}


def check_resume(
    state: Any, path: Path, config: Config, fingerprint: str, facts: dict[str, Any] | None = None
) -> list[str]:
    """Notes on facts that differ, {"CPU threads": 2, "torch": "2.11.0"}, between the checkpoint's state["facts"] and now.

    Raises CheckpointError naming what is wrong with the checkpoint, or the options, the data or the length that changed.
    """
    _check_whole(state, path)
    changed = [] if config.train.resume_override else _changed(state, path, config, fingerprint)
    if changed:
        raise CheckpointError(
            f"{path} was made with other settings: {'; '.join(changed)}. Undo that, give another --run_dir, or continue"
            " nonetheless with --train.resume_override true"
        )
    before = state.get("facts") or {}
    return [
        f"{name}: {before[name]} -> {now}, so that the numbers agree with those of an undisturbed run up to rounding only"
        for name, now in (facts or {}).items()
        if name in before and before[name] != now
    ]


def _check_whole(state: Any, path: Path) -> None:
    if not is_ours(state):
        kind = ascii(state.get("format", "no format")) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path} is no checkpoint that this version can continue: found {kind[:60]}, expected {FORMAT!r}; to start from its"
            " weights alone, give it as --train.initial_model"
        )
    wrong = [name for name, kind in NEEDED.items() if not isinstance(state.get(name), kind)]
    wrong += [f"window.{name}" for name in ("loss", "accuracy", "steps") if name not in (state.get("window") or {})]
    if not wrong and (state["step"] < 0 or len(state["speakers"]) != len(state["labels"])):
        wrong = ["step, or speakers and labels"]
    if wrong:
        raise CheckpointError(
            f"{path} cannot be continued: {', '.join(wrong)} missing or of another kind; use an earlier checkpoint"
        )


def _changed(state: dict[str, Any], path: Path, config: Config, fingerprint: str) -> list[str]:
    try:
        old = configuration.from_dict(state["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: its options are not those of this version ({error})") from error
    had_noise = bool(old.augment.noise_shards or old.augment.rir_shards)
    changed = changed_options(state["config"], config)
    changed += _changed_data(state["data_fingerprint"], fingerprint, had_noise)
    return changed + _changed_length(state, old, config)


def changed_options(old: dict[str, Any], new: Config) -> list[str]:
    """`key: old -> new` for each option that differs and may not, when a run of config `old` continues with `new`."""
    before, after = _effective(configuration.from_dict(old)), _effective(new)
    changed = [key for key in after if before[key] != after[key] and not MAY_CHANGE.fullmatch(key)]
    for key in ("augment.noise_shards", "augment.rir_shards"):
        if (before[key] is None) != (after[key] is None):
            changed.append(key)
    return [f"{key}: {before[key]} -> {after[key]}" for key in changed]


def _effective(config: Config) -> dict[str, Any]:
    """Options by name; those of the augmentation that are left to the preset have its values."""
    drawn = {f"augment.{name}": value for name, value in dataclasses.asdict(composition(config.augment)).items()}
    options = {**flatten(configuration.to_dict(config)), **drawn}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _changed_data(old: str, new: str, had_noise: bool) -> list[str]:
    """What differs between two fingerprints of `Corpus.fingerprint`: audio, settings of the batches, noise."""
    before, after = (old + "--").split("-")[:3], (new + "--").split("-")[:3]
    changed = []
    if before[:2] != after[:2]:
        changed.append("the training data (or N, M, the cap or the seed of the batches)")
    untold = had_noise and not before[2]  # checkpoints of 2026-11 and before do not tell which noise
    if before[2] != after[2] and not untold:
        changed.append("the noise data or impulse responses of augment.noise_shards and augment.rir_shards")
    return changed


def _changed_length(state: dict[str, Any], old: Config, new: Config) -> list[str]:
    """A learning rate that falls to the run's end would jump in a run of another length."""
    if new.optim.schedule not in LENGTH_MATTERS or not state["epoch"]:
        return []
    steps_per_epoch = round(state["step"] / state["epoch"])
    before, after = (
        min(c.train.epochs * steps_per_epoch, c.train.max_steps or c.train.epochs * steps_per_epoch) for c in (old, new)
    )
    if before == after:
        return []
    return [f"steps of the run: {before} -> {after} (optim.schedule {new.optim.schedule} falls to the last step)"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any, path: Path) -> None:
    """optimizer.load_state_dict(state), where it fits. Raises CheckpointError where it does not."""
    try:
        moments = state["state"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, values in moments.items():
            shape = parameters[number].shape
            fits = all(v.shape in (shape, ()) for v in values.values() if isinstance(v, torch.Tensor))
            if not fits:
                raise ValueError(f"the moments of parameter {number} do not have its shape {tuple(shape)}")
        # Which kernels make the step is a matter of this run's device, not of the checkpoint's.
        kernels = {name: optimizer.defaults[name] for name in ("foreach", "fused")}
        optimizer.load_state_dict({**state, "param_groups": [{**group, **kernels} for group in state["param_groups"]]})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its optimizer does not fit this run's: {str(error).splitlines()[0] if str(error) else 'damaged'}"
        ) from error
