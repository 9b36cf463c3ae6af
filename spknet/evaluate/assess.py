"""From embeddings to a finished evaluation: scores of every list by every system, figures, files, pictures.

result = assess(lists, roles, embedded, Backend(), Path("out"), {"step": 1200}, Ask()); flat(result)["eer"]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shards.format import atomic_write
from spknet.evaluate import groups as breakdown
from spknet.evaluate import plots as pictures
from spknet.evaluate import report, scoring
from spknet.evaluate.scoring import ScoringError
from spknet.evaluate.systems import Backend, Embedded
from spknet.evaluate.trials import Trials, speaker_of

UNLOGGED = ("eer_threshold", "replicates")  # figures that are no curve over the steps


@dataclass(frozen=True)
class Ask:
    """What a report is to contain."""

    metrics: str = "default"  # or voxceleb_trainer
    bootstrap: int = report.REPLICATES  # replicates of the intervals; 0: none
    calibrate: bool = False
    pictures: bool = True  # all of them and report.html; det.png is always drawn
    breakdown: bool = True
    by: tuple[str, ...] = ()  # columns of the metadata to break down by
    metadata: tuple | None = None  # spknet.evaluate.groups.read_metadata's
    speakers: dict[str, str] | None = None  # utterance -> speaker, where names do not tell


@dataclass(frozen=True)
class Scored:
    """A list with its scores by every system; the last system is the one that counts."""

    trials: Trials
    role: str  # test or dev
    systems: dict[str, np.ndarray]

    @property
    def labels(self) -> np.ndarray | None:
        return self.trials.labels

    @property
    def last(self) -> tuple[str, np.ndarray]:
        return list(self.systems.items())[-1]


def assess(
    lists: list[Trials],
    roles: list[str],
    embedded: Embedded,
    backend: Backend,
    out_dir: Path,
    facts: dict,
    ask: Ask,
    rivals: dict[str, Embedded] | None = None,
) -> dict:
    """Scores every list, writes scores, report.json and det.png (and the rest that is asked for), returns the report.

    roles: test or dev, one a list. facts: what stands at the head of the report. rivals: embeddings scored plainly beside,
    such as the untrained network's.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if ask.calibrate:
        labelled_dev = [t for t, role in zip(lists, roles) if role == "dev" and t.labels is not None]
        if not labelled_dev:
            raise ScoringError("calibration is learned on development trials with labels; give --dev_trials LIST")
        backend.calibrate(labelled_dev[0], embedded)
    plain = replace(backend, subtract_mean=False, as_norm=0, calibration=None)
    scored = []
    for trials, role in zip(lists, roles):
        beside = {name: list(plain.systems(trials, rival).values())[-1] for name, rival in (rivals or {}).items()}
        scored.append(Scored(trials, role, beside | backend.systems(trials, embedded)))
    labelled = [one for one in scored if one.labels is not None]
    dev = next((one for one in labelled if one.role == "dev"), None)
    result = {"version": report.VERSION} | facts | {"lists": []}
    for number, one in enumerate(scored):
        entry = {"name": one.trials.name, "path": one.trials.path, "role": one.role, "trials": len(one.trials)}
        entry["scores"] = _write_systems(out_dir, one, headline=number == 0)
        result["lists"].append(entry | (_describe(one, dev, embedded, ask) if one in labelled else {}))
    report.write_json(out_dir / "report.json", result)
    drawn = {"det": pictures.det({one.trials.name: (one.last[1], one.labels) for one in labelled})} if labelled else {}
    if ask.pictures:
        drawn |= _draw(labelled, embedded, ask)
        report.write_html(out_dir / "report.html", result, drawn)
    for name, png in drawn.items():
        pictures.save(out_dir / f"{name}.png", png)
    return result


