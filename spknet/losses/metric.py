"""Losses that compare the utterances of a batch, over the speakers of all ranks.

    proto        logits = -|q_i - p_j|^2        query q = utterance 0, prototype p = mean of the others  (Snell et al., 2017)
    angleproto   logits = w cos(q_i, p_j) + b   w = 10, b = -5 at first                                (Chung et al., 2020)
    ge2e         logits = w cos(x_im, c_j) + b  c = mean of all, of a speaker's own without x_im         (Wan et al., 2018)
    triplet      mean max(0, |a - p|^2 - |a - n|^2 + m)
    contrastive  mean over pairs of |a - p|^2 and max(0, m - |a - n|)^2
    supcon       logits = cos(x_a, x_j) / temperature over all other utterances j; mean over the speaker's own of the
                 cross entropies: supervised contrastive loss, "out" form                              (Khosla et al., 2020)

A row block scores this rank's anchors against the columns of every rank (spknet.parallel.gather). triplet and contrastive
length-normalise; the anchor is utterance 0, the positive utterance 1, the negative n another speaker's utterance 1, mined in
the global batch: with probability hard_prob one of the hard_rank + 1 nearest, else any other; hard_rank < 0: one of those
farther than the positive by less than the margin ("semi-hard", Schroff et al., 2015). Distances are |a - b + 1e-6|, as in
torch's pairwise_distance.

    loss = AngularPrototypical(LossConfig())
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spknet.config import LossConfig
from spknet.losses.base import Loss, cross_entropy
from spknet.losses.classification import Softmax
from spknet.parallel import gather

EPS = 1e-6


def own_columns(x: Tensor) -> Tensor:
    """Where this rank's speakers stand among those of all ranks: (speakers,) int64."""
    return gather.rank() * x.shape[0] + torch.arange(x.shape[0], device=x.device)


class Metric(Loss):
    """A loss over N speakers x M utterances; `normalize_embeddings` length-normalises them first."""

    fewest = 2

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.normalize = config.normalize_embeddings

    def prepared(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=2) if self.normalize else x


class Prototypical(Metric):
    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        x = self.prepared(x)
        prototypes = gather.gather_rows(x[:, 1:].mean(dim=1))
        distances = torch.cdist(x[:, 0] + EPS, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
        return cross_entropy(-distances.square(), own_columns(x))


class CosineMetric(Metric):
    """Logits w cos + b with learned w > 0 and b."""

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.w = nn.Parameter(torch.empty(()))
        self.b = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.w, 10.0)
        nn.init.constant_(self.b, -5.0)

    @torch.no_grad()
    def clamp_(self) -> None:
        self.w.clamp_(min=1e-6)


class AngularPrototypical(CosineMetric):
    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        x = self.prepared(x)
        prototypes = gather.gather_rows(F.normalize(x[:, 1:].mean(dim=1), dim=1))
        cosines = F.normalize(x[:, 0], dim=1) @ prototypes.T  # (speakers, speakers of all ranks)
        return cross_entropy(self.w * cosines + self.b, own_columns(x))


class GE2E(CosineMetric):
    """Generalised end-to-end loss; `cosine_floor` clips cosines from below, which stops their gradient."""

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.floor = config.cosine_floor

    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        x = self.prepared(x)
        speakers, m, _ = x.shape
        total = x.sum(dim=1, keepdim=True)
        centroids = gather.gather_rows(F.normalize(total[:, 0], dim=1))
        x_hat = F.normalize(x, dim=2)
        cosines = x_hat @ centroids.T  # (speakers, M, speakers of all ranks)
        own = (x_hat * F.normalize(total - x, dim=2)).sum(dim=2, keepdim=True)
        columns = own_columns(x)
        cosines = cosines.scatter(2, columns[:, None, None].expand(-1, m, 1), own)
        if self.floor is not None:
            cosines = cosines.clamp(min=self.floor)
        logits = (self.w * cosines + self.b).flatten(0, 1)
        return cross_entropy(logits, columns.repeat_interleave(m))


