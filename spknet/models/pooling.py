"""Encoders: a sequence of frames of any length becomes one vector.

    TAP  mean                         MAX  maximum
    SAP  sum_t w_t x_t                with w = softmax_t(v . tanh(W x_t + b))      (Cai et al., 2018)
    ASP  the same and sqrt(sum_t w_t x_t^2 - mean^2), the weighted deviation       (Okabe et al., 2018)

`ChannelAttention` gives each channel weights of its own through a bottleneck of 128 (the attention of ResNetSE34V2), and,
with `context`, lets them depend on the mean and deviation of the whole utterance (ECAPA-TDNN, Desplanques et al., 2020;
RawNet3's encoder ECA). Statistics are computed in the precision of the parameters, never in the autocast's.

    SelfAttention(128, deviation=True)(frames)  # (batch, 128, frames) -> (batch, 256)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mean_deviation(x: Tensor, weights: Tensor, low: float, high: float | None = None) -> Tensor:
    """Weighted mean and deviation over time: x (batch, channels, frames) -> (batch, 2 channels).

    Variances are kept in [low, high]: their difference of squares may come out negative.
    """
    mean = (x * weights).sum(dim=2)
    variance = (x.square() * weights).sum(dim=2) - mean.square()
    return torch.cat([mean, variance.clamp(low, high).sqrt()], dim=1)


class Mean(nn.Module):
    """TAP: (batch, channels, frames) -> (batch, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=2)


class Maximum(nn.Module):
    """MAX: (batch, channels, frames) -> (batch, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=2)


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


class Head(nn.Module):
    """Encoder and last layer, in the precision of their parameters: (batch, channels, frames) -> (batch, embedding_size)."""

    def __init__(self, encoder: nn.Module, channels: int, embedding_size: int):
        super().__init__()
        self.encoder = encoder
        self.fc = nn.Linear(channels, embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.fc(self.encoder(x.to(self.fc.weight.dtype)))


def build_head(encoder: str, channels: int, embedding_size: int, *, per_channel: bool = False) -> Head:
    """The head of a convolutional network; `per_channel`: attention by ChannelAttention instead of SelfAttention."""
    deviation = encoder == "ASP"
    if encoder in ("TAP", "MAX"):
        pool = Mean() if encoder == "TAP" else Maximum()
    elif per_channel:
        pool = ChannelAttention(channels, deviation)
    else:
        pool = SelfAttention(channels, deviation)
    return Head(pool, 2 * channels if deviation else channels, embedding_size)
