"""The networks by name: waves (batch, samples) -> embeddings (batch, embedding_size).

model = build_model(ModelConfig(name="ResNetSE34L", encoder="SAP"))
"""

from __future__ import annotations

import difflib

from torch import nn

from spknet.config import ConfigError, FeaturesConfig, ModelConfig
from spknet.models.rawnet3 import RawNet3
from spknet.models.resnet import ResNet18, ResNet34, ResNet50, ResNet101, ResNet152, ResNet221, ResNet293
from spknet.models.resnet_se import ResNetSE34, ResNetSE34L, ResNetSE34V2
from spknet.models.vggvox import VGGVox

MODELS: dict[str, type[nn.Module]] = {
    "ResNetSE34": ResNetSE34,
    "ResNetSE34L": ResNetSE34L,
    "ResNetSE34V2": ResNetSE34V2,
    "VGGVox": VGGVox,
    "VGGVox40": VGGVox,
    "RawNet3": RawNet3,
    "ResNet18": ResNet18,
    "ResNet34": ResNet34,
    "ResNet50": ResNet50,
    "ResNet101": ResNet101,
    "ResNet152": ResNet152,
    "ResNet221": ResNet221,
    "ResNet293": ResNet293,
}


def build_model(config: ModelConfig, sample_rate: int = 16000, features: FeaturesConfig | None = None) -> nn.Module:
    """The network of a configuration, in training mode; its attribute sample_rate is what it wants to be given, Hz.

    features: the front end; None: as published. ConfigError where name, encoder, variant, n_mels or front end do not fit.
    """
    if config.name not in MODELS:
        near = difflib.get_close_matches(config.name, MODELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"model.name {config.name}: no such network; {hint}networks: {', '.join(MODELS)}")
    network = MODELS[config.name]
    if config.encoder not in network.encoders:
        raise ConfigError(
            f"model.encoder {config.encoder}: {config.name} has no such encoder; it takes {', '.join(network.encoders)}"
        )
    built = network(config, sample_rate, features)
    built.sample_rate = sample_rate
    return built
