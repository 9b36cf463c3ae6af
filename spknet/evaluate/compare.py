"""Reports side by side, with the differences of the first one to each other and their intervals.

The same speakers are drawn for both systems of a pair in every replicate, so that what makes a list hard or easy cancels
and small differences show. A difference is called significant where its 95 % interval leaves out zero.

    spknet compare runs/a/eval/step-00001200 runs/b/eval/step-00001200 --out compared
    spknet compare runs/seed0 runs/seed1 runs/seed2 --mean
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from shards.format import read_bytes, write_file
from spknet.errors import run
from spknet.evaluate import bootstrap, metrics, report
from spknet.evaluate.commands import Parser, at_least, check_writable
from spknet.evaluate.plots import det
from spknet.evaluate.trials import KALDI, TrialError, Trials, list_name, names_in, open_text, read_speakers, speakers


def read_report(path: str | Path) -> tuple[Path, dict]:
    """(folder, report) of an evaluation's folder, its report.json, or a run: its newest, else RUN/evaluation. Raises TrialError."""
    path = Path(path)
    if path.is_dir():
        of_run = [*path.glob("evaluation/report.json"), *sorted(path.glob("eval/step-*/report.json"))]
        path = path / "report.json" if (path / "report.json").is_file() or not of_run else of_run[-1]
    try:
        found = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error  # the path is told already
        raise TrialError(
            f"{path}: cannot read this report ({reason}); give a folder that spknet evaluate wrote, or a run with an evaluation"
        ) from error
    if not isinstance(found, dict) or found.get("version") != report.VERSION:
        raise TrialError(f"{path}: expected a report of version {report.VERSION}; evaluate again")
    return path.parent, found


def read_scores(path: Path) -> tuple[np.ndarray, Trials]:
    """Scores and trials of a scores file with labels. Raises TrialError naming the line."""
    models: dict[str, int] = {}
    tests: dict[str, int] = {}
    scores, left, right, labels = [], [], [], []
    for number, line in open_text(path):
        try:
            score, rest = line.split(None, 1)
            rest, label = rest.rsplit(None, 1)
            a, b = names_in(rest)
            scores.append(float(score))
            labels.append(KALDI[label])
        except (ValueError, KeyError):
            raise TrialError(f"{path}, line {number}: expected `score left right target|nontarget`") from None
        left.append(models.setdefault(a, len(models)))
        right.append(tests.setdefault(b, len(tests)))
    indices = np.array(left, np.int32), np.array(right, np.int32), np.array(labels, np.int8)
    lines = np.arange(1, len(scores) + 1, dtype=np.int32)
    return np.array(scores), Trials(list_name(path), str(path), list(models), list(tests), *indices, lines, {})


def systems(paths: list[str], every: bool) -> list[tuple[str, dict[str, tuple[np.ndarray, Trials]]]]:
    """[(name, {list: (scores, trials)})] of each report's last system, or of every system; names by folder."""
    found = []
    reports = [read_report(path) for path in paths]
    folders = [where.resolve() for where, _ in reports]
    for folder, (where, content) in zip(folders, reports):
        lists = [entry for entry in content["lists"] if "systems" in entry]
        names = list(dict.fromkeys(name for entry in lists for name in entry["scores"]))
        for name in names if every else names[-1:]:
            scored = {e["name"]: read_scores(where / e["scores"][name]) for e in lists if name in e["scores"]}
            found.append((f"{_short(folder, folders)}: {name}", scored))
    return found


def _short(folder: Path, folders: list[Path]) -> str:
    """The last parts of a path, as many as tell it from the others."""
    for n in range(1, len(folder.parts)):
        tail = folder.parts[-n:]
        if sum(other.parts[-n:] == tail for other in folders) == 1:
            return "/".join(tail)
    return str(folder)


def aligned(first: Trials, other: Trials) -> np.ndarray:
    """Positions in `other` of the trials of `first`, whatever their order. Raises TrialError where the trials differ."""

    def pairs(trials: Trials) -> list[tuple]:
        return [
            (trials.models[a], trials.tests[b], int(t)) for a, b, t in zip(trials.left, trials.right, trials.labels)
        ]

    place: dict[tuple, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs(other)):
        place[pair].append(i)
    found = []
    for i, pair in enumerate(pairs(first)):
        if not place[pair]:
            raise TrialError(
                f"{first.path}, line {i + 1}: the trial {pair[0]} {pair[1]} is not in {other.path}; compare equal lists"
            )
        found.append(place[pair].pop(0))
    if len(other) != len(first):
        raise TrialError(f"{other.path} has {len(other)} trials, {first.path} has {len(first)}; compare equal lists")
    return np.array(found)


