"""Res2Net34: groups of channels that see one another, clipped activations (Gao et al., 2021), as WeSpeaker has it.

As ResNet34 (spknet/models/resnet.py) in stem, stages and pooling. A block is a 1x1 convolution that takes the stride,
groups of channels that each go through a 3x3 convolution and also see the group before, and a 1x1 convolution to
twice the channels. Res2Net34 has two groups of channels / 2 and leaves the last as it is. ReLU is clipped at 20 in
blocks; the stem's is plain.

    Res2Net34(ModelConfig(name="Res2Net34"))(waves)  # (batch, samples) -> (batch, 256)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spknet.models.resnet import ResidualNetwork, conv1x1, conv3x3, shortcut


def relu20(x: Tensor) -> Tensor:
    return x.clamp(0, 20)


class Block(nn.Module):
    """(batch, inputs, bands, frames) -> (batch, 2 * channels, bands / stride, frames / stride)."""

    expansion = 2
    groups = 2

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        width = max(1, channels // 2)
        self.conv1 = conv1x1(inputs, self.groups * width, stride)
        self.bn1 = nn.BatchNorm2d(self.groups * width)
        self.convs = nn.ModuleList(conv3x3(width, width) for _ in range(self.groups - 1))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(self.groups - 1))
        self.conv3 = conv1x1(self.groups * width, 2 * channels)
        self.bn3 = nn.BatchNorm2d(2 * channels)
        self.shortcut = shortcut(inputs, 2 * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        *groups, last = relu20(self.bn1(self.conv1(x))).chunk(self.groups, dim=1)
        done: list[Tensor] = []
        for group, conv, bn in zip(groups, self.convs, self.bns):
            seen = done[-1] + group if done else group
            done.append(relu20(bn(conv(seen))))
        y = self.bn3(self.conv3(torch.cat([*done, last], dim=1)))
        return relu20(y + self.shortcut(x))


class Res2Net34(ResidualNetwork):
    """waves (batch, samples) -> (batch, embedding_size); see spknet.models.network."""

    block, blocks = Block, (3, 4, 6, 3)
