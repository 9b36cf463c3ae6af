"""ResNet with statistics pooling, as WeSpeaker and 3D-Speaker train it: ResNet18 to ResNet293 (He et al., 2016).

    stem     3x3, 32 channels                                 80 bands, T frames
    stage 1  32 channels, stride 1                            80, T
    2, 3, 4  64, 128, 256 channels, each first block / 2      40, T/2 · 20, T/4 · 10, T/8, rounded up
    pooling over time, channels x bands flattened -> Linear 256

A basic block is 3x3, norm, ReLU, 3x3, norm, plus the input, ReLU. A bottleneck is 1x1, 3x3, 1x1 with four times as
many channels at the end. Where shape changes, the input goes through a 1x1 convolution and a norm.

Variants: `wespeaker` adds 1e-7 to the variance, `3dspeaker` 1e-8 and has a second embedding layer (`two_emb_layer`):
ReLU, norm without parameters, Linear; its output is the embedding. WeSpeaker had it as an option until July 2022.
Names of parameters are those of both projects.

    ResNet34(ModelConfig(name="ResNet34"))(waves)  # (batch, samples) -> (batch, 256)
"""

from __future__ import annotations

from torch import Tensor, nn

from spknet.config import ModelConfig
from spknet.models.convolution import Conv2d
from spknet.models.network import Network
from spknet.models.pooling import POOLINGS, build_pooling

FLOOR = {"wespeaker": 1e-7, "3dspeaker": 1e-8}


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return Conv2d(inputs, outputs, 1, stride, bias=False)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The input as it is, or through a 1x1 convolution and a norm where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(inputs, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = conv1x1(inputs, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, 4 * channels)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.shortcut = shortcut(inputs, 4 * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.shortcut(x)).relu()


class ResidualNetwork(Network):
    """Stem and four stages of blocks; the subclass says which, `make_block` how. channels x bands go into the pooling."""

    time_stride = 8
    planes = 32  # channels of the first stage; doubled by each further one
    blocks: tuple[int, int, int, int]
    block: type[nn.Module]

    def build(self, config: ModelConfig) -> None:
        planes = [round(n * self.planes * config.width) for n in (1, 2, 4, 8)]
        self.conv1 = conv3x3(1, planes[0])
        self.bn1 = nn.BatchNorm2d(planes[0])
        inputs = planes[0]
        for i, (count, channels, stride) in enumerate(zip(self.blocks, planes, (1, 2, 2, 2)), start=1):
            stage = []
            for n in range(count):
                stage.append(self.make_block(i, inputs, channels, stride if n == 0 else 1))
                inputs = channels * stage[0].expansion
            setattr(self, f"layer{i}", nn.Sequential(*stage))
        self.channels = inputs * -(-self.bands // 8)
        self.build_head(config)

    def make_block(self, stage: int, inputs: int, channels: int, stride: int) -> nn.Module:
        return self.block(inputs, channels, stride)

    def build_head(self, config: ModelConfig) -> None:
        self.pool = build_pooling(config.encoder, self.channels, floor=FLOOR[self.variant])
        self.seg_1 = nn.Linear(POOLINGS[config.encoder] * self.channels, config.embedding_size)

    def frames(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x[:, None])).relu()  # (batch, channels, bands, frames)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.flatten(1, 2)

    def embed_frames(self, x: Tensor) -> Tensor:
        return self.seg_1(self.pool(x))


class ResNet(ResidualNetwork):
    """waves (batch, samples) -> (batch, embedding_size); see spknet.models.network."""

    variants = ("wespeaker", "3dspeaker")

    def build_head(self, config: ModelConfig) -> None:
        super().build_head(config)
        two = self.variant == "3dspeaker" if config.two_emb_layer is None else config.two_emb_layer
        self.norm_after_pooling = two
        self.seg_bn_1 = nn.BatchNorm1d(config.embedding_size, affine=False) if two else None
        self.seg_2 = nn.Linear(config.embedding_size, config.embedding_size) if two else None

    def embed_frames(self, x: Tensor) -> Tensor:
        x = super().embed_frames(x)
        return x if self.seg_2 is None else self.seg_2(self.seg_bn_1(x.relu()))


class ResNet18(ResNet):
    block, blocks = BasicBlock, (2, 2, 2, 2)


class ResNet34(ResNet):
    block, blocks = BasicBlock, (3, 4, 6, 3)


class ResNet50(ResNet):
    block, blocks = Bottleneck, (3, 4, 6, 3)


class ResNet101(ResNet):
    block, blocks = Bottleneck, (3, 4, 23, 3)


class ResNet152(ResNet):
    block, blocks = Bottleneck, (3, 8, 36, 3)


class ResNet221(ResNet):
    block, blocks = Bottleneck, (6, 16, 48, 3)


class ResNet293(ResNet):
    block, blocks = Bottleneck, (10, 20, 64, 3)
