"""SimAM-ResNet34 and 100: a wide ResNet with attention without parameters (Yang et al., 2021; Qin et al., 2022).

As ResNet34 in stem and stages, with 64 to 512 channels (`model.width` 0.5: WeSpeaker's in_planes 32). After the
second norm of a block each value is weighed by how far it stands out from its channel's mean over bands and frames,

    x * sigmoid(d / (4 (v + 1e-4)) + 0.5)        d = (x - mean)^2        v = sum(d) / (bands * frames - 1)

so a gate depends on how much is in the utterance, padding included. Pooling: attentive statistics (ASP) of 512
channels x 10 bands. WeSpeaker's names of parameters are ours but for `renames`.

    SimAMResNet34(ModelConfig(name="SimAM-ResNet34"))(waves)  # (batch, samples) -> (batch, 256)
"""

from __future__ import annotations

from torch import Tensor

from spknet.models.resnet import BasicBlock, ResidualNetwork

RENAMES = [
    (r"^front\.", ""),
    (r"\.downsample\.", ".shortcut."),
    (r"^pooling\.attention\.0\.", "pool.squeeze."),
    (r"^pooling\.attention\.2\.", "pool.norm."),
    (r"^pooling\.attention\.3\.", "pool.expand."),
    (r"^bottleneck\.", "seg_1."),
]


def simam(x: Tensor) -> Tensor:
    """(batch, channels, bands, frames) -> the same shape."""
    distance = (x - x.mean(dim=(2, 3), keepdim=True)).square()
    variance = distance.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
    return x * (distance / (4 * (variance + 1e-4)) + 0.5).sigmoid()


class Block(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (simam(self.bn2(self.conv2(y))) + self.shortcut(x)).relu()


class SimAMResNet(ResidualNetwork):
    """waves (batch, samples) -> (batch, embedding_size); see spknet.models.network."""

    renames = {"wespeaker": RENAMES}
    planes = 64
    block = Block


class SimAMResNet34(SimAMResNet):
    blocks = (3, 4, 6, 3)


class SimAMResNet100(SimAMResNet):
    blocks = (6, 16, 24, 3)
