"""What an evaluation says: figures with intervals, breakdowns and thresholds, as report.json, as text, as one HTML page.

    OUT/report.json      {"version", "step", "lists": [{"name", "path", "role", "trials", "speakers", "remarks",
                          "scores": {system: file}, "systems": {system: {"eer", "min_dcf_p01", ..., "interval"}}, ...}], ...}
        report.html      the same for people, pictures inside (report.html.jinja)
        scores.txt       `score left right target|nontarget` a trial of the first list, in its order
        scores-NAME.txt  the same for each further list; scores-SYSTEM.txt, scores-NAME-SYSTEM.txt for the other systems
        det.png          miss against false-alarm rate of every list

EER is in percent, everything else as in spknet.evaluate.metrics; a system is one way of scoring (cosine, AS-norm, calibrated,
...). `Report.content` is the one source: JSON is it, text, HTML and TensorBoard are made of it.

    report.write("out"); print(text(report.content()))
"""

from __future__ import annotations

import base64
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np

from shards.format import write_file
from spknet.evaluate import groups, metrics, plots, thresholds
from spknet.evaluate.trials import Trials, separator

VERSION = 1
UNLOGGED = ("eer_threshold", "replicates")  # figures that are no curve over the steps


@dataclass
class ListReport:
    """One list: its scores by every system, the last system being the one that counts, and what they come to."""

    trials: Trials
    role: str  # test or dev
    scores: dict[str, np.ndarray]  # (n,) of each system, in the list's order
    systems: dict[str, dict] = field(default_factory=dict)  # figures of each system; {} for a list without labels
    speakers: int | None = None
    thresholds: list[dict] | None = None  # spknet.evaluate.thresholds.threshold_card's
    groups: dict[str, list[dict]] = field(default_factory=dict)  # spknet.evaluate.groups.by_group's, by what they go by
    remarks: list[str] = field(default_factory=list)

    @property
    def last(self) -> tuple[str, np.ndarray]:
        return list(self.scores.items())[-1]

    def content(self, files: dict[str, str]) -> dict:
        """This list's part of report.json. files: where each system's scores are."""
        entry = {"name": self.trials.name, "path": self.trials.path, "role": self.role, "trials": len(self.trials)}
        entry |= {"scores": files, "remarks": self.remarks, "summary": summary(self.last[1])}
        optional = {"speakers": self.speakers, "systems": self.systems, "thresholds": self.thresholds}
        return entry | {name: value for name, value in (optional | {"groups": self.groups}).items() if value}


@dataclass
class Report:
    """An evaluation's result. facts: what stands at the head of report.json. points: unit vectors (n, D) of the first list's
    utterances with the speaker of each, for the map."""

    lists: list[ListReport]
    facts: dict = field(default_factory=dict)
    made: dict = field(
        default_factory=dict
    )  # date, command, revision: not in report.json, which depends on inputs alone
    points: tuple[np.ndarray, list[str]] | None = None

    def content(self) -> dict:
        """report.json as a dict."""
        lists = [one.content(self._files(number)) for number, one in enumerate(self.lists)]
        return {"version": VERSION} | self.facts | {"lists": lists}

    def numbers(self) -> dict:
        """The plain figures: {"eer", "min_dcf_p01", "dev_eer", ..., "lists": {name: the same}}."""
        return numbers(self.content())

    def _files(self, number: int) -> dict[str, str]:
        """{system: file name}; the last system's is scores.txt, or scores-LIST.txt."""
        one = self.lists[number]
        name, last = [one.trials.name] if number else [], one.last[0]
        return {s: "-".join(["scores", *name, *([] if s == last else [s])]) + ".txt" for s in one.scores}

    def write(self, folder: str | Path, pictures: bool = True) -> None:
        """Writes scores, report.json and det.png; pictures: all others and report.html, too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for number, one in enumerate(self.lists):
            for system, name in self._files(number).items():
                write_scores(folder / name, one.trials, one.scores[system])
        content = self.content()
        write_json(folder / "report.json", content)
        drawn = self._draw(pictures)
        for name, png in drawn.items():
            write_file(folder / f"{name}.png", png)
        if pictures:
            write_html(folder / "report.html", content, drawn, self.made)

    def _draw(self, everything: bool) -> dict[str, bytes]:
        """{name: PNG}: the DET curves of all lists, and of every list those of its systems, histogram and reliability; a map."""
        labelled = [one for one in self.lists if one.systems]
        drawn = {}
        if labelled:
            curves = {one.trials.name: (one.last[1], one.trials.labels) for one in labelled}
            drawn["det"] = plots.det(curves, f"every list, scored by {labelled[0].last[0]}")
        for one in self.lists if everything else ():
            name, (system, scores), labels = one.trials.name, one.last, one.trials.labels
            if len(one.scores) > 1 and one.systems:
                drawn[f"det-{name}"] = plots.det(
                    {s: (v, labels) for s, v in one.scores.items()}, f"{name}, every system"
                )
            drawn[f"histogram-{name}"] = plots.histogram(scores, labels, f"{name}, {system}")
            if system == "calibrated" and one.systems:
                drawn[f"reliability-{name}"] = plots.reliability(scores, labels, f"{name}, calibrated")
        if everything and self.points is not None:
            drawn["map"] = plots.speaker_map(*self.points)
        return drawn


def made(argv: list[str] | None = None) -> dict[str, str]:
    """When, by which command (None: this process's) and with which revision of the code a report is made."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:  # a revision of this very code, not of a repository that an installed package happens to lie in
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True)
        shown = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True)
        revision = shown.stdout.strip() if tracked.returncode == 0 else ""
    except OSError:
        revision = ""
    command = shlex.join(["spknet", "evaluate", *(sys.argv[1:] if argv is None else argv)])
    return {"date": time.strftime("%Y-%m-%d %H:%M %Z"), "command": command, "revision": revision or "unknown"}


