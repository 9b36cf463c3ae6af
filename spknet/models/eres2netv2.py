"""ERes2NetV2: Res2Net whose groups and last two stages are fused by attention (Chen et al., 2024, arXiv 2406.02167).

    stem       3x3, 64 channels, ReLU
    stage 1-4  3, 4, 6, 3 blocks of 64, 128, 256, 512 channels, twice as many at the end; strides as in ResNet34
    fuse34     stage 4's output and stage 3's, the latter through a 3x3 convolution of stride 2
    pool       mean and deviation of channels x bands · Linear 192

A block: 1x1 with the stride, then groups of width floor(channels * 26 / 64). The first goes through 3x3, norm, ReLU;
each further one joins the result of the one before, by a sum in stages 1 and 2 and by attention in 3 and 4, then 3x3,
norm, ReLU. 1x1, plus the input. Every ReLU of the blocks is clipped at 20. Attention: a local network of 1x1
convolutions gives g in (0, 2), and fuse(x, y) = g x + (2 - g) y.

Variants: `w26s2e2` (two groups; the model of the paper) and `w24s4e4` (four groups of width 24/64, four times as many
channels at the end), both 3D-Speaker's, whose names of parameters these are.

    ERes2NetV2(ModelConfig(name="ERes2NetV2"))(waves)  # (batch, samples) -> (batch, 192)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spknet.config import ModelConfig
from spknet.models.pooling import POOLINGS, build_pooling
from spknet.models.res2net import relu20
from spknet.models.resnet import ResidualNetwork, conv1x1, conv3x3, shortcut

SIZES = {"w26s2e2": (26, 2, 2), "w24s4e4": (24, 4, 4)}  # width of 64 channels, groups, expansion


class Fusion(nn.Module):
    """Attentional feature fusion (Dai et al., 2021) of two tensors (batch, channels, bands, frames) -> the same shape."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        middle = max(1, channels // reduction)
        self.local_att = nn.Sequential(
            nn.Conv2d(2 * channels, middle, 1),
            nn.BatchNorm2d(middle),
            nn.SiLU(),
            nn.Conv2d(middle, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gate = self.local_att(torch.cat([x, y], dim=1)).tanh()
        return x * (1 + gate) + y * (1 - gate)


class Block(nn.Module):
    """(batch, inputs, bands, frames) -> (batch, expansion * channels, bands / stride, frames / stride)."""

    def __init__(self, inputs: int, channels: int, stride: int, size: tuple[int, int, int], fused: bool):
        super().__init__()
        width64, self.groups, self.expansion = size
        width, outputs = max(1, channels * width64 // 64), channels * self.expansion
        self.conv1 = conv1x1(inputs, self.groups * width, stride)
        self.bn1 = nn.BatchNorm2d(self.groups * width)
        self.convs = nn.ModuleList(conv3x3(width, width) for _ in range(self.groups))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(self.groups))
        self.fuse_models = nn.ModuleList(Fusion(width) for _ in range(self.groups - 1)) if fused else None
        self.conv3 = conv1x1(self.groups * width, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        groups = relu20(self.bn1(self.conv1(x))).chunk(self.groups, dim=1)
        done: list[Tensor] = []
        for i, (group, conv, bn) in enumerate(zip(groups, self.convs, self.bns)):
            seen = group if i == 0 else self.join(i - 1, done[-1], group)
            done.append(relu20(bn(conv(seen))))
        y = self.bn3(self.conv3(torch.cat(done, dim=1)))
        return relu20(y + self.shortcut(x))

    def join(self, i: int, before: Tensor, group: Tensor) -> Tensor:
        return before + group if self.fuse_models is None else self.fuse_models[i](before, group)


class ERes2NetV2(ResidualNetwork):
    """waves (batch, samples) -> (batch, embedding_size); see spknet.models.network."""

    variants = tuple(SIZES)
    front_end = "3dspeaker"
    blocks = (3, 4, 6, 3)
    planes = 64

    def make_block(self, stage: int, inputs: int, channels: int, stride: int) -> nn.Module:
        return Block(inputs, channels, stride, SIZES[self.variant], fused=stage > 2)

    def build_head(self, config: ModelConfig) -> None:
        outputs, before = (layer[-1].conv3.out_channels for layer in (self.layer4, self.layer3))
        self.layer3_ds = conv3x3(before, outputs, 2)
        self.fuse34 = Fusion(outputs)
        self.pool = build_pooling(config.encoder, self.channels, floor=1e-8)
        self.seg_1 = nn.Linear(POOLINGS[config.encoder] * self.channels, config.embedding_size)

    def frames(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x[:, None])).relu()
        third = self.layer3(self.layer2(self.layer1(x)))
        return self.fuse34(self.layer4(third), self.layer3_ds(third)).flatten(1, 2)
