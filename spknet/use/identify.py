"""Whose voice is it, of those that `spknet enroll` knows? Exit status 0: somebody's, 1: nobody's that is known, 2: no answer.

    spknet identify call.wav --checkpoint runs/a --among voices

Every enrolled voice is compared as by `spknet verify`; the best one is the answer where its score reaches the threshold. With
many voices a stranger is taken for one of them more often than the probability of a single pair says.
"""

from __future__ import annotations

import json
import sys

from spknet.checkpoints.card import weights_digest
from spknet.errors import UserError, run
from spknet.use import verdict
from spknet.use.commands import NO_DECISION, Parser, network_of
from spknet.use.enrolments import EnrolmentError, Enrolments, Voice
from spknet.use.network import Audio, Network, cosine, mean_voice
from spknet.use.verdict import Verdict

KNOWN, UNKNOWN = 0, 1  # exit statuses


def identify(
    network: Network, audio: Audio, voices: dict[str, Voice], threshold: float | None = None
) -> dict[str, Verdict]:
    """A verdict for each enrolled voice, the likeliest first. Raises EnrolmentError where another network enrolled one."""
    weights = weights_digest(network.model.state_dict())
    strangers = [name for name, voice in voices.items() if voice.weights_sha256 != weights]
    if strangers:
        raise EnrolmentError(
            f"{strangers[0]!r} and {len(strangers) - 1} more were enrolled with another network; enroll them anew with --replace"
        )
    [(vector, heard)] = network.hear(audio)
    doubts = verdict.doubts([heard], [heard], network.sample_rate) + ([] if network.card else [network.uncalibrated])
    scores = {name: cosine(vector, mean_voice(list(voice.vectors))) for name, voice in voices.items()}
    ordered = sorted(scores, key=lambda name: -scores[name])
    return {name: verdict.judge(scores[name], network.card, threshold, doubts) for name in ordered}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser("spknet identify", __doc__)
    parser.add("file", help="a recording")
    parser.add("--among", default="voices", metavar="FOLDER", help="folder of enrolments")
    parser.add("--threshold", type=float, help="cosine from which on it is somebody (default: the card's)")
    parser.add("--json", action="store_true", help="print {name, scores: {name: {score, probability, ...}}, why}")
    chosen = parser.parse_args(argv)
    voices = Enrolments(chosen.among).all()
    network = network_of(chosen)
    verdicts = identify(network, chosen.file, voices, chosen.threshold)
    name, best = next(iter(verdicts.items()))
    if chosen.json:
        scores = {other: {"score": v.score, "probability": v.probability} for other, v in verdicts.items()}
        answer = {"name": name if best.same else None, "threshold": best.threshold, "scores": scores}
        print(json.dumps(answer | {"why": list(best.why)}))
    else:
        print(_text(verdicts))
    if best.same is None:
        raise UserError(NO_DECISION)
    return KNOWN if best.same else UNKNOWN


def _text(verdicts: dict[str, Verdict]) -> str:
    """The answer, the five likeliest voices, the doubts."""
    name, best = next(iter(verdicts.items()))
    answer = {True: name, False: "nobody who is enrolled", None: "undecided: no threshold"}[best.same]
    lines = [answer if best.threshold is None else f"{answer} (threshold {best.threshold:.3f})"]
    for other, found in list(verdicts.items())[:5]:
        odds = "" if found.probability is None else f"  probability {found.probability:.3f}"
        lines.append(f"  {found.score:6.3f}{odds}  {other}")
    return "\n".join([*lines, *(f"doubt: {said}" for said in best.why)])


if __name__ == "__main__":
    sys.exit(run(main))