def summary(scores: np.ndarray) -> dict[str, float]:
    """Lowest, quartiles and highest of some scores."""
    names = ("lowest", "quarter", "median", "three_quarters", "highest")
    return dict(zip(names, map(float, np.quantile(scores, [0, 0.25, 0.5, 0.75, 1]))))


def write_scores(path: Path, trials: Trials, scores: np.ndarray) -> None:
    """`score left right` a trial, with target or nontarget behind it where the list says so; 9 digits hold a float32."""
    labels = [None] * len(trials) if trials.labels is None else [("nontarget", "target")[v] for v in trials.labels]
    apart = separator([*trials.models, *trials.tests])
    lines = [
        apart.join(filter(None, (f"{score:.9g}", trials.models[a], trials.tests[b], label))) + "\n"
        for score, a, b, label in zip(scores.tolist(), trials.left, trials.right, labels)
    ]
    write_file(path, "".join(lines))


def write_json(path: str | Path, content: dict) -> None:
    """The report as JSON; infinite thresholds as the strings `inf` and `-inf`, so that any reader takes it."""
    write_file(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(value):
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def numbers(content: dict) -> dict:
    """What the trainer logs: the headline's numbers, the development list's with `dev_` before them, all under `lists`."""
    lists = {entry["name"]: _numbers(entry) for entry in content["lists"]}
    headline = dict(next((found for found in lists.values() if found), {}))
    for entry in content["lists"]:
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


HEAD = ["list", "system", "EER %", "95 %", "minDCF 0.01", "misses + fa", "minDCF 0.05", "misses + fa"]
HEAD += ["minCllr", "Cllr", "actDCF 0.01", "targets", "non-targets", "speakers", "scores"]


def rows(content: dict) -> list[list[str]]:
    """The table of figures, head first: one row for each list and system."""
    table = [HEAD]
    for entry in content["lists"]:
        name = f"{entry['name']} ({entry['role']})"
        for system, found in entry.get("systems", {}).items():
            low_high = "" if found["interval"] is None else "{:.2f} to {:.2f}".format(*found["interval"]["eer"])
            row = [name, system, f"{found['eer']:.2f}", low_high]
            for prior in metrics.PRIORS:
                row += [f"{found['min_dcf_' + prior]:.4f}", _errors(found[f"min_dcf_{prior}_at"])]
            row += [f"{found[name]:.4f}" if name in found else "" for name in ("min_cllr", "cllr", "act_dcf_p01")]
            counts = (found["targets"], found["nontargets"], entry["speakers"])
            table.append(row + [f"{count:,}" for count in counts] + [""])
        if "systems" not in entry:
            row = [name, "no labels"] + [""] * (len(HEAD) - 4)
            table.append([*row, f"{entry['trials']:,}", _spread(entry)])
    return table


def _errors(at: dict) -> str:
    """Misses and false alarms behind a minimum; a star where they are too few."""
    return f"{at['misses']:,} + {at['false_alarms']:,}{' *' if at['unreliable'] else ''}"


def _spread(entry: dict) -> str:
    said = "{lowest:.3f} to {highest:.3f}, half of them from {quarter:.3f} to {three_quarters:.3f}"
    return said.format(**entry["summary"]) if "summary" in entry else ""


def verdict(content: dict) -> str:
    """The headline in one line."""
    entry = next((e for e in content["lists"] if "systems" in e), content["lists"][0])
    if "systems" not in entry:
        return f"{entry['name']}: {entry['trials']:,} trials without labels, scores from {_spread(entry)}"
    system, found = list(entry["systems"].items())[-1]
    between = "" if found["interval"] is None else " (95 %: {:.2f} to {:.2f})".format(*found["interval"]["eer"])
    doubt = ", which rests on fewer than 10 false alarms" if found["min_dcf_p01_at"]["unreliable"] else ""
    return (
        f"EER {found['eer']:.2f} %{between} on {entry['name']}: {entry['trials']:,} trials of {entry['speakers']:,} speakers,"
        f" scored by {system}; minDCF(0.01) {found['min_dcf_p01']:.3f}{doubt}"
    )


def remarks(content: dict) -> list[str]:
    """What a reader of the figures should know, the list's name before it."""
    return [f"{e['name']}: {said}" for e in content["lists"] for said in e.get("remarks", [])]


def text(content: dict) -> str:
    """The report for the terminal: the verdict, the table, the remarks."""
    notes = [f"note: {said}" for said in [*filter(None, [content.get("audio")]), *remarks(content)]]
    table = rows(content)
    if any("*" in cell for row in table for cell in row):
        notes.append("* fewer than 10 false alarms: unreliable")
    return "\n".join([verdict(content), "", text_table(table), *notes])


def text_table(table: list[list[str]]) -> str:
    """A table as aligned columns for the terminal, empty columns left out."""
    table = filled(table)
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)


