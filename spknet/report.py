"""What an evaluation says: figures with intervals, breakdowns and thresholds, as report.json, as text, as one HTML page.

    report.json = {"version", "step", "lists": [{"name", "path", "role", "trials", "speakers", "scores": {system: file},
        "systems": {system: {"eer", "min_dcf_p01", ..., "interval": {"eer": [low, high], ...}}}, ...}], ...}

EER is in percent, everything else as in spknet.metrics; a system is one way of scoring (cosine, AS-norm, calibrated, ...).

    found = figures(scores, trials); write_json("report.json", {"version": VERSION, "lists": [...]})
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from shards.format import atomic_write
from spknet import bootstrap, metrics
from spknet.trials import Trials, speaker_of

VERSION = 1
REPLICATES = 1000


def speaker_numbers(trials: Trials, known: dict[str, str] | None = None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Speakers of the trials' sides: (n,) and (n,) numbers, and the names they count. known: utterance -> speaker."""
    of_models = [speaker_of(trials.utterances_of(model)[0], known) for model in trials.models]
    of_tests = [speaker_of(test, known) for test in trials.tests]
    names = sorted(set(of_models) | set(of_tests))
    place = {name: i for i, name in enumerate(names)}
    left = np.array([place[name] for name in of_models])[trials.left]
    right = np.array([place[name] for name in of_tests])[trials.right]
    return left, right, names


def speakers(trials: Trials, known: dict[str, str] | None = None) -> int:
    """Distinct speakers of a list."""
    return len(speaker_numbers(trials, known)[2])


def figures(
    scores: np.ndarray,
    trials: Trials,
    *,
    definition: str = "default",
    replicates: int = REPLICATES,
    known: dict[str, str] | None = None,
    llr: bool = False,
) -> dict:
    """Figures of one system on one labelled list, with 95 % intervals over speakers.

    definition: of EER and minDCF, default or voxceleb_trainer. llr: scores are log-likelihood ratios. `interval` is None, with
    the reason in `no_interval`, where names do not tell speakers.
    """
    found = metrics.figures(scores, trials.labels, definition)
    if llr:
        found |= metrics.llr_figures(scores, trials.labels)
    left, right, names = speaker_numbers(trials, known)
    contradicting = int(((left == right) != (trials.labels == 1)).sum())
    if contradicting or replicates == 0 or len(names) < 2:
        said = (
            f"{contradicting} labels contradict the speakers in the names; give --utt2spk"
            if contradicting
            else "not asked for"
        )
        return found | {"interval": None, "no_interval": said}
    drawn = bootstrap.replicate(scores, trials.labels, left, right, replicates)
    return found | {"interval": bootstrap.intervals(drawn), "replicates": replicates}


def write_json(path: str | Path, report: dict) -> None:
    """The report as JSON; infinite thresholds as the strings `inf` and `-inf`, so that any reader takes it."""
    with atomic_write(path) as file:
        file.write(json.dumps(_plain(report), indent=1, allow_nan=False).encode() + b"\n")


def _plain(value):
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
