"""Losses that know every training speaker: one weight vector a class, cross entropy over all classes.

    softmax      logits = W x + b
    amsoftmax    logits = s (cos theta_j - m [j = label])                                  (Wang et al., 2018)
    aamsoftmax   logits = s cos(theta_j + m [j = label]), and cos theta - m sin m where theta + m > pi   (Deng et al., 2019)

Rows are utterances: all M of each speaker. Class weights are (classes, D), row = label, in every loss.

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


class Softmax(Loss):
    """Linear layer and cross entropy."""

    def __init__(self, config: LossConfig, embedding_size: int, n_classes: int):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(n_classes, embedding_size))
        self.bias = nn.Parameter(torch.empty(n_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        targets = labels.repeat_interleave(x.shape[1])
        return cross_entropy(F.linear(x.flatten(0, 1), self.weight, self.bias), targets)


class MarginSoftmax(Loss):
    """Scaled cosines with a margin on the class that is right: `with_margin` says which."""

    def __init__(self, config: LossConfig, embedding_size: int, n_classes: int):
        super().__init__(config)
        self.scale = float(config.scale)
        self.weight = nn.Parameter(torch.empty(n_classes, embedding_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.weight)

    @abstractmethod
    def with_margin(self, cosine: Tensor) -> Tensor:
        """The cosines with the right class, any shape, made harder by the margin."""

    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        targets = labels.repeat_interleave(x.shape[1])[:, None]
        cosines = F.linear(F.normalize(x.flatten(0, 1), dim=1), F.normalize(self.weight, dim=1))  # (rows, classes)
        cosines = cosines.scatter(1, targets, self.with_margin(cosines.gather(1, targets)))
        return cross_entropy(self.scale * cosines, targets[:, 0])


class AMSoftmax(MarginSoftmax):
    """Additive margin: cos theta - m."""

    def with_margin(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin


class AAMSoftmax(MarginSoftmax):
    """Additive angular margin: cos(theta + m), continued linearly where theta + m exceeds pi."""

    def with_margin(self, cosine: Tensor) -> Tensor:
        sine = (1 - cosine.square()).clamp(min=1e-9).sqrt()  # not 0, where the root has no gradient
        turned = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        return torch.where(cosine > -math.cos(self.margin), turned, cosine - self.margin * math.sin(self.margin))
