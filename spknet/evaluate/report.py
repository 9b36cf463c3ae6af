"""What an evaluation says: figures with intervals, breakdowns and thresholds, as report.json, as text, as one HTML page.

    report.json = {"version", "step", "lists": [{"name", "path", "role", "trials", "speakers", "scores": {system: file},
        "systems": {system: {"eer", "min_dcf_p01", ..., "interval": {"eer": [low, high], ...}}}, ...}], ...}

EER is in percent, everything else as in spknet.evaluate.metrics; a system is one way of scoring (cosine, AS-norm, calibrated, ...).

    found = figures(scores, trials); write_json("report.json", {"version": VERSION, "lists": [...]})
"""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

import numpy as np

from shards.format import atomic_write
from spknet.evaluate import bootstrap, metrics
from spknet.evaluate.trials import Trials, speaker_of

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


def rows(report: dict) -> list[list[str]]:
    """The table of figures, head first: one row for each list and system."""
    table = [
        [
            "list",
            "system",
            "EER %",
            "95 %",
            "minDCF 0.01",
            "errors",
            "minDCF 0.05",
            "errors",
            "minCllr",
            "Cllr",
            "actDCF 0.01",
            "targets",
            "non-targets",
            "speakers",
        ]
    ]
    for entry in report["lists"]:
        for system, found in entry.get("systems", {}).items():
            low_high = "" if found["interval"] is None else "{:.2f} to {:.2f}".format(*found["interval"]["eer"])
            name = f"{entry['name']} ({entry['role']})"
            row = [name, system, f"{found['eer']:.2f}", low_high]
            for prior in metrics.PRIORS:
                row += [f"{found['min_dcf_' + prior]:.4f}", _errors(found[f"min_dcf_{prior}_at"])]
            calibrated = [f"{found[name]:.4f}" if name in found else "" for name in ("cllr", "act_dcf_p01")]
            row += [f"{found['min_cllr']:.4f}", *calibrated]
            table.append(row + [f"{found['targets']:,}", f"{found['nontargets']:,}", f"{entry['speakers']:,}"])
        if "systems" not in entry:
            table.append(
                [entry["name"], "unlabelled: scores only"] + [""] * (len(table[0]) - 3) + [f"{entry['trials']:,}"]
            )
    return table


def _errors(at: dict) -> str:
    said = f"{at['misses']} miss, {at['false_alarms']} fa"
    return said + ", unreliable" if at["unreliable"] else said


def threshold_rows(card: list[dict]) -> list[list[str]]:
    """The threshold card as a table, head first."""
    table = [["false-alarm rate", "chosen on", "threshold", "FAR here %", "FRR here %", "claimed"]]
    for row in card:
        rate = f"{100 * row['rate']:g} %"
        if row["threshold"] is None:
            said = f"no: {row['nontargets_chosen_on']:,} non-targets to choose on, {row['nontargets_needed']:,} needed"
            table.append([rate, row["chosen_on"], "", "", "", said])
            continue
        said = (
            "yes"
            if row["claimed"]
            else f"no: {row['nontargets']:,} non-targets here, {row['nontargets_needed']:,} needed"
        )
        shown = [f"{row['threshold']:.4f}", f"{100 * row['far']:.3f}", f"{100 * row['frr']:.2f}"]
        table.append([rate, row["chosen_on"], *shown, said])
    return table


def group_rows(groups: list[dict]) -> list[list[str]]:
    """A breakdown as a table, head first; the rates are those at the list's own EER threshold, hence `oracle`."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.2f}"

    head = ["group", "trials", "targets", "EER %", "FAR %, oracle", "FRR %, oracle"]
    return [head] + [
        [
            g["group"],
            f"{g['trials']:,}",
            f"{g['targets']:,}",
            "" if g["eer"] is None else f"{g['eer']:.2f}",
            percent(g["far"]),
            percent(g["frr"]),
        ]
        for g in groups
    ]


def text(table: list[list[str]]) -> str:
    """A table as aligned columns for the terminal, empty columns left out."""
    table = _filled(table)
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)


def _filled(table: list[list[str]]) -> list[tuple[str, ...]]:
    return list(zip(*(column for column in zip(*table) if any(column[1:]))))


def to_tensorboard(folder: str | Path, numbers: dict, pictures: Path, step: int) -> None:
    """The headline's numbers and every PNG of a folder as TensorBoard scalars and images."""
    import matplotlib.image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as board:
        for name, value in numbers.items():
            if isinstance(value, (int, float)):
                board.add_scalar(f"eval/{name}", value, step)
        for path in sorted(pictures.glob("*.png")):
            board.add_image(f"eval/{path.stem}", matplotlib.image.imread(path)[..., :3], step, dataformats="HWC")


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;margin:.6rem 0 1.4rem;display:block;overflow-x:auto;font-size:13px}th,td{padding:.25rem .5rem;
text-align:right;vertical-align:top;border-bottom:1px solid #ddd}th{border-bottom:2px solid #888}td:first-child,th:first-child,
td:nth-child(2),th:nth-child(2){text-align:left}img{width:min(100%,36rem);vertical-align:top;margin:.4rem 1rem .4rem 0}dt{font-weight:600;float:left;
clear:left;width:8rem}dd{margin-left:8.5rem;overflow-wrap:anywhere}p{color:#444}"""


def write_html(path: str | Path, report: dict, drawn: dict[str, bytes]) -> None:
    """One page that needs nothing else: every table, every picture inside. drawn: {name: PNG}."""
    facts = {name: value for name, value in report.items() if name not in ("version", "lists") and value is not None}
    parts = ["<h1>Speaker verification report</h1>", "<dl>"]
    parts += [f"<dt>{html.escape(name)}</dt><dd>{html.escape(_shown(value))}</dd>" for name, value in facts.items()]
    parts += ["</dl>", "<h2>Figures</h2>", _html_table(rows(report)), f"<p>{NOTE}</p>"]
    for entry in report["lists"]:
        if "thresholds" in entry:
            parts += [
                f"<h2>Thresholds: {html.escape(entry['name'])}</h2>",
                _html_table(threshold_rows(entry["thresholds"])),
            ]
            parts.append(f"<p>{CARD_NOTE}</p>")
        for name, groups in entry.get("groups", {}).items():
            parts += [f"<h2>{html.escape(entry['name'])} by {html.escape(name)}</h2>", _html_table(group_rows(groups))]
    parts.append("<h2>Pictures</h2>")
    for name, png in drawn.items():
        data = base64.b64encode(png).decode()
        parts.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Speaker verification report</title><style>{STYLE}</style>'
    with atomic_write(path) as file:
        file.write((head + "\n".join(parts) + "</html>\n").encode())


NOTE = (
    "EER by linear interpolation at distinct scores, in percent; minDCF normalised, with the misses and false alarms behind"
    " it (fewer than 10 false alarms: unreliable). Intervals: 95 %, percentiles of a bootstrap over speakers. Figures of a"
    " development list are those of the list that calibration and thresholds were learned on."
)
CARD_NOTE = (
    "A rate f is only claimed on at least 30/f non-targets. `oracle`: the threshold was taken from this very list, which no"
    " deployed system can do."
)


def _html_table(table: list[list[str]]) -> str:
    head, *body = _filled(table)
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>" + "".join(lines) + "</table>"


def _shown(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_shown(inner)}" for name, inner in value.items() if inner is not None)
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)
