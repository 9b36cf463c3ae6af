"""VGG-M-40: a plain convolutional network on 40 mel bands (Chung et al., 2020; Chatfield et al., 2014).

    96 5x7 -> pool -> 256 5x5 -> pool -> 384, 256, 256 3x3 -> pool -> 512 4x1, which takes the 4 bands left -> encoder

Each convolution is followed by norm and ReLU. Kernel sizes and strides are (bands, frames).

    VGGVox(ModelConfig(name="VGGVox"))(waves)  # (batch, samples) -> (batch, 512)
"""

from __future__ import annotations

from torch import Tensor, nn

from spknet.config import ConfigError, FeaturesConfig, ModelConfig
from spknet.models.features import at_least
from spknet.models.front_ends import build_features
from spknet.models.pooling import POOLINGS, build_head

MELS = 40
FEWEST_FRAMES = 63  # three poolings leave one frame of these,
FRAMES_FOR_TWO = 95  # and two of these


class VGGVox(nn.Module):
    """waves (batch, samples) in [-1, 1] -> embeddings (batch, embedding_size). Its analysis window is Hann by default.

    masks (batch, 2 K, 2): SpecAugment, see spknet.models.features.apply_masks. Crops of less than 0.62 s (0.94 s for TSTP, TSDP and ASTP-GLOB) are repeated. Raises ConfigError for other than 40 mel bands.
    """

    encoders = tuple(POOLINGS)

    def __init__(self, config: ModelConfig, sample_rate: int = 16000, features: FeaturesConfig | None = None):
        super().__init__()
        if config.n_mels != MELS:
            raise ConfigError(
                f"model.n_mels {config.n_mels}: {config.name} takes {MELS}, its last kernel spans 4 bands"
            )
        self.features = build_features(config, sample_rate, features, "2020", window="hann")

        def stage(inputs: int, outputs: int, kernel: tuple, stride: tuple = (1, 1), padding: tuple = (1, 1)) -> list:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, padding)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

        a, b, c, d = (max(8, round(n * config.width)) for n in (96, 256, 384, 512))
        self.layers = nn.Sequential(
            *stage(1, a, (5, 7), (1, 2), (2, 2)),
            nn.MaxPool2d((1, 3), (1, 2)),
            *stage(a, b, (5, 5), (2, 2)),
            nn.MaxPool2d((3, 3), (2, 2)),
            *stage(b, c, (3, 3)),
            *stage(c, b, (3, 3)),
            *stage(b, b, (3, 3)),
            nn.MaxPool2d((3, 3), (2, 2)),
            *stage(b, d, (4, 1), padding=(0, 0)),
        )
        self.head = build_head(config.encoder, d, config.embedding_size)
        self.fewest_frames = FRAMES_FOR_TWO if self.head.fewest == 2 else FEWEST_FRAMES

    def forward(self, waves: Tensor, masks: Tensor | None = None) -> Tensor:
        shortest = (self.fewest_frames - 1) * self.features.hop
        waves = at_least(waves, shortest, dim=1)
        x = self.layers(self.features(waves, masks)[:, None])  # (batch, channels, 1, frames)
        return self.head(x[:, :, 0])