class Mined(Loss):
    """Anchor, positive and mined negative of each speaker. With no negative to be had, a speaker has no such pair."""

    fewest = most = 2

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.hard_rank, self.hard_prob = config.hard_rank, config.hard_prob
        self.skip = config.semi_hard_fallback == "skip"

    def pairs(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distances to the positive and to the negative, and whether there is a negative: each (speakers,)."""
        x = F.normalize(x, dim=2)
        candidates = gather.gather_rows(x[:, 1])
        other = labels[:, None] != gather.gather_rows(labels)
        with torch.no_grad():
            distances = torch.cdist(x[:, 0] + EPS, candidates, compute_mode="donot_use_mm_for_euclid_dist")
            chosen, found = self.mine(distances, own_columns(x), other, draws)
        positive = (x[:, 0] - x[:, 1] + EPS).norm(dim=1)
        negative = (x[:, 0] - candidates[chosen] + EPS).norm(dim=1)
        return positive, negative, found

    def mine(self, distances: Tensor, own: Tensor, other: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the negatives and whether there is one: distances, other (speakers, all speakers), own (speakers,)."""
        allowed = other
        if self.hard_rank < 0:
            positive = distances.gather(1, own[:, None])
            allowed = other & (distances > positive) & (distances < positive + self.margin)
            if not self.skip:
                allowed = torch.where(allowed.any(dim=1, keepdim=True), allowed, other)
        nearest = distances.masked_fill(~allowed, torch.inf).argsort(dim=1, stable=True)
        count = allowed.sum(dim=1)
        choices = count
        if self.hard_rank >= 0:
            choices = torch.where(draws[:, 0] < self.hard_prob, count.clamp(max=self.hard_rank + 1), count)
        place = (draws[:, 1] * choices).long()  # below choices: a draw is below 1 by at least 2^-53
        return nearest.gather(1, place[:, None])[:, 0], count > 0

    def global_mean(self, total: Tensor, count: Tensor) -> Tensor:
        """L_r whose mean over ranks is the mean over all ranks' terms."""
        return gather.world_size() * total / gather.all_reduce_sum(count).clamp(min=1)


class Triplet(Mined):
    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative, found = self.pairs(x, labels, draws)
        terms = (positive.square() - negative.square() + self.margin).relu() * found
        accuracy = 100 * (positive < negative).double().mean()
        return self.global_mean(terms.sum(), found.sum()), accuracy


class Contrastive(Mined):
    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative, found = self.pairs(x, labels, draws)
        apart = (self.margin - negative).relu().square() * found
        accuracy = 100 * (positive < negative).double().mean()
        count = found.sum() + positive.shape[0]
        return self.global_mean(positive.square().sum() + apart.sum(), count), accuracy


class SupervisedContrastive(Loss):
    """Every utterance against all others of the global batch; those of its speaker (of equal labels) are right."""

    fewest = 2

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.temperature = config.temperature

    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        own = F.normalize(x, dim=2)
        every, m = gather.gather_rows(own).flatten(0, 1), x.shape[1]
        label = labels.repeat_interleave(m)
        same = label[:, None] == gather.gather_rows(labels).repeat_interleave(m)
        itself = torch.arange(len(every), device=x.device) == own_columns(label)[:, None]
        logits = (own.flatten(0, 1) @ every.T / self.temperature).masked_fill(itself, -torch.inf)  # (rows, all rows)
        positive = same & ~itself
        log_p = torch.where(positive, logits.log_softmax(dim=1), 0)
        right = positive.gather(1, logits.argmax(dim=1, keepdim=True))
        return -(log_p.sum(dim=1) / positive.sum(dim=1)).mean(), 100 * right.double().mean()


class SoftmaxPrototypical(Metric):
    """softmax over all utterances plus angleproto; the accuracy is softmax's."""

    def __init__(self, config: LossConfig, embedding_size: int, n_classes: int):
        super().__init__(config)
        self.softmax = Softmax(config, embedding_size, n_classes)
        self.angleproto = AngularPrototypical(config)

    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        value, accuracy = self.softmax.compute(x, labels, draws)
        return value + self.angleproto.compute(x, labels, draws)[0], accuracy

    def clamp_(self) -> None:
        self.angleproto.clamp_()
