"""Encoders: a sequence of frames of any length becomes one vector.

    TAP        mean                   MAX  maximum
    TSTP       mean and deviation sqrt(v + floor), v the unbiased variance         (x-vectors, Snyder et al., 2018)
    TSDP       the deviation alone
    SAP        sum_t w_t x_t          with w = softmax_t(v . tanh(W x_t + b))      (Cai et al., 2018)
    ASP        the same and sqrt(sum_t w_t x_t^2 - mean^2), the weighted deviation (Okabe et al., 2018)
    ASTP       mean and deviation under w = softmax_t(V tanh(W x_t + b) + c), one weight for each channel and frame
    ASTP-GLOB  the same; W also sees the utterance's mean and deviation            (ECAPA-TDNN, Desplanques et al., 2020)
    MQMHA      channels in heads, each with such weights from its own channels, several times over (Zhao et al., 2021)

`ChannelAttention` gives each channel weights of its own through a bottleneck of 128 with ReLU and norm: SAP and ASP of the
networks that keep bands, where SelfAttention's W would have up to 10^8 entries, and, with `context`, RawNet3's encoder ECA.
Statistics are computed in the precision of the parameters, never in the autocast's.

    build_pooling("ASTP-GLOB", 128)(frames)  # (batch, 128, frames) -> (batch, 256)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spknet.models.features import at_least, full_precision

# Names, and how many outputs each makes of a channel.
POOLINGS = {"SAP": 1, "TAP": 1, "MAX": 1, "ASP": 2, "TSTP": 2, "TSDP": 1, "ASTP": 2, "ASTP-GLOB": 2, "MQMHA": 4}
QUERIES = 2  # of MQMHA: two outputs each


def mean_deviation(x: Tensor, weights: Tensor, low: float, high: float | None = None) -> Tensor:
    """Weighted mean and deviation over time: x (batch, channels, frames) -> (batch, 2 channels).

    Variances are kept in [low, high]: their difference of squares may come out negative.
    """
    mean = (x * weights).sum(dim=2)
    variance = (x.square() * weights).sum(dim=2) - mean.square()
    return torch.cat([mean, variance.clamp(low, high).sqrt()], dim=1)


def deviation(x: Tensor, floor: float) -> Tensor:
    """sqrt(unbiased variance + floor) over time: (batch, channels, frames) -> (batch, channels, 1). Two frames at least.

    A floor of 0 leaves the root's gradient at 0 where the variance is 0, instead of NaN.
    """
    return (x.var(dim=2, keepdim=True) + floor).clamp(min=1e-30).sqrt()


class Mean(nn.Module):
    """TAP: (batch, channels, frames) -> (batch, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=2)


class Maximum(nn.Module):
    """MAX: (batch, channels, frames) -> (batch, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=2)


class Statistics(nn.Module):
    """TSTP, or TSDP without `mean`: (batch, channels, frames) -> (batch, channels [* 2]), the mean first."""

    def __init__(self, mean: bool = True, floor: float = 1e-7):
        super().__init__()
        self.mean, self.floor = mean, floor

    def forward(self, x: Tensor) -> Tensor:
        spread = deviation(x, self.floor)[:, :, 0]
        return torch.cat([x.mean(dim=2), spread], dim=1) if self.mean else spread


class SelfAttention(nn.Module):
    """SAP, or ASP with `deviation`: one weight a frame. (batch, channels, frames) -> (batch, channels [* 2])."""

    def __init__(self, channels: int, deviation: bool):
        super().__init__()
        self.deviation = deviation
        self.linear = nn.Linear(channels, channels)
        self.vector = nn.Parameter(torch.empty(channels, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.vector)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.tanh(self.linear(x.mT)) @ self.vector  # (batch, frames, 1)
        weights = scores.softmax(dim=1).mT
        return mean_deviation(x, weights, 1e-5) if self.deviation else (x * weights).sum(dim=2)


class ChannelAttention(nn.Module):
    """Weights for each channel and frame (`shared`: for each frame), from a bottleneck of 128 channels.

    (batch, channels, frames) -> (batch, channels), with `deviation` (batch, 2 channels). `low`, `high`: limits of variances.
    """

    def __init__(
        self,
        channels: int,
        deviation: bool,
        *,
        context: bool = False,
        shared: bool = False,
        low: float = 1e-5,
        high: float | None = None,
    ):
        super().__init__()
        self.deviation, self.context, self.low, self.high = deviation, context, low, high
        self.squeeze = nn.Conv1d(3 * channels if context else channels, 128, 1)
        self.norm = nn.BatchNorm1d(128)
        self.expand = nn.Conv1d(128, 1 if shared else channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.with_context(x) if self.context else x
        weights = self.expand(self.norm(self.squeeze(seen).relu())).softmax(dim=2)
        return mean_deviation(x, weights, self.low, self.high) if self.deviation else (x * weights).sum(dim=2)

    def with_context(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=2, keepdim=True)
        deviation = variance.clamp(self.low, self.high).sqrt()
        return torch.cat([x, mean.expand_as(x), deviation.expand_as(x)], dim=1)


class AttentiveStatistics(nn.Module):
    """ASTP, with `context` ASTP-GLOB: (batch, channels, frames) -> (batch, 2 channels).

    norm: ReLU and BatchNorm before the tanh. floor: added to the context's variance, and the least variance of the result.
    """

    def __init__(self, channels: int, *, context: bool, bottleneck: int = 128, norm: bool = False, floor: float = 1e-7):
        super().__init__()
        self.context, self.floor = context, floor
        self.linear1 = nn.Conv1d(3 * channels if context else channels, bottleneck, 1)
        self.norm = nn.BatchNorm1d(bottleneck) if norm else None
        self.linear2 = nn.Conv1d(bottleneck, channels, 1)

    def weights(self, seen: Tensor) -> Tensor:
        """What the attention sees -> (batch, channels, frames), before the softmax."""
        hidden = self.linear1(seen)
        if self.norm is not None:
            hidden = self.norm(hidden.relu())
        return self.linear2(hidden.tanh())

    def spread(self, x: Tensor) -> Tensor:
        """The context's deviation: (batch, channels, 1)."""
        return deviation(x, self.floor)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        if self.context:
            seen = torch.cat([x, x.mean(dim=2, keepdim=True).expand_as(x), self.spread(x).expand_as(x)], dim=1)
        return mean_deviation(x, self.weights(seen).softmax(dim=2), self.floor)


