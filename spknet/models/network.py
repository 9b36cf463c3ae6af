"""What networks on frames of features have in common: waves -> features -> frames -> pooling -> embedding.

    class MyNetwork(Network):
        variants = ("mine",)                                # the first is what model.variant auto means

        def build(self, config):                            # self.features, self.bands and self.variant are there
            self.layers = ...
            self.pool = build_pooling(config.encoder, channels)
            self.seg_1 = nn.Linear(POOLINGS[config.encoder] * channels, config.embedding_size)

        def frames(self, x):                                # (batch, bands, frames) -> (batch, channels, frames)
            ...

        def embed_frames(self, x):                          # (batch, channels, frames) -> (batch, embedding_size)
            return self.seg_1(self.pool(x))

`frames` runs in the precision of the autocast, `embed_frames` in its parameters': statistics in bfloat16 lose what
they measure.

`features.batch_norm` puts a BatchNorm over the bands between features and network, as `input_norm`. With
`features.remove_mean false` the mean spectrum of an utterance stays: what voice, microphone and room have in common.
Bands are then far from 0, which is what convolutions pad with and masks put in, until that norm brings them there.

Frames. A pooling that needs a deviation needs two frames, so a network that strides time by s needs s + 1 frames of
features (ResNet34: 9). Fewer are repeated from the first on until there are enough. Batches hold utterances of one
length: training crops them so and evaluation groups them so. Padding would be frames like any others; only a network
that `takes_lengths` (SpeechBrain's ECAPA-TDNN) can leave it out, the others refuse `lengths`.

Names of parameters are the official project's wherever one class serves all variants; where they are not, `renames`
turns theirs into ours, as pairs of a pattern and its replacement. `from_official` applies them.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from spknet.config import ConfigError, FeaturesConfig, ModelConfig
from spknet.models.features import apply_masks, at_least, full_precision
from spknet.models.front_ends import build_features
from spknet.models.pooling import POOLINGS, fewest_frames


class Network(nn.Module):
    """waves (batch, samples) in [-1, 1] -> embeddings (batch, embedding_size).

    masks (batch, 2 K, 2): SpecAugment, see spknet.models.features.apply_masks. Raises ConfigError for a variant it does not have.
    """

    encoders: tuple[str, ...] = tuple(POOLINGS)
    variants: tuple[str, ...] = ("wespeaker",)
    renames: dict[str, list[tuple[str, str]]] = {}  # variant -> pairs (pattern, replacement) of re.sub
    front_end: str | None = None  # whose features it was published with, where that is not the variant's name
    time_stride = 1  # frames of features for one frame of the pooling
    takes_lengths = False
    norm_after_pooling = False  # a BatchNorm sees one value a channel and utterance: training wants two utterances

    def __init__(self, config: ModelConfig, sample_rate: int = 16000, features: FeaturesConfig | None = None):
        super().__init__()
        self.variant = self.variants[0] if config.variant == "auto" else config.variant
        if self.variant not in self.variants:
            raise ConfigError(
                f"model.variant {config.variant}: {config.name} has no such variant; it has {', '.join(self.variants)}"
            )
        self.features = build_features(config, sample_rate, features, self.front_end or self.variant)
        self.bands = self.features.bands
        # Of features; an utterance of fewer is repeated.
        self.fewest_frames = self.time_stride * (fewest_frames(config.encoder) - 1) + 1
        self.input_norm = nn.BatchNorm1d(self.bands) if features and features.batch_norm else None
        self.build(config)

    def build(self, config: ModelConfig) -> None:
        """Makes the layers."""
        raise NotImplementedError

    def frames(self, x: Tensor) -> Tensor:
        """(batch, bands, frames) -> (batch, channels, frames), in the autocast's precision."""
        raise NotImplementedError

    def embed_frames(self, x: Tensor) -> Tensor:
        """(batch, channels, frames) -> (batch, embedding_size), in the precision of the parameters."""
        raise NotImplementedError

    def forward(self, waves: Tensor, masks: Tensor | None = None) -> Tensor:
        if self.input_norm is None:
            return self.embed_features(self.features(waves, masks).mT)
        with full_precision(waves):
            features = self.input_norm(self.features(waves))
        return self.embed_features(apply_masks(features, masks).mT)

    def embed_features(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(batch, frames, bands), normalised by `input_norm` where there is one -> (batch, embedding_size).

        lengths (batch,): the part of each row's frames that is no padding, in (0, 1]; where `takes_lengths`.
        """
        if lengths is not None and not self.takes_lengths:
            raise ConfigError(
                f"{type(self).__name__} cannot leave padding out; embed utterances of one length together, without `lengths`"
            )
        if self.norm_after_pooling and self.training and len(features) * _ranks() == 1:
            raise ConfigError(
                f"{type(self).__name__} normalises over the batch after pooling, so it trains on at least two utterances at"
                " once, found one; raise --data.speakers_per_batch or --train.chunk"
            )
        x = at_least(features, self.fewest_frames, dim=1).mT
        x = self.frames(x) if lengths is None else self.frames(x, lengths)
        with full_precision(x):
            x = x.to(next(self.parameters()).dtype)
            return self.embed_frames(x) if lengths is None else self.embed_frames(x, lengths)

    def our_name(self, key: str) -> str:
        """The name here of an official checkpoint's entry."""
        for pattern, replacement in self.renames.get(self.variant, []):
            key = re.sub(pattern, replacement, key)
        return key

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official checkpoint's entries under our names; a 1x1 convolution that is a linear layer here is reshaped."""
        own, renamed = self.state_dict(), {}
        for key, value in state.items():
            key = self.our_name(key)
            ones = (1,) * (value.dim() - own[key].dim()) if key in own else ()
            renamed[key] = value.reshape(own[key].shape) if ones and value.shape == own[key].shape + ones else value
        return renamed


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
