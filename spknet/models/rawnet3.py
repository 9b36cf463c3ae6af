"""RawNet3: learned band-pass filters on the wave, a Res2Net trunk, attentive statistics (Jung et al., 2022).

    pre-emphasis -> instance norm (learned scale) -> log |band-pass| - mean -> three Res2 blocks -> 1x1 -> encoder -> norm -> fc

The filters are sinc band-passes with learned edges (SincNet, Ravanelli and Bengio, 2018) in cosine and sine pairs (parametric
analytic, Pariente et al., 2020): with t in seconds and a Hamming window w over 251 taps,

    cos: w(t) (sin 2 pi h t - sin 2 pi l t) / (pi t) / (2 (h - l))     sin: w(t) (cos 2 pi l t - cos 2 pi h t) / (pi t) / (2 (h - l))

They are part of the network: computed in the precision of their parameters, with gradient. A block ends in AFMS, x -> (x + a)
times a gate made from the channels' means.

    RawNet3(ModelConfig(name="RawNet3", encoder="ECA", embedding_size=256))(waves)  # (batch, samples) -> (batch, 256)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spknet.config import ConfigError, FeaturesConfig, ModelConfig
from spknet.models.features import INT16, PRE_EMPHASIS, apply_masks, full_precision, pre_emphasis
from spknet.models.pooling import POOLINGS, ChannelAttention, Head, build_pooling

TAPS = 251
LOWEST_HZ = 50.0  # added to a filter's lower edge, and to its width


class SincFilters(nn.Module):
    """Pairs of band-pass filters: (batch, samples) -> (batch, 2 * pairs, frames)."""

    def __init__(self, pairs: int, stride: int, sample_rate: int):
        super().__init__()
        self.stride, self.sample_rate = stride, sample_rate
        half = TAPS // 2
        position = torch.arange(TAPS, dtype=torch.float64)
        window = 0.54 - 0.46 * torch.cos(2 * math.pi * position / (TAPS - 1))
        self.low = nn.Parameter(torch.empty(pairs, 1))  # Hz
        self.band = nn.Parameter(torch.empty(pairs, 1))  # Hz
        self.register_buffer("window", window[:half].float())  # the other half mirrors it
        self.register_buffer("time", 2 * math.pi * ((position[:half] - half).float() / sample_rate)[None])  # 2 pi t
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Edges equally far apart in mel, from 30 Hz to 100 Hz below half the sample rate."""
        low, high = (2595 * math.log10(1 + hz / 700) for hz in (30, self.sample_rate / 2 - 2 * LOWEST_HZ))
        mels = torch.linspace(low, high, len(self.low) + 1, dtype=torch.float64).float()
        edges = 700 * (
            10 ** (mels / 2595) - 1
        )  # single precision, as in the first RawNet3: log |x| shows the difference
        self.low.copy_(edges[:-1, None])
        self.band.copy_(edges.diff()[:, None])

    def filters(self) -> Tensor:
        """(2 * pairs, 1, taps): the cosine filters, then the sine filters."""
        low = LOWEST_HZ + self.low.abs()
        high = (low + LOWEST_HZ + self.band.abs()).clamp(LOWEST_HZ, self.sample_rate / 2)
        band = high - low
        envelope = self.window / (self.time / 2)
        even = ((high * self.time).sin() - (low * self.time).sin()) * envelope
        odd = ((low * self.time).cos() - (high * self.time).cos()) * envelope
        cosine = torch.cat([even, 2 * band, even.flip(1)], dim=1)
        sine = torch.cat([odd, torch.zeros_like(band), -odd.flip(1)], dim=1)
        return (torch.cat([cosine, sine]) / (2 * band).repeat(2, 1))[:, None]

    def forward(self, waves: Tensor) -> Tensor:
        return F.conv1d(waves[:, None], self.filters(), stride=self.stride)

    @staticmethod
    def multiply_adds(output: Tensor) -> int:
        return output.numel() * TAPS


