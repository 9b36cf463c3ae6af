"""CAM++: a densely connected time-delay network with context-aware masking (Wang et al., 2023, arXiv 2303.00332).

    head      2-D, 32 channels: 3x3 · two pairs of basic blocks and a 3x3, each halving the bands: 80 -> 10; all frames
    tdnn      32 channels x 10 bands = 320 -> 128, 5 frames, every second frame
    block1-3  12, 24, 16 layers of growth 32; a 1x1 convolution (transit) halves the channels after each
    pool      mean and deviation · 1x1 -> embedding · norm without parameters, whose output is the embedding

A layer: norm, ReLU, 1x1 to 128, norm, ReLU = h, then a convolution over 3 frames of h (dilation 1, 2, 2 by block)
times a gate made from mean(h) + the mean of h over windows of 100 frames (2 s); the result joins the input's
channels. The last window is as short as the utterance leaves it. So embeddings of long audio cut into pieces agree
only where cuts fall on multiples of 2 s.

Variants: `wespeaker` adds 1e-7 to the variance; `3dspeaker` nothing, and its models for Chinese have 192 dimensions.
Names of parameters are those of both projects, the same in both.

    CAMPlusPlus(ModelConfig(name="CAM++"))(waves)  # (batch, samples) -> (batch, 512)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spknet.config import ModelConfig
from spknet.models.convolution import Conv2d
from spknet.models.network import Network
from spknet.models.pooling import POOLINGS, build_pooling

WINDOW = 100  # frames of 20 ms
BLOCKS = ((12, 1), (24, 2), (16, 2))  # layers, dilation
FLOOR = {"wespeaker": 1e-7, "3dspeaker": 0.0}


class Conv1d(nn.Conv1d):
    """A convolution over time whose weights keep the variance of activations under ReLU (He et al., 2015)."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def norm_relu(channels: int, *, affine: bool = True, relu: bool = True) -> nn.Sequential:
    layers = nn.Sequential()
    layers.add_module("batchnorm", nn.BatchNorm1d(channels, affine=affine))
    if relu:
        layers.add_module("relu", nn.ReLU())
    return layers


class BandBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; the first divides the bands by `stride`, frames stay."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, (stride, 1), padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1:
            conv = Conv2d(channels, channels, 1, (stride, 1), bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


class BandNetwork(nn.Module):
    """FCM: (batch, bands, frames) -> (batch, channels * bands / 8, frames)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1 = nn.Sequential(BandBlock(channels, 2), BandBlock(channels, 1))
        self.layer2 = nn.Sequential(BandBlock(channels, 2), BandBlock(channels, 1))
        self.conv2 = nn.Conv2d(channels, channels, 3, (2, 1), padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x[:, None])).relu()
        x = self.layer2(self.layer1(x))
        return self.bn2(self.conv2(x)).relu().flatten(1, 2)


def window_means(x: Tensor) -> Tensor:
    """Each frame's mean over the window of 100 frames that it lies in: (batch, channels, frames) -> the same shape."""
    frames = x.shape[2]
    means = F.avg_pool1d(x, WINDOW, WINDOW, ceil_mode=True)  # the last one divided by the frames it has
    return means.repeat_interleave(WINDOW, dim=2)[:, :, :frames]


class MaskedConvolution(nn.Module):
    """The convolution of a layer times its gate: (batch, inputs, frames) -> (batch, outputs, frames)."""

    def __init__(self, inputs: int, outputs: int, dilation: int):
        super().__init__()
        self.linear_local = Conv1d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        self.linear1 = Conv1d(inputs, inputs // 2, 1)
        self.linear2 = Conv1d(inputs // 2, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean(dim=2, keepdim=True) + window_means(x)
        return self.linear_local(x) * self.linear2(self.linear1(context).relu()).sigmoid()


class DenseLayer(nn.Module):
    """(batch, inputs, frames) -> (batch, growth, frames)."""

    def __init__(self, inputs: int, bottleneck: int, growth: int, dilation: int):
        super().__init__()
        self.nonlinear1 = norm_relu(inputs)
        self.linear1 = Conv1d(inputs, bottleneck, 1, bias=False)
        self.nonlinear2 = norm_relu(bottleneck)
        self.cam_layer = MaskedConvolution(bottleneck, growth, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(x))))


class DenseBlock(nn.Module):
    """Layers that each see the input and every layer before: channels grow by `growth` with each."""

    def __init__(self, inputs: int, layers: int, growth: int, dilation: int):
        super().__init__()
        for i in range(layers):
            self.add_module(f"tdnnd{i + 1}", DenseLayer(inputs + i * growth, 4 * growth, growth, dilation))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat([x, layer(x)], dim=1)
        return x


class NormConv(nn.Module):
    """transit: norm, ReLU, 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.nonlinear = norm_relu(inputs)
        self.linear = Conv1d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.nonlinear(x))


class ConvNorm(nn.Module):
    """tdnn and dense: convolution, norm, ReLU or not."""

    def __init__(self, conv: Conv1d, **options: bool):
        super().__init__()
        self.linear = conv
        self.nonlinear = norm_relu(conv.out_channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear(self.linear(x))


class CAMPlusPlus(Network):
    """waves (batch, samples) -> (batch, embedding_size); see spknet.models.network."""

    variants = ("wespeaker", "3dspeaker")
    time_stride = 2
    norm_after_pooling = True

    def build(self, config: ModelConfig) -> None:
        growth = max(4, round(32 * config.width))
        self.head = BandNetwork(growth)
        bands = -(-self.bands // 8)
        channels = 4 * growth
        trunk = nn.Module()
        trunk.tdnn = ConvNorm(Conv1d(growth * bands, channels, 5, stride=2, padding=2, bias=False))
        for i, (layers, dilation) in enumerate(BLOCKS, start=1):
            trunk.add_module(f"block{i}", DenseBlock(channels, layers, growth, dilation))
            channels = channels + layers * growth
            trunk.add_module(f"transit{i}", NormConv(channels, channels // 2))
            channels //= 2
        trunk.out_nonlinear = norm_relu(channels)
        pooled = POOLINGS[config.encoder] * channels
        trunk.dense = ConvNorm(Conv1d(pooled, config.embedding_size, 1, bias=False), affine=False, relu=False)
        self.xvector = trunk
        self.pool = build_pooling(config.encoder, channels, floor=FLOOR[self.variant])

    def frames(self, x: Tensor) -> Tensor:
        x = self.xvector.tdnn(self.head(x))
        for i in range(1, 1 + len(BLOCKS)):
            x = getattr(self.xvector, f"transit{i}")(getattr(self.xvector, f"block{i}")(x))
        return self.xvector.out_nonlinear(x)

    def embed_frames(self, x: Tensor) -> Tensor:
        return self.xvector.dense(self.pool(x)[:, :, None])[:, :, 0]
