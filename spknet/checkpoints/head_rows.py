"""A classification head that goes on with other speakers: rows found by the speakers' names.

Rows of a head, D columns each, are ordered by class, K sub-centres side by side:

    row of centre k of speaker s at speed i = (label(s) + S i) K + k        S = labels of the data, i = 0 is speed 1

Speakers that both runs know keep their rows, at each speed that both heads have; other rows keep their initial values and
must be trained. Rows beyond the last label (loss.n_classes) belong to nobody.

    loss.load_state_dict(load_head_by_speaker(loss, state, speakers, labels))
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from spknet.config import Config, from_dict
from spknet.data.augment import classes_per_speaker
from spknet.losses.sampled import rows_of
from spknet.losses.sharded import Sharded


def load_head_by_speaker(
    loss: torch.nn.Module, state: dict[str, Any], speakers: list[str], labels, speeds: int = 1
) -> dict[str, torch.Tensor]:
    """The checkpoint's loss parameters with the rows of a whole head moved to where this run's speakers are.

    speakers, labels: of this run, in the same order; speeds: classes a speaker has in this run's head.
    """
    fresh = loss.state_dict()
    if misfit(loss, state):
        return fresh
    pairs = [torch.from_numpy(classes) for classes in same_classes(state, speakers, labels, speeds)]
    return {name: _moved(value, state["loss"].get(name), centers(loss), pairs) for name, value in fresh.items()}


def same_classes(state: dict[str, Any], speakers: list[str], labels, speeds: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes of speakers that both know, at the speeds that both have: (classes,) in the checkpoint, and here."""
    theirs = dict(zip(state["speakers"], map(int, state["labels"])))
    ours = dict(zip(speakers, map(int, labels)))
    known = [name for name in ours if name in theirs]
    speed = np.arange(min(speeds, classes_per_speaker(_config(state).augment)))[:, None]
    both = ((np.array([of[name] for name in known], int), max(of.values(), default=-1) + 1) for of in (theirs, ours))
    there, here = ((label + count * speed).reshape(-1) for label, count in both)
    return there, here


def kept(loss: torch.nn.Module, state: dict[str, Any], speakers: list[str]) -> str:
    """What became of the head, in words."""
    why = misfit(loss, state)
    if why:
        return f"head: every row begins anew: {why}"
    known = len(set(state["speakers"]) & set(speakers))
    return f"head: rows of {known} speakers kept, those of {len(speakers) - known} begin anew"


def misfit(loss: torch.nn.Module, state: dict[str, Any]) -> str:
    """Why no row of a checkpoint's head can be one of this head; empty where rows can."""
    ours, theirs = centers(loss), _centers_there(state)
    if isinstance(loss, Sharded):
        same = "head" in state or "weight" in state["loss"]
    else:
        rows = [name for name, value in loss.state_dict().items() if value.dim()]
        same = not rows or ("head" in state and "weight" in rows) or any(name in state["loss"] for name in rows)
    if not same:
        return f"the checkpoint's loss, {_config(state).loss.name}, has none of its rows"
    if ours != theirs:
        return f"the checkpoint has {theirs} rows a class (loss.sub_centers), this run {ours}"
    return ""


def centers(loss: torch.nn.Module) -> int:
    """Sub-centres of a class in a loss."""
    return max((part.centers for part in loss.modules() if hasattr(part, "centers")), default=1)


def _centers_there(state: dict[str, Any]) -> int:
    if "head" in state:
        return state["head"]["per_class"]
    loss = _config(state).loss
    return loss.sub_centers if loss.name in ("amsoftmax", "aamsoftmax") else 1


def _config(state: dict[str, Any]) -> Config:
    return from_dict(state["config"]) if "config" in state else Config()


def _moved(value, old, each: int, pairs) -> torch.Tensor:
    if old is None or old.dim() != value.dim() or old.shape[1:] != value.shape[1:]:
        return value
    if value.dim() == 0:
        return old
    each = each if value.dim() > 1 else 1  # a bias has one value a class
    there, here = (rows_of(classes, each) for classes in pairs)
    moved = value.clone()
    moved[here] = old[there].to(moved)
    return moved
