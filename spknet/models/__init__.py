"""The networks by name: waves (batch, samples) -> embeddings (batch, embedding_size).

model = build_model(ModelConfig(name="ResNetSE34L", encoder="SAP"))
"""

from __future__ import annotations

from torch import nn

from shards.commands import did_you_mean
from spknet.config import ConfigError, FeaturesConfig, ModelConfig
from spknet.models.campplus import CAMPlusPlus
from spknet.models.dfresnet import DFResNet60, DFResNet114, DFResNet183, DFResNet237
from spknet.models.ecapa import ECAPA, ECAPA512, ECAPA1024
from spknet.models.eres2netv2 import ERes2NetV2
from spknet.models.lstm import GE2ELSTM
from spknet.models.network import Network
from spknet.models.rawnet3 import RawNet3
from spknet.models.redimnet import LAYOUTS, ReDimNet, ReDimNet2
from spknet.models.res2net import Res2Net34
from spknet.models.resnet import ResNet18, ResNet34, ResNet50, ResNet101, ResNet152, ResNet221, ResNet293
from spknet.models.resnet_se import ResNetSE34, ResNetSE34L, ResNetSE34V2
from spknet.models.simam import SimAMResNet34, SimAMResNet100
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
    "Res2Net34": Res2Net34,
    "ERes2NetV2": ERes2NetV2,
    "SimAM-ResNet34": SimAMResNet34,
    "SimAM-ResNet100": SimAMResNet100,
    "DF-ResNet60": DFResNet60,
    "DF-ResNet114": DFResNet114,
    "DF-ResNet183": DFResNet183,
    "DF-ResNet237": DFResNet237,
    "ECAPA-512": ECAPA512,
    "ECAPA-1024": ECAPA1024,
    "CAM++": CAMPlusPlus,
    "GE2E-LSTM": GE2ELSTM,
    **{name: ReDimNet2 if name.startswith("ReDimNet2") else ReDimNet for name in LAYOUTS},
}


def build_model(config: ModelConfig, sample_rate: int = 16000, features: FeaturesConfig | None = None) -> nn.Module:
    """The network of a configuration, in training mode; its attribute sample_rate is what it wants to be given, Hz.

    features: the front end; None: as published. ConfigError where name, encoder, variant, n_mels or front end do not fit.
    """
    if config.name not in MODELS:
        hint = did_you_mean(config.name, MODELS)
        raise ConfigError(f"model.name {config.name}: no such network; {hint}networks: {', '.join(MODELS)}")
    network = MODELS[config.name]
    if config.encoder not in network.encoders:
        raise ConfigError(
            f"model.encoder {config.encoder}: {config.name} has no such encoder; it takes {', '.join(network.encoders)}"
        )
    if features and features.batch_norm and not issubclass(network, Network):
        raise ConfigError(f"features.batch_norm: {config.name} normalises in its own way; leave it out")
    if config.pool_input and not issubclass(network, ECAPA):
        raise ConfigError(f"model.pool_input: {config.name} has no such option; give ECAPA-512 or ECAPA-1024")
    built = network(config, sample_rate, features)
    built.sample_rate = sample_rate
    return built
