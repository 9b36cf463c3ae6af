"""ReDimNet B0 to B6 and ReDimNet2 B0 to B6: maps that keep their size while they change their shape.

(Yakovlev et al., 2024, "Reshape dimensions network for speaker recognition"; ReDimNet2: arXiv 2603.11841, 2026.)

A map is 1-D, (batch, rows = C * F, T), or the same numbers in 2-D, (batch, c, f, T) with c * f = C * F: row f * c + c', bands outside.
A stage, from i + 1 maps to the next one, all of them (batch, C * F, T):

    weighted sum of all maps before (softmax of one weight for each map and row)       -> 2-D with the c and f of the stage before
    convolution with kernel = stride (s, t) over bands and time, c -> s * c * widening  -> f / s bands, T / t frames
    n residual blocks of 2-D convolutions, and where widening != 1 a convolution back to s * c channels           -> 1-D
    time block: 1x1 to C * F / narrowing channels, four depthwise convolutions of 7, 19, 31 and 59 frames, a transformer layer,
    1x1 back, plus its input                                                            -> repeated t times: T frames again

The last weighted sum is pooled with attention, normalised and projected. What differs:

    ReDimNet   t = 1; three kinds of blocks; the way back is a grouped 3x3, norm, GELU, 1x1; features every 15 ms
    ReDimNet2  t is the product of the time strides so far; depthwise blocks; entry convolution grouped; the way back is 1x1, norm; a
               1x1 before the pooling; frames cut to a multiple of 4; model.agg_gnorm: group norms where maps are summed

Sizes are those of the released weights (B2 of ReDimNet has stride 3 in stage 4). Names of parameters are those of IDRnD and
PalabraAI but for the patterns in `renames`. Weights of ReDimNet2 of April 2026 have no group norms, those of July have them.

    ReDimNet2(ModelConfig(name="ReDimNet2-B0"))(waves)  # (batch, samples) -> (batch, 192)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spknet.config import ConfigError, ModelConfig
from spknet.models.network import Network
from spknet.models.pooling import POOLINGS, build_pooling

EPS = 1e-6  # of layer norms, and of the norm on ReDimNet2's way back
KERNELS = (7, 19, 31, 59)  # frames, of the time block's convolutions
HEADS = 4


@dataclass(frozen=True)
class Layout:
    """stages: (stride over bands, over time, blocks, widening, narrowing; 0: no time block)."""

    channels: int
    stages: tuple[tuple[int, int, int, float, int], ...]
    block: str = "basic"  # basic, gated (basic with a gate over bands), convnext
    group: int = 1  # channels of a group in the blocks' 3x3 convolutions
    out_channels: int = 0  # of the 1x1 before the pooling; 0: none


def plain(*stages: tuple[int, int, float, int]) -> tuple:
    """Stages without strides over time."""
    return tuple((band, 1, *rest) for band, *rest in stages)


def strided(widening: tuple, narrowing: tuple, depths: tuple = (2, 3, 4, 5, 4, 3), fourth: int = 2) -> tuple:
    """ReDimNet2's six stages: over bands 2 in the second, fourth and sixth, over time 2 in the third and fifth."""
    return tuple(zip((1, 2, 1, fourth, 1, 2), (1, 1, 2, 1, 2, 1), depths, widening, narrowing))


FIRST_WIDE, FALLING = (2, 1, 1, 1, 1, 1), (4, 3, 2, 1, 1, 1)
GATED = plain((1, 4, 2, 48), (2, 4, 2, 48), (1, 6, 2, 48), (2, 6, 1, 32), (1, 8, 1, 24), (2, 4, 1, 16))

LAYOUTS = {
    "ReDimNet-B0": Layout(10, plain((1, 2, 1, 30), (2, 3, 2, 30), (1, 3, 3, 30), (2, 4, 2, 10), (1, 3, 1, 10))),
    "ReDimNet-B1": Layout(
        12, plain((1, 2, 1, 0), (2, 3, 1, 0), (3, 4, 1, 12), (2, 5, 1, 12), (2, 3, 1, 8)), "convnext", 8
    ),
    "ReDimNet-B2": Layout(
        16, plain((1, 2, 1, 12), (2, 2, 1, 12), (1, 3, 1, 12), (3, 4, 1, 8), (1, 4, 1, 8), (2, 4, 1, 4)), "convnext", 4
    ),
    "ReDimNet-B3": Layout(
        16, plain((1, 6, 4, 32), (2, 6, 2, 32), (1, 8, 2, 32), (2, 10, 2, 16), (1, 10, 1, 16), (2, 8, 1, 16)), "gated"
    ),
    "ReDimNet-B4": Layout(32, GATED, "gated"),
    "ReDimNet-B5": Layout(32, GATED, "gated", 16),
    "ReDimNet-B6": Layout(
        32, plain((1, 4, 4, 32), (2, 6, 2, 32), (1, 6, 2, 24), (3, 8, 1, 24), (1, 8, 1, 16), (2, 8, 1, 16)), group=32
    ),
    "ReDimNet2-B0": Layout(12, strided(FIRST_WIDE, (36, 36, 36, 36, 18, 18)), out_channels=64),
    "ReDimNet2-B1": Layout(16, strided(FIRST_WIDE, (32, 32, 32, 32, 16, 16))),
    "ReDimNet2-B2": Layout(20, strided(FIRST_WIDE, (40, 30, 30, 20, 20, 10), fourth=3)),
    "ReDimNet2-B3": Layout(24, strided(FALLING, (24,) * 6)),
    "ReDimNet2-B4": Layout(32, strided(FALLING, (24,) * 6)),
    "ReDimNet2-B5": Layout(48, strided(FALLING, (48, 48, 48, 48, 32, 32)), out_channels=256),
    "ReDimNet2-B6": Layout(
        64, strided((3, 2, 2, 1, 0.75, 0.5), (64, 64, 48, 48, 32, 24), (3, 4, 5, 5, 4, 3)), out_channels=224
    ),
}


