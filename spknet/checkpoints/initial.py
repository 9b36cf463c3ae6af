"""A run that starts from the weights of a checkpoint: train.initial_model.

It takes whatever spknet.checkpoints.network.load_network reads. The network of the run must be that of the file; what another
project's file holds is recognised, so a message can say the options. Of a head, rows are kept of the speakers that the file
names; other projects' files name none.

    notes = load_initial(task, "runs/a", corpus)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spknet.checkpoints import file as checkpoint
from spknet.checkpoints import imports, voxceleb_trainer
from spknet.checkpoints import pieces as head
from spknet.checkpoints.averages import with_averages
from spknet.checkpoints.file import CheckpointError
from spknet.checkpoints.head_rows import kept, load_head_by_speaker
from spknet.checkpoints.network import recognize
from spknet.checkpoints.portable import read
from spknet.checkpoints.voxceleb_trainer import Misfit, load_fitting, same_kind
from spknet.losses.classification import Classifier
from spknet.losses.sharded import Sharded


def load_initial(task, path: str, corpus, allow_partial: bool = False, weights: str = "averaged") -> list[str]:
    """Starts a run from the weights of a run folder or of a checkpoint file, ours or another project's.

    weights: "averaged", where the checkpoint has averages, or "trained". task: has `model` and `loss`; corpus: its `utterances`
    name the speakers, so that a head of spknet finds its rows. Returns notes; raises CheckpointError where the network does not
    fit.
    """
    if Path(path).is_dir() and checkpoint.steps(path):
        path, state = checkpoint.newest(path, warn=print)
    else:
        path = imports.file_in(Path(path)) if Path(path).is_dir() else path
        state = read(path)
    start = f"starting from the weights of {path}"
    if checkpoint.is_ours(state):
        state = with_averages(_checked(state, path), weights)
        return [start, *_from_ours(task, str(path), state, corpus, allow_partial)]
    if (found := recognize(state, path)) is None:
        return [start, *voxceleb_trainer.load_into(task.model, task.loss, state, allow_partial)]
    theirs = imports.build(found, path)
    _check_rate(task, path, found.sample_rate, allow_partial)
    notes = [f"recognised as {found.what}", *found.notes, "head: every row begins anew"]
    if not _sees_the_same(task.model, theirs):
        notes.append(
            f"warning: it was trained on other features than this run's; its own are {imports.options_of(found)}"
        )
    return [start, *notes, *_fill(task.model, theirs.state_dict(), allow_partial, imports.options_of(found))]


def _checked(state: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """One of our checkpoints, or a file to hand on, which has no head."""
    if "provenance" in state:
        state = state | {"loss": {}, "speakers": [], "labels": []}
    if not isinstance(state.get("model"), dict) or not isinstance(state.get("loss"), dict):
        raise CheckpointError(f"{path} lacks the weights of its network or loss; give another checkpoint")
    return state


def _from_ours(task, path: str, state: dict[str, Any], corpus, allow_partial: bool) -> list[str]:
    _check_rate(task, path, checkpoint.sample_rate(state), allow_partial)
    notes = _fill(task.model, state["model"], allow_partial)
    speakers, labels = [str(name) for name in corpus.utterances.speakers], corpus.utterances.labels
    ours = (speakers, labels, corpus.classes_per_speaker)
    if isinstance(task.loss, Sharded) or ("head" in state and isinstance(task.loss, Classifier)):
        head.initialize(task.loss, path, state, *ours)
    else:
        task.loss.load_state_dict(load_head_by_speaker(task.loss, state, *ours))
    has_rows = isinstance(task.loss, Sharded) or any(value.dim() for value in task.loss.state_dict().values())
    return [*notes, *([kept(task.loss, state, speakers)] if has_rows else [])]


def _check_rate(task, path: str | Path, rate: int, allow_partial: bool) -> None:
    if rate != task.model.sample_rate and not allow_partial:
        raise CheckpointError(
            f"{path} is of a network for {rate} Hz, the training data have {task.model.sample_rate} Hz; give another checkpoint,"
            " or --train.allow_partial true to start from its weights nonetheless"
        )


def _fill(model, theirs: dict[str, Any], allow_partial: bool, options: str = "") -> list[str]:
    own = model.state_dict()
    fitting = {
        key: value
        for key, value in theirs.items()
        if key in own and same_kind(value, own[key]) and value.shape == own[key].shape
    }
    misfit = Misfit(
        [key for key in own if key not in theirs],
        [key for key in theirs if key not in own],
        [key for key in theirs if key in own and key not in fitting],
    )
    return load_fitting(model, fitting, misfit, "network", allow_partial, options)


def _sees_the_same(model, theirs) -> bool:
    """Whether two networks have the same variant and front end, down to its settings."""
    ours, others = (
        (
            getattr(m, "variant", None),
            type(m.features),
            {k: v for k, v in vars(m.features).items() if k != "training" and isinstance(v, (int, float, str, bool))},
        )
        for m in (model, theirs)
    )
    return ours == others