class MultiHead(nn.Module):
    """MQMHA: 2 queries of 8 heads with a bottleneck of 64: (batch, channels, frames) -> (batch, 2 * 2 channels).

    A head sees channels / 8 and weighs each of them. For each query: means, then deviations.
    """

    def __init__(self, channels: int, heads: int = 8, bottleneck: int = 64, floor: float = 1e-7):
        super().__init__()
        heads, self.floor = math.gcd(heads, channels), floor
        self.queries = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(channels, heads * bottleneck, 1, groups=heads),
                nn.Tanh(),
                nn.Conv1d(heads * bottleneck, channels, 1, groups=heads),
            )
            for _ in range(QUERIES)
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled = [mean_deviation(x, query(x).softmax(dim=2), self.floor) for query in self.queries]
        return torch.cat(pooled, dim=1)


class Head(nn.Module):
    """Encoder and last layer, in the precision of their parameters: (batch, channels, frames) -> (batch, embedding_size).

    A single frame is doubled where the encoder needs `fewest` = 2: its deviation is then that of the floor.
    """

    def __init__(self, encoder: nn.Module, channels: int, embedding_size: int, fewest: int = 1):
        super().__init__()
        self.encoder, self.fewest = encoder, fewest
        self.fc = nn.Linear(channels, embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        x = at_least(x, self.fewest, dim=2)
        with full_precision(x):
            return self.fc(self.encoder(x.to(self.fc.weight.dtype)))


def build_pooling(encoder: str, channels: int, *, floor: float = 1e-7, per_channel: bool = True) -> nn.Module:
    """The pooling of that name: (batch, channels, frames) -> (batch, channels * POOLINGS[encoder]).

    floor: of variances (SAP and ASP: 1e-5). per_channel: SAP and ASP by ChannelAttention instead of SelfAttention.
    """
    if encoder == "TAP":
        return Mean()
    if encoder == "MAX":
        return Maximum()
    if encoder in ("TSTP", "TSDP"):
        return Statistics(encoder == "TSTP", floor)
    if encoder in ("SAP", "ASP"):
        return (ChannelAttention if per_channel else SelfAttention)(channels, encoder == "ASP")
    if encoder in ("ASTP", "ASTP-GLOB"):
        return AttentiveStatistics(channels, context=encoder == "ASTP-GLOB", floor=floor)
    return MultiHead(channels, floor=floor)


def fewest_frames(encoder: str) -> int:
    """Frames that a pooling needs: two where an unbiased variance is taken, else one."""
    return 2 if encoder in ("TSTP", "TSDP", "ASTP-GLOB") else 1


def build_head(encoder: str, channels: int, embedding_size: int, *, per_channel: bool = False) -> Head:
    """The head of a convolutional network of 2020; `per_channel` as in build_pooling."""
    pool = build_pooling(encoder, channels, per_channel=per_channel)
    return Head(pool, POOLINGS[encoder] * channels, embedding_size, fewest_frames(encoder))