def compare(found: list, replicates: int, known: dict[str, str] | None = None, mean: bool = False) -> list[dict]:
    """One row for each list and system: its figures, and those minus the first system's with paired intervals.

    mean: a last row of each list has the mean of all systems' figures. Its interval is over the speakers alone: another seed
    would change the mean, too, as the systems' own figures show.
    """
    rows = []
    base_name, base = found[0]
    for name, (base_scores, trials) in base.items():
        who = speakers(trials, known)
        left, right = who.left, who.right
        if who.contradicting:
            raise TrialError(
                f"{trials.path}: {who.contradicting} labels contradict the speakers in the names, so speakers cannot be drawn for"
                " intervals; give --utt2spk FILE with `name speaker` lines"
            )
        drawn = bootstrap.replicate(base_scores, trials.labels, left, right, replicates)
        base_figures = _figures(base_scores, trials.labels)
        rows.append(
            {"list": name, "system": base_name, "figures": base_figures, "interval": bootstrap.intervals(drawn)}
        )
        all_drawn = [drawn]
        for system, lists in found[1:]:
            if name not in lists:
                raise TrialError(f"{system} has no list {name}; the others have: compare reports of equal lists")
            scores = lists[name][0][aligned(trials, lists[name][1])]
            own = bootstrap.replicate(scores, trials.labels, left, right, replicates)
            figures = _figures(scores, trials.labels)
            row = {"list": name, "system": system, "figures": figures, "interval": bootstrap.intervals(own)}
            row["difference"] = {key: figures[key] - base_figures[key] for key in figures}
            rows.append(row | {"difference_interval": bootstrap.intervals(own - drawn)})
            all_drawn.append(own)
        if mean:
            of_each = [row["figures"] for row in rows[-len(found) :]]
            figures = {key: float(np.mean([one[key] for one in of_each])) for key in base_figures}
            interval = bootstrap.intervals(np.mean(all_drawn, axis=0))
            rows.append({"list": name, "system": f"mean of {len(found)}", "figures": figures, "interval": interval})
    return rows


def _figures(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    found = metrics.figures(scores, labels)
    return {name: found[name] for name in bootstrap.NAMES}


def table(rows: list[dict]) -> list[list[str]]:
    """The comparison as a table, head first."""
    out = [["list", "system", "EER %", "95 %", "minDCF 0.01", "minDCF 0.05"]]
    out[0] += ["EER difference", "95 %", "minDCF 0.01 difference", "95 %"]
    for row in rows:
        shown = row["figures"]
        line = [row["list"], row["system"], f"{shown['eer']:.2f}", "{:.2f} to {:.2f}".format(*row["interval"]["eer"])]
        line += [f"{shown['min_dcf_p01']:.4f}", f"{shown['min_dcf_p05']:.4f}"]
        for name, digits in (("eer", 2), ("min_dcf_p01", 4)):
            if "difference" not in row:
                line += ["", ""]
                continue
            low, high = row["difference_interval"][name]
            star = "" if low <= 0 <= high else " *"
            line += [f"{row['difference'][name]:+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}{star}"]
        out.append(line)
    return out


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser("spknet compare", __doc__)
    parser.add_argument(
        "reports", nargs="+", help="runs, folders of evaluations, or report.json; the first is the base"
    )
    parser.add("--out", help="folder for compare.json and a DET picture of each list")
    parser.add("--every_system", action="store_true", help="all systems of each report, not only its last")
    parser.add("--bootstrap", type=at_least(1), default=bootstrap.REPLICATES, help="replicates of the intervals")
    parser.add("--mean", action="store_true", help="a row more: the mean of all, as of one recipe with several seeds")
    parser.add("--utt2spk", help="list `utterance speaker`, where names do not begin with the speaker")
    chosen = parser.parse_args(argv)
    found = systems(chosen.reports, chosen.every_system)
    if chosen.out:
        check_writable(chosen.out)
    known = read_speakers(chosen.utt2spk) if chosen.utt2spk else None
    rows = compare(found, chosen.bootstrap, known, chosen.mean)
    print(report.text_table(table(rows)))
    print("* the 95 % interval of the difference to the first system leaves out zero")
    if chosen.out:
        report.write_json(Path(chosen.out) / "compare.json", {"version": report.VERSION, "rows": rows})
        for name in found[0][1]:
            curves = {system: (lists[name][0], lists[name][1].labels) for system, lists in found}
            write_file(Path(chosen.out) / f"det-{name}.png", det(curves, name))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
