"""The results of a sweep: error rates of every setting, as mean and standard deviation over seeds.

    spknet results runs/my_sweep [--format text|csv|markdown] [--picture eer.png] [--tensorboard]

Runs that differ in `train.seed` only are one row. The figures are those of each run's last evaluation; with `--choose best`
of the one with the lowest EER on the development list (eval.dev_trials), never of the test list. `--metrics eer LIST:eer`
names a figure, or one of several trial lists'. `--tensorboard` writes SWEEP/hparams, after which `tensorboard --logdir SWEEP` shows the sweep under HPARAMS.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch.jobs import read_json
from launch.status import aligned, run_status, runs_in, slurm_jobs
from launch.sweep import short
from shards.commands import Parser
from spknet.errors import run
from spknet.train.metrics_log import read_metrics

SEED = "train.seed"
METRICS = ("eer", "min_dcf_p01", "min_dcf_p05")


@dataclass
class Row:
    """Runs that differ in their seed only. values: metric -> one number a run."""

    settings: dict[str, Any]
    seeds: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 1 where no run has an evaluation yet; 2 for a folder without runs (StatusError)."""
    parser = Parser(prog="spknet results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a sweep's folder, or one with runs in it")
    parser.add_argument("--format", choices=["text", "csv", "markdown"], default="text", help="of the table (text)")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), help="names in metrics.jsonl's `eval`")
    parser.add_argument("--choose", choices=["last", "best"], default="last", help="which evaluation of a run (last)")
    parser.add_argument("--picture", type=Path, help="PNG with the first metric of every row and seed")
    parser.add_argument("--tensorboard", action="store_true", help="write SWEEP/hparams for TensorBoard")
    options = parser.parse_args(argv)
    runs = read_json(options.folder / "sweep.json").get("runs") or runs_by_hand(options.folder)
    figures, left_out = collect(options.folder, runs, options.choose)
    for name, why in left_out.items():
        print(f"left out: {name} ({why})", file=sys.stderr)
    if not figures:
        print("error: no run has finished with an evaluation yet", file=sys.stderr)
        return 1
    rows = group(runs, figures, options.metrics)
    print(FORMATS[options.format](table(rows, options.metrics)), end="")
    if options.picture:
        draw(rows, options.metrics[0], options.picture)
    if options.tensorboard:
        write_hparams(options.folder, runs, figures)
    return 0


def runs_by_hand(folder: Path) -> dict[str, dict]:
    """Runs that no sweep has made, as sweep.json holds them: their options are those in which their config.yaml differ.

    Raises StatusError for a folder without runs.
    """
    found = runs_in(folder)
    options = {path.name if path != folder else ".": flat_config(path / "config.yaml") for path in found}
    keys = dict.fromkeys(key for config in options.values() for key in config if key != "run_dir")
    varying = [key for key in keys if len({json.dumps(config.get(key)) for config in options.values()}) > 1]
    return {name: {"overrides": {k: config[k] for k in varying if k in config}} for name, config in options.items()}


def flat_config(path: Path) -> dict[str, Any]:
    """config.yaml as {"optim.lr": 0.001, ...}; {} where it is missing or damaged."""
    try:
        groups = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    flat = {}
    for group, values in groups.items() if isinstance(groups, dict) else ():
        flat |= {f"{group}.{key}": v for key, v in values.items()} if isinstance(values, dict) else {group: values}
    return flat


def collect(folder: Path, runs: dict[str, dict], choose: str) -> tuple[dict[str, dict], dict[str, str]]:
    """({run: figures of its evaluation}, {run left out: why})."""
    known = slurm_jobs([folder / name for name in runs])
    figures, left_out = {}, {}
    for name in runs:
        state = run_status(folder / name, known).state
        path = folder / name / "metrics.jsonl"
        lines = read_metrics(path) if path.is_file() else []
        evaluations = [{"step": line["step"], **line["eval"]} for line in lines if "eval" in line]
        if choose == "best":
            evaluations = [e for e in evaluations if e.get("dev_eer") is not None]
        if state != "done":
            left_out[name] = state
        elif not evaluations:
            left_out[name] = "no evaluation" + (" on development trials" if choose == "best" else "")
        else:
            figures[name] = min(evaluations, key=lambda e: e["dev_eer"]) if choose == "best" else evaluations[-1]
    return figures, left_out


def group(runs: dict[str, dict], figures: dict[str, dict], metrics: list[str]) -> list[Row]:
    """One Row for each setting, in the sweep's order."""
    rows: dict[str, Row] = {}
    for name, found in figures.items():
        settings = {k: v for k, v in runs[name]["overrides"].items() if k != SEED}
        row = rows.setdefault(json.dumps(settings, sort_keys=True), Row(settings))
        row.seeds.append(runs[name]["overrides"].get(SEED, 0))
        for metric in metrics:
            value = figure(found, metric)
            if value is not None:
                row.values.setdefault(metric, []).append(value)
    return list(rows.values())


def figure(found: dict, metric: str) -> float | None:
    """`eer`, or `LIST:eer` of one of the trial lists of an evaluation; None where it has none."""
    *one, name = metric.split(":")
    value = (found.get("lists", {}).get(one[0], {}) if one else found).get(name)
    return None if value is None else float(value)


def table(rows: list[Row], metrics: list[str]) -> list[list[str]]:
    """Header and rows of text: the settings that vary, runs, mean and standard deviation of each metric."""
    keys = list(dict.fromkeys(k for row in rows for k in row.settings))
    lines = [[*(short(k) for k in keys), "runs", *(h for m in metrics for h in (m, "sd"))]]
    for row in rows:
        cells = [str(row.settings.get(k, "")) for k in keys]
        figures = [text for m in metrics for text in mean_and_deviation(row.values.get(m, []))]
        lines.append([*cells, str(len(row.seeds)), *figures])
    return lines


def mean_and_deviation(values: list[float]) -> tuple[str, str]:
    """Mean, and the standard deviation of the sample (n - 1), which one run has not."""
    if not values:
        return "", ""
    return f"{statistics.mean(values):.4g}", f"{statistics.stdev(values):.2g}" if len(values) > 1 else ""


def _markdown(lines: list[list[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _csv(lines: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


FORMATS = {"text": lambda lines: aligned([tuple(line) for line in lines]) + "\n", "csv": _csv, "markdown": _markdown}


def draw(rows: list[Row], metric: str, path: Path) -> None:
    """PNG: a line for each row with the mean, its standard deviation and every run as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.values.get(metric)]
    figure, axes = plt.subplots(figsize=(7, 1 + 0.4 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        values = row.values[metric]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(statistics.mean(values), y, xerr=spread, fmt="s", color="black", capsize=4)
        axes.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.5)
    names = [", ".join(f"{short(k)} {v}" for k, v in row.settings.items()) or "all runs" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel({"eer": "EER (%)"}.get(metric, metric) + ": runs, mean and standard deviation")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_hparams(folder: Path, runs: dict[str, dict], figures: dict[str, dict]) -> None:
    """SWEEP/hparams/RUN: the options of each run and the figures it reached; written anew each time."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "hparams", ignore_errors=True)
    for name, found in figures.items():
        options = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in runs[name]["overrides"].items()
        }
        numbers = {f"result/{k}": v for k, v in found.items() if isinstance(v, (int, float)) and k != "step"}
        with SummaryWriter(folder / "hparams" / name) as board:
            board.add_hparams(options, numbers, run_name=".", global_step=found["step"])


if __name__ == "__main__":
    sys.exit(run(main))
