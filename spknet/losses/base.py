"""What every loss shares: the form of a call, full precision under autocast, the check of M.

    value, accuracy = loss(embeddings, labels, draws)

embeddings (speakers, M, D) of this rank, labels (speakers,) int64, draws (speakers, 2) float64 in [0, 1): the only
randomness. `value` is L_r of spknet.parallel.gather: its mean over ranks is the loss of the global batch. `accuracy` is in percent
of the rank's own rows.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spknet.config import LossConfig


class Loss(nn.Module, ABC):
    """Subclasses define `compute(x, labels, draws)`; `fewest` and `most` bound M, the utterances of a speaker.

    `margin`, `step` (the global one) and `classes` (of the whole batch, on the host) are set before each step; `clamp_` is
    called after each optimizer step.
    """

    fewest = 1
    most: int | None = None

    def __init__(self, config: LossConfig):
        super().__init__()
        self.margin, self.step = float(config.margin), 0
        self.classes: np.ndarray | None = None

    def forward(self, embeddings: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(embeddings.device.type, enabled=False):
            x = embeddings if embeddings.dtype.itemsize >= 4 else embeddings.float()
            return self.compute(x, labels, draws)

    @abstractmethod
    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """(value, accuracy), as above; x is in float32 or float64."""

    def shards(self) -> list[nn.Parameter]:
        """Parameters that this rank alone has (spknet.losses.sharded): not among parameters(), whose gradients are averaged."""
        return []

    @contextlib.contextmanager
    def updating(self, optimizer: torch.optim.Optimizer):
        """Around the optimizer's step, gradient clipping included: yields the shards that this step moves."""
        yield self.shards()

    def squared_gradient(self) -> Tensor | None:
        """Sum of squares of the gradients of all ranks' shards, the same on every rank; None where there are none."""
        return None

    def clamp_(self) -> None:
        """Puts parameters back into their range."""


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over rows, and how many rows are right in percent: logits (rows, classes), targets (rows,)."""
    accuracy = 100 * (logits.detach().argmax(dim=1) == targets).double().mean()
    return F.cross_entropy(logits, targets), accuracy
