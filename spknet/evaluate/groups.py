"""Where the errors are: figures by duration and by metadata.

by_group(scores, trials.labels, groups_left, groups_right, threshold)
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from spknet.evaluate import metrics
from spknet.evaluate.trials import TrialError, Trials, open_text, speaker_of

MOST_GROUPS = 40  # distinct values of a metadata column


def by_group(scores, labels, left, right, threshold: float) -> list[dict]:
    """Figures of the trials of each group. left, right: (n,) group names of the sides; trials between two groups stand apart.

    FAR and FRR are those at one threshold for all, normally the list's own EER threshold; EER where a group has both classes.
    """
    left, right = np.asarray(left, dtype=str), np.asarray(right, dtype=str)
    first, second = np.where(left <= right, left, right), np.where(left <= right, right, left)
    names = np.where(left == right, left, np.char.add(np.char.add(first, " / "), second))
    return [_group(str(name), scores, labels, names == name, threshold) for name in np.unique(names)]


def by_duration(scores, labels, seconds: np.ndarray, threshold: float, groups: int = 4) -> list[dict]:
    """The same for `groups` equal shares of the trials by the seconds (n,) of their shorter side."""
    bounds = np.unique(np.quantile(seconds, np.linspace(0, 1, groups + 1)))
    if len(bounds) < 2:
        return [_group(f"{bounds[0]:.1f} s", scores, labels, np.ones(len(seconds), bool), threshold)]
    place = np.clip(np.searchsorted(bounds, seconds, side="right") - 1, 0, len(bounds) - 2)
    names = [f"{low:.1f} to {high:.1f} s" for low, high in zip(bounds[:-1], bounds[1:])]
    return [_group(name, scores, labels, place == i, threshold) for i, name in enumerate(names)]


def _group(name: str, scores, labels, chosen: np.ndarray, threshold: float) -> dict:
    own, truth = scores[chosen], labels[chosen].astype(bool)
    found = {"group": name, "trials": len(own), "targets": int(truth.sum())}
    both = 0 < found["targets"] < len(own)
    found["eer"] = metrics.eer(metrics.rates(own, truth)) if both else None
    found["far"] = float((own[~truth] >= threshold).mean()) if not truth.all() else None
    found["frr"] = float((own[truth] < threshold).mean()) if truth.any() else None
    return found


def read_metadata(path: str | Path) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Columns of a CSV, and its rows by the first column (a speaker or an utterance). Raises TrialError."""
    try:
        lines = [line for _, line in open_text(path)]
        reader = csv.DictReader(lines, delimiter="\t" if "\t" in lines[0] else ",")
        rows = list(reader)
    except (IndexError, csv.Error) as error:
        raise TrialError(f"{path}: cannot read this metadata: {error}") from error
    names = [name.strip() for name in reader.fieldnames or []]
    if len(names) < 2 or not rows:
        raise TrialError(f"{path}: expected a header, then rows whose first column names a speaker or an utterance")
    plain = [{name.strip(): (value or "").strip() for name, value in row.items() if name} for row in rows]
    of_name: dict[str, dict[str, str]] = {}
    for row in plain:
        if of_name.setdefault(row[names[0]], row) != row:
            raise TrialError(f"{path}: {row[names[0]]!r} has two rows that differ; take one out")
    return names[1:], of_name


def groups_of(trials: Trials, column: str, metadata: tuple, known: dict[str, str] | None = None):
    """Values of a metadata column for the left and the right of each trial, (n,) and (n,) strings. Raises TrialError."""
    columns, rows = metadata
    if column not in columns:
        raise TrialError(f"no column {column!r} in the metadata; there are {', '.join(columns)}")

    def value(utterance: str) -> str:
        row = rows.get(utterance) or rows.get(speaker_of(utterance, known))
        return "not listed" if row is None else row.get(column) or "unknown"

    left = [value(trials.utterances_of(model)[0]) for model in trials.models]
    right = [value(test) for test in trials.tests]
    distinct = set(left) | set(right)
    if distinct == {"not listed"}:
        raise TrialError(f"{trials.path}: the metadata knows none of this list's speakers or utterances")
    if len(distinct) > MOST_GROUPS:
        raise TrialError(
            f"metadata column {column!r} has {len(distinct)} values in {trials.path}; at most {MOST_GROUPS} make groups"
        )
    return np.array(left)[trials.left], np.array(right)[trials.right]


def rows(groups: list[dict]) -> list[list[str]]:
    """A breakdown as a table, head first; the rates are those at the list's own EER threshold, hence `oracle`."""

    def shown(value: float | None, factor: int = 1) -> str:
        return "" if value is None else f"{factor * value:.2f}"

    head = ["group", "trials", "targets", "EER %", "FAR %, oracle", "FRR %, oracle"]
    counts = ([g["group"], f"{g['trials']:,}", f"{g['targets']:,}"] for g in groups)
    rates = ([shown(g["eer"]), shown(g["far"], 100), shown(g["frr"], 100)] for g in groups)
    return [head, *(count + rate for count, rate in zip(counts, rates))]