def filled(table: list[list[str]]) -> list[tuple[str, ...]]:
    """A table without its empty columns."""
    return list(zip(*(column for column in zip(*table) if any(column[1:]))))


def to_tensorboard(folder: str | Path, content: dict, pictures: Path, step: int) -> None:
    """The headline's numbers and every PNG of a folder as TensorBoard scalars and images."""
    import matplotlib.image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as board:
        for name, value in numbers(content).items():
            if isinstance(value, (int, float)):
                board.add_scalar(f"eval/{name}", value, step)
        for path in sorted(pictures.glob("*.png")):
            board.add_image(f"eval/{path.stem}", matplotlib.image.imread(path)[..., :3], step, dataformats="HWC")


def write_html(path: str | Path, content: dict, drawn: dict[str, bytes], made: dict[str, str] | None = None) -> None:
    """One page that needs nothing else: every table, every picture inside. drawn: {name: PNG}."""
    sections = []
    for entry in content["lists"]:
        name = entry["name"]
        tables = [("Figures", [row[1:] for row in rows({"lists": [entry]})])]
        if "thresholds" in entry:
            tables.append(("Thresholds", thresholds.rows(entry["thresholds"])))
        tables += [(f"By {by}", groups.rows(found)) for by, found in entry.get("groups", {}).items()]
        own = [picture for picture in (f"det-{name}", f"histogram-{name}", f"reliability-{name}") if picture in drawn]
        tables = [(title, filled(table)) for title, table in tables]
        known = {"name": name, "role": entry["role"], "remarks": entry.get("remarks", [])}
        sections.append(known | {"tables": tables, "pictures": own})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        verdict=verdict(content),
        sections=sections,
        facts=_facts(content) | (made or {}),
        options={name: value for name, value in content.items() if isinstance(value, dict)},
        pictures={name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in drawn.items()},
    )
    write_file(path, page)


def _facts(content: dict) -> dict[str, str]:
    """The plain facts at the head of a report."""
    facts = {
        name: value for name, value in content.items() if isinstance(value, (str, int, float)) and name != "version"
    }
    return {name: f"{value:.2f}" if isinstance(value, float) else str(value) for name, value in facts.items()}