class WeightedSum(nn.Module):
    """Maps of one size -> their weighted mean, with weights that sum to 1 for each row. Of one map: the map itself."""

    def __init__(self, maps: int, rows: int):
        super().__init__()
        self.w = nn.Parameter(torch.empty(1, maps, rows, 1), requires_grad=maps > 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.w)

    def forward(self, maps: list[Tensor]) -> Tensor:
        if len(maps) == 1:
            return maps[0]
        weights = self.w.softmax(dim=1)
        return sum(weights[:, i] * x for i, x in enumerate(maps))


class To2d(nn.Module):
    """(batch, f * c, T) -> (batch, c, f, T)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.channels)).transpose(1, 2)


class To1d(nn.Module):
    """(batch, c, f, T) -> (batch, f * c, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels, the second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Repeat(nn.Module):
    """Each frame several times: (batch, rows, T) -> (batch, rows, times * T)."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return x if self.times == 1 else x.repeat_interleave(self.times, dim=2)


class BandGate(nn.Module):
    """Squeeze-and-excitation over bands: (batch, channels, bands, frames) -> the same shape."""

    def __init__(self, channels: int, bands: int):
        super().__init__()
        hidden = min(64, max(channels, 32))
        self.squeeze, self.excitation = nn.Linear(bands, hidden), nn.Linear(hidden, bands)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excitation(self.squeeze(x.mean(dim=(1, 3))).relu()).sigmoid()
        return x * gate[:, None, :, None]


class BasicBlock(nn.Module):
    """Twice grouped 3x3, 1x1 and norm, ReLU before the first norm; plus the input, ReLU."""

    def __init__(self, channels: int, groups: int, gated_bands: int = 0):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.conv1pw = nn.Conv2d(channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.conv2pw = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = BandGate(channels, gated_bands) if gated_bands else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1pw(self.conv1(x)).relu())
        return (self.se(self.bn2(self.conv2pw(self.conv2(y)))) + x).relu()


class ConvNeXt(nn.Module):
    """Grouped convolution, norm, GELU, 1x1, plus the input; over time (dimensions 1), or over bands and time (2)."""

    def __init__(self, dimensions: int, channels: int, kernel: int, groups: int):
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dimensions == 1 else (nn.Conv2d, nn.BatchNorm2d)
        self.dwconv = conv(channels, channels, kernel, padding=kernel // 2, groups=groups)
        self.norm = norm(channels)
        self.pwconv1 = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pwconv1(F.gelu(self.norm(self.dwconv(x))))


class Attention(nn.Module):
    """Self-attention of 4 heads: (batch, T, channels) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            self.add_module(name, nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    @staticmethod
    def multiply_adds(output: Tensor) -> int:
        """Of the two batched products, besides the four linear layers."""
        batch, frames, channels = output.shape
        return 2 * batch * frames * frames * channels


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.intermediate_dense, self.output_dense = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(F.gelu(self.intermediate_dense(x), approximate="tanh"))


class Transformer(nn.Module):
    """A layer that normalises after each sum, without positions: (batch, channels, T) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.attention, self.layer_norm = Attention(channels), nn.LayerNorm(channels, eps=EPS)
        self.feed_forward, self.final_layer_norm = FeedForward(channels), nn.LayerNorm(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        x = self.layer_norm(x + self.attention(x))
        return self.final_layer_norm(x + self.feed_forward(x)).mT


class TimeBlock(nn.Module):
    """(batch, rows, T) -> the same shape."""

    def __init__(self, rows: int, channels: int):
        super().__init__()
        self.red_dim_conv = nn.Sequential(nn.Conv1d(rows, channels, 1), ChannelNorm(channels, eps=EPS))
        self.tcm = nn.Sequential(*(ConvNeXt(1, channels, k, groups=channels) for k in KERNELS), Transformer(channels))
        self.exp_dim_conv = nn.Conv1d(channels, rows, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.exp_dim_conv(self.tcm(self.red_dim_conv(x)))


class Backbone(nn.Module):
    """(batch, bands, T) -> (batch, channels, T); the parts of a stage stand in the order of the official ones."""

    def __init__(self, layout: Layout, channels: int, bands: int, second: bool, group_norms: bool):
        super().__init__()
        self.layout, self.second, self.rows = layout, second, channels * bands
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), ChannelNorm(channels, eps=EPS), To1d())
        self.stem_gnorm = nn.GroupNorm(channels, self.rows) if group_norms else nn.Identity()
        strides = 1
        for i, (band_stride, time_stride, *rest) in enumerate(layout.stages):
            strides *= time_stride
            parts = [WeightedSum(i + 1, self.rows if second or i else 1), To2d(self.rows // bands)]
            bands //= band_stride
            parts += self.convolutions(bands, (band_stride, strides), *rest)
            if second:
                parts.append(Repeat(strides))
                parts += [nn.GroupNorm(channels, self.rows)] if group_norms else []
            self.add_module(f"stage{i}", nn.Sequential(*parts))
        self.fin_wght1d = WeightedSum(len(layout.stages) + 1, self.rows)
        wide = self.rows // bands
        self.to2d = To2d(wide) if second else nn.Identity()
        self.head = nn.Conv2d(wide, layout.out_channels, 1) if layout.out_channels else nn.Identity()
        self.channels = (layout.out_channels or wide) * bands

    def convolutions(self, bands: int, stride: tuple, blocks: int, widening: float, narrowing: int) -> list[nn.Module]:
        """Entry, blocks, way back and time block of a stage that ends with `bands` bands."""
        outputs, group = self.rows // bands, self.layout.group
        inputs, wide = outputs // stride[0], int(outputs * widening)
        groups = math.gcd(inputs, wide) if self.second else 1
        parts: list[nn.Module] = [nn.Conv2d(inputs, wide, stride, stride, groups=groups)]
        for _ in range(blocks):
            if self.layout.block == "convnext":
                parts.append(ConvNeXt(2, wide, 3, groups_of(wide, group)))
            else:
                gated = bands if self.layout.block == "gated" else 0
                parts.append(BasicBlock(wide, groups_of(wide, group), gated))
        if widening != 1 and self.second:
            parts.append(nn.Sequential(nn.Conv2d(wide, outputs, 1), nn.BatchNorm2d(outputs, eps=EPS)))
        elif widening != 1:
            first = nn.Conv2d(wide, outputs, 3, padding=1, groups=math.gcd(wide, groups_of(outputs, group)))
            norm = nn.BatchNorm2d(outputs, eps=EPS)
            parts.append(nn.Sequential(first, norm, nn.GELU(), nn.Conv2d(outputs, outputs, 1)))
        parts.append(To1d())
        if narrowing:  # rounded to what 4 heads can share, for other widths than the published ones
            parts.append(TimeBlock(self.rows, max(HEADS, self.rows // narrowing // HEADS * HEADS)))
        return parts

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem_gnorm(self.stem(x[:, None]))]
        for i in range(len(self.layout.stages)):
            maps.append(getattr(self, f"stage{i}")(maps))
        x = self.to2d(self.fin_wght1d(maps))
        return self.head(x).flatten(1, 2) if self.second else x


def groups_of(channels: int, group: int) -> int:
    """Groups of `group` channels, or of a few more where these do not divide."""
    return math.gcd(channels, max(1, channels // group))


class ReDimNet(Network):
    """waves (batch, samples) -> (batch, embedding_size); see spknet.models.network. Raises ConfigError for odd bands."""

    encoders = tuple(POOLINGS)
    variants: tuple[str, ...] = ("redimnet",)
    renames = dict.fromkeys(
        ("redimnet", "redimnet2"),
        [(r"\.conv_block\.", "."), (r"\.dwconvs\.0\.", ".dwconv."), (r"\.exitation\.", ".excitation.")],
    )
    norm_after_pooling = True
    second = False

    def build(self, config: ModelConfig) -> None:
        layout = LAYOUTS[config.name]
        divisor = math.prod(stage[0] for stage in layout.stages)
        if self.bands % divisor:
            raise ConfigError(
                f"model.n_mels {self.bands}: {config.name} divides its bands by {divisor}; give a multiple, such as 72"
            )
        channels = layout.channels if config.width == 1 else max(2, round(layout.channels * config.width))
        self.backbone = Backbone(layout, channels, self.bands, self.second, self.second and config.agg_gnorm)
        self.pool = build_pooling(config.encoder, self.backbone.channels)
        pooled = POOLINGS[config.encoder] * self.backbone.channels
        self.bn = nn.BatchNorm1d(pooled)
        self.linear = nn.Linear(pooled, config.embedding_size)

    def frames(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def embed_frames(self, x: Tensor) -> Tensor:
        return self.linear(self.bn(self.pool(x)))


class ReDimNet2(ReDimNet):
    """waves (batch, samples) -> (batch, embedding_size). Frames beyond a multiple of 4 are left out."""

    variants = ("redimnet2",)
    second = True

    def build(self, config: ModelConfig) -> None:
        super().build(config)
        self.multiple = math.prod(stage[1] for stage in self.backbone.layout.stages)
        self.fewest_frames = self.multiple

    def frames(self, x: Tensor) -> Tensor:
        return self.backbone(x[:, :, : x.shape[2] // self.multiple * self.multiple])
