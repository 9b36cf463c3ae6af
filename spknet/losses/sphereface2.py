"""SphereFace2: a yes or no for every class, instead of one choice among all (Wen et al., 2022, arXiv 2108.01513).

    g(z) = 2 ((z + 1) / 2)^t - 1
    type C   p = s (g(cos theta_j) - m) + b for the right class,  n = s (g(cos theta_j) + m) + b for every other
    type A   p = s g(cos(theta_j + m)) + b,                       n = s g(cos(theta_j - m)) + b
    loss of an utterance = lambda softplus(-p) + (1 - lambda) sum over the others of softplus(n)

b is one number, 0 at first. There is no normaliser over the classes, so pieces of a head need nothing from each other but
their sums. WeSpeaker's code, and ReDimNet2's recipes with it (type C, t 3, lambda 0.7, s 32, m 0.2); it writes log(1 + exp),
we softplus, which does not overflow. The logits, for the accuracy alone, are s (cos theta_j - m [j = label]).

    loss = SphereFace2(LossConfig(margin=0.2, scale=32), embedding_size=192, n_classes=17982)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spknet.config import LossConfig
from spknet.losses.classification import Classifier, angular_margin, at_targets, cosines_of, sine_of


class SphereFace2(Classifier):
    """`offset` is b. `terms` is what a piece of the head adds to the loss of each utterance."""

    def __init__(self, config: LossConfig, embedding_size: int, n_classes: int | None):
        super().__init__(config, embedding_size, n_classes)
        self.scale, self.curve, self.positive = float(config.scale), config.curve, config.positive_weight
        self.on_angle = config.margin_type == "A"
        self.offset = nn.Parameter(torch.zeros(()))
        self.allocate()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.offset)

    def curved(self, cosine: Tensor) -> Tensor:
        if not float(self.curve).is_integer():  # a power of a negative number is NaN then
            cosine = cosine.clamp(min=-1)
        return 2 * ((cosine + 1) / 2) ** self.curve - 1

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, hardest=None) -> Tensor:
        cosines = cosines_of(x, weight)
        return self.scale * at_targets(cosines, targets, lambda cosine: cosine - self.margin)

    def terms(self, x: Tensor, weight: Tensor, offset: Tensor, targets: Tensor) -> Tensor:
        """(rows,) sums over the classes whose weights are given; arguments as of `logits`, offset: b."""
        cosines, m = cosines_of(x, weight), self.margin

        def right(cosine: Tensor) -> Tensor:
            z = self.curved(angular_margin(cosine, m, True)) if self.on_angle else self.curved(cosine) - m
            return self.positive * F.softplus(-(self.scale * z + offset))

        def other(cosine: Tensor) -> Tensor:
            if self.on_angle:
                z = self.curved(cosine * math.cos(m) + sine_of(cosine) * math.sin(m))
            else:
                z = self.curved(cosine) + m
            return (1 - self.positive) * F.softplus(self.scale * z + offset)

        columns = targets.clamp(min=0)[:, None]
        old = cosines.gather(1, columns)
        every = other(cosines)
        return every.scatter(1, columns, torch.where(targets[:, None] >= 0, right(old), other(old))).sum(dim=1)

    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        x, targets = x.flatten(0, 1), labels.repeat_interleave(x.shape[1])
        with torch.no_grad():
            right = self.logits(x, self.weight, None, targets).argmax(dim=1) == targets
        return self.terms(x, self.weight, self.offset, targets).mean(), 100 * right.double().mean()