class FilterBank(nn.Module):
    """waves (batch, samples) -> normalised log magnitudes (batch, channels, frames); masks as in spknet.models.features."""

    def __init__(self, channels: int, stride: int, sample_rate: int, input_scale: str):
        super().__init__()
        self.scale = INT16 if input_scale == "int16" else 1.0
        self.register_buffer("taps", torch.tensor([-PRE_EMPHASIS, 1.0]))
        self.norm = nn.InstanceNorm1d(1, eps=1e-4, affine=True)
        self.sinc = SincFilters(channels // 2, stride, sample_rate)

    def forward(self, waves: Tensor, masks: Tensor | None = None) -> Tensor:
        with full_precision(waves):
            waves = pre_emphasis(waves.to(self.sinc.low.dtype) * self.scale, self.taps)
            x = (self.sinc(self.norm(waves[:, None])[:, 0]).abs() + 1e-6).log()
            return apply_masks(x - x.mean(dim=2, keepdim=True), masks)


class Gate(nn.Module):
    """AFMS: (batch, channels, frames) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.empty(channels, 1))
        self.fc = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.shift) * self.fc(x.mean(dim=2)).sigmoid()[:, :, None]


class Res2Block(nn.Module):
    """Channels in 8 groups; each group's convolution also sees the result of the group before it (Gao et al., 2021)."""

    def __init__(self, inputs: int, channels: int, dilation: int, pool: int = 1, scale: int = 8):
        super().__init__()
        width = channels // scale
        self.width, self.pool = width, pool
        self.conv1 = nn.Conv1d(inputs, channels, 1)
        self.norm1 = nn.BatchNorm1d(channels)
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for _ in range(scale - 1)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(scale - 1))
        self.conv3 = nn.Conv1d(channels, channels, 1)
        self.norm3 = nn.BatchNorm1d(channels)
        self.gate = Gate(channels)
        self.shortcut = nn.Identity() if inputs == channels else nn.Conv1d(inputs, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        groups = self.norm1(self.conv1(x).relu()).split(self.width, dim=1)
        done = []
        for group, conv, norm in zip(groups, self.convs, self.norms):
            seen = done[-1] + group if done else group
            done.append(norm(conv(seen).relu()))
        y = self.norm3(self.conv3(torch.cat([*done, groups[-1]], dim=1)).relu()) + self.shortcut(x)
        return self.gate(F.max_pool1d(y, self.pool) if self.pool > 1 else y)


class RawNet3(nn.Module):
    """waves (batch, samples) in [-1, 1] -> embeddings (batch, embedding_size).

    Encoders: ECA weighs each channel and frame, ASP each frame; both see the whole utterance's mean and deviation. The others are
    those of spknet.models.pooling.
    masks (batch, 2 K, 2): SpecAugment on the learned filter bank.
    """

    encoders = ("ECA", "ASP", "TAP", "MAX", "TSTP", "TSDP", "ASTP", "ASTP-GLOB", "MQMHA")

    def __init__(self, config: ModelConfig, sample_rate: int = 16000, features: FeaturesConfig | None = None):
        super().__init__()
        if features and features.name != "auto":
            raise ConfigError(f"features.name {features.name}: RawNet3 learns its filters from waves; give auto")
        channels = 32 * max(1, round(32 * config.width))
        wide = channels * 3 // 2
        self.features = FilterBank(channels // 4, config.sinc_stride, sample_rate, config.input_scale)
        self.block1 = Res2Block(channels // 4, channels, dilation=2, pool=5)
        self.block2 = Res2Block(channels, channels, dilation=3, pool=3)
        self.block3 = Res2Block(channels, channels, dilation=4)
        self.mix = nn.Conv1d(3 * channels, wide, 1)
        pool, pooled = self.build_pool(config.encoder, wide)
        encoder = nn.Sequential(pool, nn.BatchNorm1d(pooled))
        self.head = Head(encoder, pooled, config.embedding_size, fewest=2)
        # Two norms that RawNet3's forward pass never uses are in its checkpoints and in its parameter count. Without a
        # gradient, so that no rank waits for one.
        self.unused = nn.ModuleList([nn.BatchNorm1d(channels // 4), nn.BatchNorm1d(config.embedding_size)])
        self.unused.requires_grad_(False)

    @staticmethod
    def build_pool(encoder: str, channels: int) -> tuple[nn.Module, int]:
        """The pooling, and how many values it makes of an utterance."""
        if encoder not in ("ECA", "ASP"):
            return build_pooling(encoder, channels), POOLINGS[encoder] * channels
        shared = encoder == "ASP"
        return ChannelAttention(channels, deviation=True, context=True, shared=shared, low=1e-4, high=1e4), 2 * channels

    def forward(self, waves: Tensor, masks: Tensor | None = None) -> Tensor:
        x1 = self.block1(self.features(waves, masks))
        x2 = self.block2(x1)
        x1 = F.max_pool1d(x1, 3)
        x3 = self.block3(x1 + x2)
        return self.head(self.mix(torch.cat([x1, x2, x3], dim=1)).relu())
