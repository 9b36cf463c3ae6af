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


def load_head_by_speaker(
    loss: torch.nn.Module, state: dict[str, Any], speakers: list[str], labels, speeds: int = 1
) -> dict[str, torch.Tensor]:
    """The checkpoint's loss parameters with the rows of a classification head moved to where this run's speakers are.

    speakers, labels: of this run, in the same order; speeds: classes a speaker has in this run's head.
    """
    old = from_dict(state["config"]) if "config" in state else Config()
    old_labels, new_labels = dict(zip(state["speakers"], state["labels"])), dict(zip(speakers, map(int, labels)))
    theirs = Layout(max(old_labels.values(), default=-1) + 1, classes_per_speaker(old.augment), old.loss.sub_centers)
    ours = Layout(max(new_labels.values(), default=-1) + 1, speeds, centers(loss))
    known = [name for name in new_labels if name in old_labels]
    pairs = (np.array([old_labels[name] for name in known], int), np.array([new_labels[name] for name in known], int))
    return {
        name: _moved(value, state["loss"].get(name), theirs, ours, pairs) for name, value in loss.state_dict().items()
    }


class Layout:
    """How a head's rows are laid out."""

    def __init__(self, n_labels: int, speeds: int, centers: int):
        self.n_labels, self.speeds, self.centers = n_labels, speeds, centers

    def rows(self, labels: np.ndarray, speeds: int, centers: int) -> np.ndarray:
        """Rows of these labels for the first `speeds` speeds, (speeds * labels * centers,)."""
        classes = labels[None, :] + self.n_labels * np.arange(speeds)[:, None]
        return (classes[..., None] * centers + np.arange(centers)).reshape(-1)


def centers(loss: torch.nn.Module) -> int:
    """Sub-centres of a class in a loss."""
    return max((part.centers for part in loss.modules() if hasattr(part, "centers")), default=1)


def _moved(value, old, theirs: Layout, ours: Layout, pairs) -> torch.Tensor:
    if old is None or old.dim() != value.dim() or old.shape[1:] != value.shape[1:]:
        return value
    if value.dim() == 0:
        return old
    old_k, new_k = (theirs.centers, ours.centers) if value.dim() > 1 else (1, 1)  # a bias has one value a class
    fits = old_k == new_k and len(old) >= theirs.n_labels * theirs.speeds * old_k
    if not fits or len(value) < ours.n_labels * ours.speeds * new_k:
        return value
    speeds, moved = min(theirs.speeds, ours.speeds), value.clone()
    moved[ours.rows(pairs[1], speeds, new_k)] = old[theirs.rows(pairs[0], speeds, old_k)].to(moved)
    return moved


def kept(state: dict[str, Any], speakers: list[str]) -> str:
    """What became of the head, in words."""
    known = len(set(state["speakers"]) & set(speakers))
    return f"head: rows of {known} speakers kept, those of {len(speakers) - known} begin anew"
