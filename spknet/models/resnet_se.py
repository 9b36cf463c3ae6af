"""One residual network with squeeze-and-excitation, three layouts: Thin, Fast and H/ASP ResNet-34.

A block is conv, ReLU, norm, conv, norm, squeeze-and-excitation (Hu et al., 2018; each channel times a gate made from the
channels' means, bottleneck of 1/8), plus the input, ReLU; 3, 4, 6 and 3 of them (He et al., 2016). The layouts are those of
"In defence of metric learning for speaker recognition" (Chung et al., 2020) and voxceleb_trainer:

    ResNetSE34    Thin  spectrogram 257  stem 7x7 and max pool, both / (2, 1)  channels 16-128  strides 1, 2, 2, 2
    ResNetSE34L   Fast  40 log mels      stem 7x7 / (2, 1)                     channels 16-128  strides 1, 2, 2, 1
    ResNetSE34V2  H     64 log mels      stem 3x3                              channels 32-256  strides 1, 2, 2, 2, bands kept

    ResNetSE34L(ModelConfig())(waves)  # (batch, samples) -> (batch, 512)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spknet.config import FeaturesConfig, ModelConfig
from spknet.models import convolution
from spknet.models.front_ends import build_features
from spknet.models.pooling import POOLINGS, build_head

BLOCKS = (3, 4, 6, 3)


@dataclass(frozen=True)
class Layout:
    channels: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]  # of the first block of each stage, bands and frames
    stem: int  # kernel size
    stem_stride: tuple[int, int]  # bands, frames
    max_pool: bool = False
    mel: bool = True  # mel bands, else the magnitude of every FFT bin
    emphasis: bool = False
    keep_bands: bool = False  # the encoder sees channels x bands, else the mean over bands
    window: str = "hamming"  # where model.window is auto
    relu_first: bool = False  # stem: ReLU before the norm, and a bias


class Conv2d(convolution.Conv2d):
    """A convolution whose weights keep the variance of gradients under ReLU (He et al., 2015)."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class Gate(nn.Module):
    """Squeeze-and-excitation: (batch, channels, bands, frames) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze = nn.Linear(channels, max(1, channels // 8))
        self.excite = nn.Linear(max(1, channels // 8), channels)

    def of(self, means: Tensor) -> Tensor:
        """Means over bands and frames -> factors: both (batch, channels)."""
        return self.excite(self.squeeze(means).relu()).sigmoid()

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """relu(x * gate + shortcut)."""
        eager_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if eager_cpu and torch.is_grad_enabled() and x.dtype == shortcut.dtype:
            return _GatedSum.apply(x, shortcut, self, *self.parameters())
        return (x * self.of(x.mean(dim=(2, 3)))[:, :, None, None] + shortcut).relu_()


class _GatedSum(torch.autograd.Function):
    """relu(x * gate(mean of x) + shortcut) with half of autograd's passes over memory, which is what a CPU waits for: the sum
    and the ReLU are made in place, and both parts of dx, through the product and through the mean, are written at once."""

    @staticmethod
    def forward(ctx, x: Tensor, shortcut: Tensor, gate: Gate, *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            means = x.mean(dim=(2, 3)).detach().requires_grad_()
            factors = gate.of(means)
        ctx.gate = means, factors, parameters
        y = x * factors.detach().to(x.dtype)[:, :, None, None]
        y = y.add_(shortcut).relu_()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, y = ctx.saved_tensors
        means, factors, parameters = ctx.gate  # a graph of its own, small
        dy = torch.ops.aten.threshold_backward(dy, y, 0)
        dfactors = (dy * x).sum(dim=(2, 3))
        learns = [value for value in (means, *parameters) if value.requires_grad]
        dmeans, *rest = torch.autograd.grad(factors, learns, dfactors.to(factors.dtype))
        rest = iter(rest)
        gradients = [next(rest) if value.requires_grad else None for value in parameters]
        share = (dmeans / (x.shape[2] * x.shape[3])).to(x.dtype)[:, :, None, None]
        dx = torch.addcmul(share, dy, factors.detach().to(x.dtype)[:, :, None, None])
        return dx, dy, None, *gradients


class Block(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.gate = Gate(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != channels:
            self.shortcut = nn.Sequential(Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x).relu_())
        return self.gate(self.norm2(self.conv2(y)), self.shortcut(x))


def mean_over_bands(x: Tensor) -> Tensor:
    """(batch, channels, bands, frames) -> (batch, channels, frames)."""
    means = x.mean(dim=2)
    if means.requires_grad and not torch.compiler.is_compiling() and x.is_contiguous(memory_format=torch.channels_last):
        # The gradient comes frame beside frame; x lies channel beside channel, and a pass over both takes 15 times as long.
        means.register_hook(lambda gradient: gradient.mT.contiguous().mT)
    return means


class ResNetSE(nn.Module):
    """waves (batch, samples) in [-1, 1] -> embeddings (batch, embedding_size); the layout is the subclass's.

    masks (batch, 2 K, 2): SpecAugment, see spknet.models.features.apply_masks.
    """

    encoders = tuple(POOLINGS)
    layout: Layout

    def __init__(self, config: ModelConfig, sample_rate: int = 16000, features: FeaturesConfig | None = None):
        super().__init__()
        layout = self.layout
        published = "2020" if layout.mel else "2020 spectrum"
        self.features = build_features(
            config, sample_rate, features, published, window=layout.window, emphasis=layout.emphasis
        )
        channels = [max(8, round(c * config.width)) for c in layout.channels]
        self.stem = Conv2d(
            1, channels[0], layout.stem, layout.stem_stride, padding=layout.stem // 2, bias=layout.relu_first
        )
        self.norm = nn.BatchNorm2d(channels[0])
        stages, inputs = [], channels[0]
        for n, width, stride in zip(BLOCKS, channels, layout.strides):
            blocks = [Block(inputs, width, stride)] + [Block(width, width, 1) for _ in range(n - 1)]
            stages.append(nn.Sequential(*blocks))
            inputs = width
        self.stages = nn.Sequential(*stages)
        pooled = inputs * self.bands_left() if layout.keep_bands else inputs
        self.head = build_head(config.encoder, pooled, config.embedding_size, per_channel=layout.keep_bands)

    def bands_left(self) -> int:
        """Bands after the stem and the stages: padded convolutions divide by their stride, rounding up."""
        bands = -(-self.features.bands // self.layout.stem_stride[0])
        for stride in (2 if self.layout.max_pool else 1, *self.layout.strides):
            bands = -(-bands // stride)
        return bands

    def forward(self, waves: Tensor, masks: Tensor | None = None) -> Tensor:
        x = self.stem(self.features(waves, masks)[:, None])  # (batch, channels, bands, frames)
        x = self.norm(x.relu_()) if self.layout.relu_first else self.norm(x).relu_()
        if self.layout.max_pool:
            x = F.max_pool2d(x, 3, stride=(2, 1), padding=1)
        x = self.stages(x)
        return self.head(x.flatten(1, 2) if self.layout.keep_bands else mean_over_bands(x))


class ResNetSE34(ResNetSE):
    """Thin ResNet-34 (1.4 M parameters) on magnitude spectra."""

    layout = Layout(
        (16, 32, 64, 128), (1, 2, 2, 2), stem=7, stem_stride=(2, 1), max_pool=True, mel=False, window="hann"
    )


class ResNetSE34L(ResNetSE):
    """Fast ResNet-34 (1.4 M parameters)."""

    layout = Layout((16, 32, 64, 128), (1, 2, 2, 1), stem=7, stem_stride=(2, 1))


class ResNetSE34V2(ResNetSE):
    """Half ResNet-34 (6 to 8 M parameters), "H / ASP"."""

    layout = Layout(
        (32, 64, 128, 256), (1, 2, 2, 2), stem=3, stem_stride=(1, 1), emphasis=True, keep_bands=True, relu_first=True
    )