def write_scores(path: Path, trials: Trials, scores: np.ndarray) -> None:
    """`score left right` a trial, with target or nontarget behind it where the list says so; 9 digits hold a float32."""
    labels = [""] * len(trials) if trials.labels is None else [(" nontarget", " target")[v] for v in trials.labels]
    lines = [
        f"{score:.9g} {trials.models[a]} {trials.tests[b]}{label}\n"
        for score, a, b, label in zip(scores.tolist(), trials.left, trials.right, labels)
    ]
    with atomic_write(path) as file:
        file.write("".join(lines).encode())


def _write_systems(out_dir: Path, one: Scored, headline: bool) -> dict[str, str]:
    """A file for each system -> {system: file name}; the last system's is scores.txt, or scores-LIST.txt."""
    files = {}
    for system, scores in one.systems.items():
        parts = ["scores"] + ([] if headline else [one.trials.name]) + ([] if system == one.last[0] else [system])
        files[system] = "-".join(parts) + ".txt"
        write_scores(out_dir / files[system], one.trials, scores)
    return files


def _describe(one: Scored, dev: Scored | None, embedded: Embedded, ask: Ask) -> dict:
    """A labelled list's part of the report."""
    found: dict = {"speakers": report.speakers(one.trials, ask.speakers), "systems": {}}
    for system, scores in one.systems.items():
        options = {"definition": ask.metrics, "replicates": ask.bootstrap, "known": ask.speakers}
        found["systems"][system] = report.figures(scores, one.trials, llr=system == "calibrated", **options)
    system, scores = one.last
    if one.role == "test":
        chooser = None if dev is None else (dev.systems[system], dev.labels)
        found["thresholds"] = breakdown.threshold_card((scores, one.labels), chooser)
    if ask.breakdown:
        threshold = found["systems"][system]["eer_threshold"]
        shorter = np.minimum(
            *(side / embedded.sample_rate for side in embedded.sides(one.trials, embedded.samples, np.sum))
        )
        found["groups"] = {"shorter side": breakdown.by_duration(scores, one.labels, shorter, threshold)}
        for column in ask.by:
            sides = breakdown.groups_of(one.trials, column, ask.metadata, ask.speakers)
            found["groups"][column] = breakdown.by_group(scores, one.labels, *sides, threshold)
    return found


def _draw(labelled: list[Scored], embedded: Embedded, ask: Ask) -> dict[str, bytes]:
    """{name: PNG}: of every list its systems' DET curves, histogram and reliability; a map of some speakers."""
    drawn = {}
    for one in labelled:
        name, (system, scores) = one.trials.name, one.last
        if len(one.systems) > 1:
            curves = {other: (values, one.labels) for other, values in one.systems.items()}
            drawn[f"det-{name}"] = pictures.det(curves, name)
        drawn[f"histogram-{name}"] = pictures.histogram(scores, one.labels, f"{name}, {system}")
        if system == "calibrated":
            drawn[f"reliability-{name}"] = pictures.reliability(scores, one.labels, name)
    if labelled:
        names = labelled[0].trials.utterances()
        rows = scoring.vectors(embedded.embeddings[[embedded.rows[name] for name in names]])
        drawn["map"] = pictures.speaker_map(scoring.unit(rows), [speaker_of(name, ask.speakers) for name in names])
    return drawn


def flat(result: dict) -> dict:
    """What the trainer logs: the headline's numbers, the development list's with `dev_` before them, all under `lists`."""
    lists = {entry["name"]: _numbers(entry) for entry in result["lists"]}
    headline = dict(next((found for found in lists.values() if found), {}))
    for entry in result["lists"]:
        if entry["role"] == "dev":
            headline |= {f"dev_{name}": value for name, value in lists[entry["name"]].items()}
    return headline | {"lists": lists}


def _numbers(entry: dict) -> dict:
    """The plain figures of a list's last system, intervals as eer_low and eer_high; {} for an unlabelled list."""
    if "systems" not in entry:
        return {}
    figures = list(entry["systems"].values())[-1]
    kept = {name: value for name, value in figures.items() if isinstance(value, (int, float)) and name not in UNLOGGED}
    for name, (low, high) in (figures["interval"] or {}).items():
        kept |= {f"{name}_low": low, f"{name}_high": high}
    return kept
