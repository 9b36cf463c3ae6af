"""Losses that know every training speaker: a weight vector for each class, or several, compared with all of them.

    softmax      logits = W x + b
    amsoftmax    logits = s (cos theta_j - m [j = label])                                            (Wang et al., 2018)
    aamsoftmax   logits = s cos(theta_j + m [j = label])                                             (Deng et al., 2019)

Where theta + m > pi, aamsoftmax takes cos theta - m sin m (2020's code and SpeechBrain: it jumps there), or with
beyond_pi=continuous cos theta - (1 - cos m) (WeSpeaker, 3D-Speaker). Sub-centres (Deng et al., 2020): a class has K rows,
class K + k, and the largest cosine counts. Inter-top-k (Zhao et al., 2022): the k other classes with the largest cosines get
cos(theta_j - p), p = top_k_margin (m / 0.2) radians, from m > 0.001 on.

Rows are utterances: all M of each speaker. Class weights are (classes K, D), row = label K + k, in every loss. Cosines are
taken as they come, a little above 1 at times; every root and power below is of a clamped value, so that none gives NaN.

    loss = AMSoftmax(LossConfig(margin=0.3, scale=30), embedding_size=512, n_classes=5994)
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spknet.config import LossConfig
from spknet.losses.base import Loss, cross_entropy


class Classifier(Loss):
    """A head: `weight` (classes K, D) and, where `biased`, `bias` (classes,).

    `logits` reads no weights but those it is given, so that it scores a piece of the classes as well. With n_classes None
    there are none here: spknet.losses.sharded keeps them in pieces.
    """

    biased = False

    def __init__(self, config: LossConfig, embedding_size: int, n_classes: int | None):
        super().__init__(config)
        self.centers = 1
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.shape = (n_classes, embedding_size)

    def allocate(self) -> None:
        """Makes the weights: called at the end of a subclass's __init__."""
        classes, size = self.shape
        if classes is None:
            return
        self.weight = nn.Parameter(torch.empty(classes * self.centers, size))
        if self.biased:
            self.bias = nn.Parameter(torch.empty(classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.xavier_normal_(self.weight)

    def spread(self, rows: int, size: int) -> float:
        """Standard deviation of the initial weights of a head with so many rows."""
        return math.sqrt(2 / (rows + size))

    @abstractmethod
    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, hardest=None) -> Tensor:
        """Logits of the classes whose weights are given, (rows, classes).

        x (rows, D); targets (rows,): column of the right class, -1 where it is not among these; hardest (rows, k): columns
        that are penalised, -1 for none; None: found here.
        """

    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        targets = labels.repeat_interleave(x.shape[1])
        return cross_entropy(self.logits(x.flatten(0, 1), self.weight, self.bias, targets), targets)


class Softmax(Classifier):
    """Linear layer and cross entropy."""

    biased = True

    def __init__(self, config: LossConfig, embedding_size: int, n_classes: int | None):
        super().__init__(config, embedding_size, n_classes)
        self.allocate()

    def reset_parameters(self) -> None:
        if self.weight is None:
            return
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def spread(self, rows: int, size: int) -> float:
        return 1 / math.sqrt(3 * size)

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, hardest=None) -> Tensor:
        return F.linear(x, weight, bias)


def cosines_of(x: Tensor, weight: Tensor, centers: int = 1) -> Tensor:
    """(rows, classes) cosines of x (rows, D) with weight (classes * centers, D), of a class's centres the largest."""
    cosines = F.linear(F.normalize(x, dim=1), F.normalize(weight, dim=1))
    return cosines if centers == 1 else cosines.unflatten(1, (-1, centers)).max(dim=2).values


def sine_of(cosine: Tensor) -> Tensor:
    return (1 - cosine.square()).clamp(min=1e-9).sqrt()  # not 0, where the root has no gradient


def at_targets(scores: Tensor, targets: Tensor, change) -> Tensor:
    """scores (rows, classes) with change(score) at each row's target (rows,); a target of -1 is none."""
    columns = targets.clamp(min=0)[:, None]
    old = scores.gather(1, columns)
    return scores.scatter(1, columns, torch.where(targets[:, None] >= 0, change(old), old))


class MarginSoftmax(Classifier):
    """Scaled cosines with a margin on the class that is right: `with_margin` says which."""

    def __init__(self, config: LossConfig, embedding_size: int, n_classes: int | None):
        super().__init__(config, embedding_size, n_classes)
        self.scale, self.centers = float(config.scale), config.sub_centers
        self.top_k, self.top_k_margin = config.top_k, config.top_k_margin
        self.allocate()

    @abstractmethod
    def with_margin(self, cosine: Tensor) -> Tensor:
        """The cosines with the right class, any shape, made harder by the margin."""

    @property
    def penalises(self) -> bool:
        """Whether the hardest other classes are made harder at this margin."""
        return self.top_k > 0 and self.margin > 0.001

    def penalised(self, cosine: Tensor) -> Tensor:
        """cos(theta - p) of cosines with hardest other classes."""
        p = self.top_k_margin * self.margin / 0.2
        return cosine * math.cos(p) + sine_of(cosine) * math.sin(p)

    def with_penalties(self, cosines: Tensor, hardest: Tensor) -> Tensor:
        """Cosines (rows, classes) with those of the hardest others (rows, k), -1 for none, made harder.

        Without a list of what is there, whose length the host would have to wait for: a -1 repeats another entry of its row, or
        where there is none writes back what column 0 has, and only one entry of those that write a value carries its gradient.
        """
        last = hardest.amax(dim=1, keepdim=True)
        none = last < 0
        carries = (hardest >= 0) | (none & (torch.arange(hardest.shape[1], device=hardest.device) == 0))
        columns = torch.where(hardest >= 0, hardest, last.clamp(min=0))
        old = cosines.gather(1, columns)
        new = torch.where(none, old, self.penalised(old))
        return cosines.scatter(1, columns, torch.where(carries, new, new.detach()))

    def others(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Cosines with the right class left out (-2), (rows, classes): what the hardest are chosen from."""
        return at_targets(cosines_of(x, weight, self.centers), targets, lambda old: torch.full_like(old, -2))

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, hardest=None) -> Tensor:
        cosines = cosines_of(x, weight, self.centers)
        if self.penalises:
            if hardest is None:
                with torch.no_grad():
                    left = self.others(x, weight, targets)
                    hardest = left.topk(min(self.top_k, left.shape[1] - 1), dim=1).indices
            cosines = self.with_penalties(cosines, hardest)
        return self.scale * at_targets(cosines, targets, self.with_margin)


class AMSoftmax(MarginSoftmax):
    """Additive margin: cos theta - m."""

    def with_margin(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin


class AAMSoftmax(MarginSoftmax):
    """Additive angular margin: cos(theta + m), continued linearly where theta + m exceeds pi."""

    def __init__(self, config: LossConfig, embedding_size: int, n_classes: int | None):
        self.continuous = config.beyond_pi == "continuous"
        super().__init__(config, embedding_size, n_classes)

    def with_margin(self, cosine: Tensor) -> Tensor:
        return angular_margin(cosine, self.margin, self.continuous)


def angular_margin(cosine: Tensor, m: float, continuous: bool) -> Tensor:
    """cos(theta + m) of cosines, any shape; beyond pi as said at the top."""
    turned = cosine * math.cos(m) - sine_of(cosine) * math.sin(m)
    beyond = cosine - (1 - math.cos(m)) if continuous else cosine - m * math.sin(m)
    return torch.where(cosine > -math.cos(m), turned, beyond)
