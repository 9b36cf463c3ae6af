"""The losses by name; see spknet.losses.base for a call, classification, sphereface2 and metric for the formulas.

loss = build_loss(LossConfig(name="angleproto"), embedding_size=512, n_classes=5994, utterances_per_speaker=2)
"""

from __future__ import annotations

import warnings

from shards.commands import did_you_mean
from spknet.config import ConfigError, LossConfig
from spknet.losses.base import Loss
from spknet.losses.classification import AAMSoftmax, AMSoftmax, Softmax
from spknet.losses.metric import (
    GE2E,
    AngularPrototypical,
    Contrastive,
    Prototypical,
    SoftmaxPrototypical,
    SupervisedContrastive,
    Triplet,
)
from spknet.losses.sharded import Sharded, ShardedSphereFace2
from spknet.losses.sphereface2 import SphereFace2

LOSSES: dict[str, type[Loss]] = {
    "softmax": Softmax,
    "amsoftmax": AMSoftmax,
    "aamsoftmax": AAMSoftmax,
    "sphereface2": SphereFace2,
    "ge2e": GE2E,
    "proto": Prototypical,
    "angleproto": AngularPrototypical,
    "softmaxproto": SoftmaxPrototypical,
    "triplet": Triplet,
    "contrastive": Contrastive,
    "supcon": SupervisedContrastive,
}
# Those with a weight vector for each class.
CLASSIFIERS = ("softmax", "amsoftmax", "aamsoftmax", "sphereface2", "softmaxproto")
SHARDED = {"softmax": Sharded, "amsoftmax": Sharded, "aamsoftmax": Sharded, "sphereface2": ShardedSphereFace2}
LARGE = 2**24  # weights from which on a head is cut by itself: 64 MiB in float32


def build_loss(config: LossConfig, embedding_size: int, n_classes: int, utterances_per_speaker: int) -> Loss:
    """The loss of a configuration.

    n_classes: labels that the data has; config.n_classes may ask for more of them (a warning), not for fewer.
    Raises ConfigError for an unknown name, an M the loss cannot take, fewer classes than labels.
    """
    if config.name not in LOSSES:
        hint = did_you_mean(config.name, LOSSES)
        raise ConfigError(f"loss.name {config.name}: no such loss; {hint}losses: {', '.join(LOSSES)}")
    kind = LOSSES[config.name]
    _check_utterances(config.name, kind, utterances_per_speaker)
    _check_values(config)
    if config.name not in CLASSIFIERS:
        return kind(config)
    classes = _classes(config, n_classes)
    if sharded(config, embedding_size, classes):
        return SHARDED[config.name](kind, config, embedding_size, classes)
    return kind(config, embedding_size, classes)


def sharded(config: LossConfig, embedding_size: int, n_classes: int) -> bool:
    """Whether the head is cut over the ranks: a matter of its size and of loss.sharded, not of the number of ranks."""
    if config.sharded == "auto":
        return config.name in SHARDED and n_classes * config.sub_centers * embedding_size >= LARGE
    return config.sharded


def _check_utterances(name: str, kind: type[Loss], m: int) -> None:
    if m < kind.fewest or (kind.most is not None and m > kind.most):
        fits = f"exactly {kind.most}" if kind.most == kind.fewest else f"{kind.fewest} or more"
        raise ConfigError(f"data.utterances_per_speaker {m}: {name} takes {fits} utterances of each speaker in a batch")


def _check_values(config: LossConfig) -> None:
    first, last = config.margin_start_epoch, config.margin_end_epoch
    if config.margin_schedule != "constant" and last <= first:
        raise ConfigError(
            f"loss.margin_end_epoch {last:g}: the margin begins to grow at epoch {first:g} (loss.margin_start_epoch);"
            " give a later one"
        )
    if config.sharded is True and config.name not in SHARDED:
        raise ConfigError(
            f"loss.sharded true: {config.name} has no head that can be cut; these have: {', '.join(SHARDED)}"
        )
    if config.shards & (config.shards - 1):
        raise ConfigError(f"loss.shards {config.shards}: expected a power of 2, such as 64")


def _classes(config: LossConfig, found: int) -> int:
    asked = config.n_classes
    if asked is None:
        return found
    if asked < found:
        raise ConfigError(
            f"loss.n_classes {asked}: the data has {found} speakers; give at least {found}, or leave it out"
        )
    if asked > found:
        warnings.warn(
            f"loss.n_classes {asked}: the data has {found} speakers; the others are never right", stacklevel=3
        )
    return asked
