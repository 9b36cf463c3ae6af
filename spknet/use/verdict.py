"""What `Network.verify` answers: are these two recordings of one voice, and why should the answer not be believed?

verdict = network.verify("a.wav", "b.wav"); verdict.score, verdict.probability, verdict.same, verdict.why
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from spknet.checkpoints.card import Card
from spknet.errors import UserError
from spknet.use.audio import Heard


@dataclass(frozen=True)
class Verdict:
    """score: cosine, -1 to 1. probability: of one speaker, and threshold: the score from which on they are the same, both of
    the network's card; None without one. why: sentences against trusting it, none where nothing speaks against it."""

    score: float
    probability: float | None
    threshold: float | None
    same: bool | None  # None: there is no threshold
    why: tuple[str, ...]

    def to_dict(self) -> dict:
        """Plain values, as JSON has them."""
        return asdict(self) | {"why": list(self.why)}

    def __str__(self) -> str:
        answer = {True: "same speaker", False: "different speakers", None: "undecided: no threshold"}[self.same]
        figures = [f"score {self.score:.3f}"]
        if self.threshold is not None:
            figures.append(f"threshold {self.threshold:.3f}")
        if self.probability is not None:
            figures.append(f"probability {self.probability:.3f}")
        return "\n".join([f"{answer}: {', '.join(figures)}", *(f"doubt: {said}" for said in self.why)])


def judge(score: float, card: Card | None, threshold: float | None, doubts: list[str]) -> Verdict:
    """The verdict of a cosine. threshold: instead of the card's. Raises UserError where no cosine can be it."""
    if threshold is not None and not -1 <= threshold <= 1:
        raise UserError(f"threshold {threshold:g}: scores are cosines; expected a number from -1 to 1")
    if threshold is None and card is not None:
        threshold = card.threshold
    same = None if threshold is None else score >= threshold
    return Verdict(score, None if card is None else card.probability(score), threshold, same, tuple(doubts))


def doubts(left: list[Heard], right: list[Heard], sample_rate: int) -> list[str]:
    """What speaks against two sides' recordings. sample_rate: the network's, Hz."""
    said = [text for heard in [*left, *right] for text in heard.doubts(sample_rate)]
    rates = sorted({heard.rate for heard in left}), sorted({heard.rate for heard in right})
    if rates[0] != rates[1]:
        sides = [" and ".join(map(str, side)) for side in rates]
        said.append(
            f"the voices' sample rates differ: {sides[0]} Hz and {sides[1]} Hz; a difference of channels lowers scores"
        )
    return list(dict.fromkeys(said))
