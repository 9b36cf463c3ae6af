"""DF-ResNet60, 114, 183 and 237: deep and narrow (B. Liu et al., 2022), strides of "Gemini" (T. Liu et al., 2024).

    stem        3x3, 32 channels, norm, ReLU
    stage 1-4   32, 64, 128, 256 channels; before each a 3x3 convolution and a norm without activation: bands / 2 each
                time, frames / 2 before the second
    pool        mean and deviation of 256 channels x 5 bands, frames 20 ms apart · Linear 256

A block widens fourfold by 1x1, norm, ReLU; filters each channel by 3x3, norm, ReLU; narrows by 1x1, norm; plus the
input, ReLU. Names of parameters are WeSpeaker's.

    DFResNet114(ModelConfig(name="DF-ResNet114"))(waves)  # (batch, samples) -> (batch, 256)
"""

from __future__ import annotations

from torch import Tensor, nn

from spknet.config import ModelConfig
from spknet.models.network import Network
from spknet.models.pooling import POOLINGS, build_pooling
from spknet.models.resnet import conv1x1

STRIDES = ((2, 1), (2, 2), (2, 1), (2, 1))  # bands, frames, before each stage


class Block(nn.Module):
    """(batch, channels, bands, frames) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        wide = 4 * channels
        self.conv1 = conv1x1(channels, wide)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = conv1x1(wide, channels)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + x).relu()


def conv_norm(inputs: int, outputs: int, stride: tuple[int, int]) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)]


class DFResNet(Network):
    """waves (batch, samples) -> (batch, embedding_size); see spknet.models.network."""

    time_stride = 2
    depths: tuple[int, int, int, int]

    def build(self, config: ModelConfig) -> None:
        channels = [max(1, round(n * config.width)) for n in (32, 32, 64, 128, 256)]
        self.downsample_layers = nn.ModuleList([nn.Sequential(*conv_norm(1, channels[0], (1, 1)), nn.ReLU())])
        for inputs, outputs, stride in zip(channels, channels[1:], STRIDES):
            self.downsample_layers.append(nn.Sequential(*conv_norm(inputs, outputs, stride)))
        self.stages = nn.ModuleList(
            nn.Sequential(*[Block(width) for _ in range(depth)]) for width, depth in zip(channels[1:], self.depths)
        )
        pooled = channels[-1] * -(-self.bands // 16)
        self.pool = build_pooling(config.encoder, pooled)
        self.seg_1 = nn.Linear(POOLINGS[config.encoder] * pooled, config.embedding_size)

    def frames(self, x: Tensor) -> Tensor:
        x = self.downsample_layers[0](x[:, None])
        for downsample, stage in zip(self.downsample_layers[1:], self.stages):
            x = stage(downsample(x))
        return x.flatten(1, 2)

    def embed_frames(self, x: Tensor) -> Tensor:
        return self.seg_1(self.pool(x))


class DFResNet60(DFResNet):
    depths = (3, 3, 9, 3)


class DFResNet114(DFResNet):
    depths = (3, 3, 27, 3)


class DFResNet183(DFResNet):
    depths = (3, 8, 45, 3)


class DFResNet237(DFResNet):
    depths = (3, 8, 63, 3)
