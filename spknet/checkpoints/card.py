"""A network's card: what its scores mean, learned on development speakers, and how good it is. Plain values; no torch.

    RUN/card.json, FILE.card.json (beside FILE), or inside a file that carries its own:
    {"version": 1,
     "calibration": {"weight": a, "bias": b},      log-likelihood ratio (natural) of a cosine s: a s + b
     "target_prior": 0.5, "threshold": t,          a t + b + log(prior / (1 - prior)) = 0: "same speaker" from t on
     "histogram": {"edges": [n + 1 cosines], "targets": [n counts], "nontargets": [n]},      of the development trials
     "false_alarm_thresholds": [{"rate", "threshold", "miss_rate"}, ...],                    chosen on them
     "lists": [{"name", "role": "dev" | "test", "trials", "targets", "nontargets", "speakers",
                "figures": {"eer": percent, "min_dcf_p01", ...}, "intervals": {"eer": [low, high], ...} | null}, ...],
     "network": {"name", "embedding_size", "sample_rate", "parameters", "features"},
     "provenance": {"checkpoint", "step", "weights_sha256", "training_data", "training_speakers", "recipe", "date",
                    "version", ...},
     "license": text | null}

`spknet card RUN` makes it (spknet.use.make_card). A card belongs to weights, not to a path: `weights_sha256` says whose it is.

    card = find("runs/a"); card.probability(0.43); write("card.json", card); card == from_dict(to_dict(card))
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from shards.format import read_bytes, write_file
from spknet.errors import UserError

VERSION = 1
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class CardError(UserError):
    """A card cannot be read, or is another network's; the message says what to do."""


@dataclass(frozen=True, config=STRICT)
class Calibration:
    """llr = weight * cosine + bias, natural logarithm. weight: above 0."""

    weight: Annotated[float, Field(gt=0)]
    bias: float


@dataclass(frozen=True, config=STRICT)
class Histogram:
    """Development trials by their cosine. edges: n + 1, rising; targets, nontargets: n counts."""

    edges: list[float]
    targets: list[int]
    nontargets: list[int]


@dataclass(frozen=True, config=STRICT)
class FalseAlarms:
    """The threshold at which at most `rate` of the development non-targets pass, and the share of targets it misses."""

    rate: float
    threshold: float
    miss_rate: float


@dataclass(frozen=True, config=STRICT)
class ListFigures:
    """Figures of one trial list (spknet.evaluate.metrics), with 95 % intervals over speakers where there are any."""

    name: str
    role: Literal["dev", "test"]
    trials: int
    targets: int
    nontargets: int
    speakers: int
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]] | None = None


@dataclass(frozen=True, config=STRICT)
class Card:
    """See the head of this file. network, provenance: plain values by name."""

    calibration: Calibration
    target_prior: Annotated[float, Field(gt=0, lt=1)]
    threshold: float
    histogram: Histogram
    false_alarm_thresholds: list[FalseAlarms]
    lists: list[ListFigures]
    network: dict[str, Any]
    provenance: dict[str, Any]
    license: str | None = None
    version: Literal[1] = VERSION

    def llr(self, score: float) -> float:
        """Natural log-likelihood ratio of a cosine."""
        return self.calibration.weight * score + self.calibration.bias

    def probability(self, score: float) -> float:
        """That two voices of this cosine are one speaker's, where target_prior of all pairs are."""
        return 1 / (1 + math.exp(-max(-700.0, self.llr(score) + log_odds(self.target_prior))))

    @property
    def weights_sha256(self) -> str | None:
        return self.provenance.get("weights_sha256")


def log_odds(prior: float) -> float:
    return math.log(prior / (1 - prior))


def threshold_of(calibration: Calibration, prior: float) -> float:
    """The cosine from which on `same` is the likelier answer."""
    return (-log_odds(prior) - calibration.bias) / calibration.weight


def to_dict(card: Card) -> dict[str, Any]:
    """Plain values, as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(card)))


def from_dict(values: Any, name: str = "card") -> Card:
    """Raises CardError naming what does not fit. name: of the file, for the error."""
    try:
        return TypeAdapter(Card).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise CardError(
            f"{name}: no card of this version: {place}: {first['msg']}; make it with `spknet card`"
        ) from None


def read(path: str | Path) -> Card:
    """Raises CardError, or OSError where the file cannot be read."""
    try:
        return from_dict(json.loads(read_bytes(path)), str(path))
    except (ValueError, RecursionError) as error:
        raise CardError(f"{path}: not JSON ({error}); make it with `spknet card`") from None


def write(path: str | Path, card: Card) -> None:
    write_file(path, json.dumps(to_dict(card), indent=1) + "\n")


def place(path: str | Path) -> Path:
    """Where the card of a run folder, of a checkpoint in one, or of another file lies."""
    path = Path(path)
    if path.is_dir():
        return path / "card.json"
    if path.parent.name == "checkpoints":
        return path.parents[1] / "card.json"
    return path.with_name(path.name + ".card.json")


def find(path: str | Path) -> Card | None:
    """The card beside a run or a file; None where there is none."""
    return read(place(path)) if place(path).is_file() else None


def weights_digest(weights: dict[str, Any]) -> str:
    """SHA-256 of a network's state dict: names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
