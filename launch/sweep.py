"""A sweep: many runs that differ in a few options, as one SLURM array, at most K at once.

    spknet sweep SWEEP.yaml [--dir runs/NAME] [--at-once K] [--dry-run] [--nodes ... as spknet submit]
                           [-- --data.train_shards data/shards/a ... options of every run]

    recipe: fast_resnet34_angleproto         a recipe's name or a YAML file; as an axis: recipe.WHAT
    options: {data.train_shards: data/shards/a}   options of every run
    cluster: {gpus-per-node: 4, hours: 24}   as spknet submit's; the command line beats them
    at-once: 8
    grid:                                    every combination of the axes ...
      train.seed: [0, 1, 2]
      loss:                                  ... of which a value may set several options
        - {loss.name: angleproto}
        - {loss.name: ge2e, data.utterances_per_speaker: 3}
    runs: [{optim.lr: 0.01}, {optim.lr: 0.001}]   or a list of runs; with a grid, each of them gets the whole grid

A run's name says what varies. The same command again submits what is missing, failed or cancelled, and nothing else. Small runs can
share a node or a GPU: --runs-per-job K puts K of them into each job. Without SLURM: --executor local --at-once N.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch import checks, cluster, submit
from launch.cluster import SubmitError
from launch.status import aligned, run_status, slurm_jobs
from shards.commands import Parser
from spknet.errors import UserError
from spknet.options import Loader
from spknet.train.run_folder import write_json

SWEEPS = Path(__file__).parent / "sweeps"
AGAIN = ("missing", "failed", "cancelled")  # states of runs that are submitted again
KEYS = ("recipe", "options", "cluster", "at-once", "grid", "runs")
SHORT = {"data.utterances_per_speaker": "M", "data.speakers_per_batch": "N", "data.crop_seconds": "crop"}


@dataclass
class Run:
    """One run of a sweep: its name, the options that make it differ, and spknet.train's words."""

    name: str
    overrides: dict[str, Any]
    words: list[str]


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 2 for a sweep that cannot be submitted."""
    parser = Parser(prog="spknet sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="a YAML file, or the name of an installed sweep")
    parser.add_argument("--dir", type=Path, help="folder of the sweep (runs/NAME OF THE FILE)")
    parser.add_argument("--at-once", type=cluster.positive, help="runs at once (8)")
    parser.add_argument(
        "--runs-per-job", type=cluster.positive, default=1, help="runs that share a node, and its GPUs (1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, and print what would be submitted")
    cluster.add_cluster_options(parser)
    own, common = cluster.split_words(sys.argv[1:] if argv is None else argv)
    try:
        profile = cluster.profile_words()
        path = sweep_path(parser.parse_args([*profile, *own]).sweep)
        sweep = read_sweep(path)
        options = parser.parse_args([*profile, *cluster_words(sweep, path), *own])
        folder = options.dir or Path("runs") / path.stem
        command = {"own": list(own), "common": common, "cwd": os.getcwd()}
        return _go(plan(sweep, common), folder.absolute(), options, command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _go(runs: list[Run], folder: Path, options: argparse.Namespace, command: dict) -> int:
    seen: dict = {}
    configs = {run.name: check_run(run, folder, options, seen) for run in runs}
    if options.runs_per_job > 1 and (options.executor != "slurm" or options.nodes > 1):
        raise SubmitError("--runs-per-job is for SLURM and runs of one node; on this machine --at-once does the same")
    checks.check_cluster(options)
    known = slurm_jobs([folder / run.name for run in runs])
    states = {run.name: run_status(folder / run.name, known).state for run in runs}
    wanted = [run for run in runs if states[run.name] in AGAIN]
    print(aligned([("run", "state", "")] + [(r.name, states[r.name], "submit" if r in wanted else "") for r in runs]))
    note_changed(runs, folder)
    if options.dry_run:
        print(f"\n{len(wanted)} of {len(runs)} runs would be submitted, {options.at_once} at once, for example\n")
        print(shlex.join(["python", "-m", "spknet.train", *(wanted or runs)[0].words]))
        return 0
    if not wanted:
        print("nothing to submit")
        return 0
    for run in wanted:
        checks.check_free(folder / run.name)
    checks.writable_folder(folder)
    tasks = [
        submit.make_task(run.words, checks.writable_folder(folder / run.name), options, configs[run.name])
        for run in wanted
    ]
    remember(runs, folder, command)
    with submit.only_submission(folder):
        jobs = queue(tasks, options, folder, max(config.data.workers for config in configs.values()))
    number = jobs[0].job_id.split("_")[0]
    print(f"{len(wanted)} of {len(runs)} runs submitted, {options.at_once} at once: job {number}")
    print(f"state   spknet status {shlex.quote(str(folder))} --watch")
    print(f"results spknet results {shlex.quote(str(folder))}")
    return 0


def queue(tasks: list, options: argparse.Namespace, folder: Path, workers: int) -> list:
    """One SLURM array; on this machine, which has no queue, one after another with `at_once` of them alive."""
    if options.executor == "slurm":
        at_once, k = options.at_once, options.runs_per_job
        if k > 1:
            from launch.several import Several

            tasks = [Several(tasks[i : i + k]) for i in range(0, len(tasks), k)]
        queued = submit.submit(tasks, options, folder / "jobs", workers, max(1, at_once // k))
        submit.submit_evaluation(queued, tasks, options, folder / "jobs")
        return queued
    jobs: list = []
    slots: dict[int, Any] = {}  # number of the place, and with it of the GPUs -> its job
    for task in tasks:
        while len(free := [i for i in range(options.at_once) if i not in slots or slots[i].done()]) == 0:
            time.sleep(1)
        jobs += submit.submit([task], options, folder / "jobs", workers, slot=free[0])
        slots[free[0]] = jobs[-1]
        if options.executor == "debug":
            submit.wait_in_process(jobs[-1:])
    return jobs


def sweep_path(name: str) -> Path:
    """A file, or an installed sweep's name. Raises SubmitError naming those there are."""
    for path in (Path(name), SWEEPS / f"{name.removesuffix('.yaml')}.yaml"):
        if path.is_file():
            return path
    names = sorted(p.stem for p in SWEEPS.glob("*.yaml"))
    raise SubmitError(f"{name}: no such file and no such sweep; installed sweeps: {', '.join(names)}")


def read_sweep(path: Path) -> dict:
    """The YAML file as a dict. Raises SubmitError for what is not a sweep."""
    try:
        sweep = yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SubmitError(f"{path} is not YAML: {error}") from None
    if not isinstance(sweep, dict) or not (sweep.get("grid") or sweep.get("runs")):
        raise SubmitError(f"{path}: expected `grid:` (options with lists of values) or `runs:` (a list of options)")
    unknown = [key for key in sweep if key not in KEYS]
    if unknown:
        raise SubmitError(f"{path}: unknown key {unknown[0]!r}; expected {', '.join(KEYS)}")
    flat = [k for k, values in (sweep.get("grid") or {}).items() if not isinstance(values, list) or not values]
    if flat:
        raise SubmitError(f"{path}: grid: {flat[0]}: expected a list of values")
    return sweep


def cluster_words(sweep: dict, path: Path) -> list[str]:
    """The file's `cluster:` and `at-once:` as words of the command line, which its own words then beat."""
    return [f"--at-once={sweep.get('at-once', 8)}", *cluster.words_of(sweep.get("cluster") or {}, f"{path}, cluster")]


def plan(sweep: dict, common: list[str]) -> list[Run]:
    """Every run of the sweep, in the order of the file; `common` are words of every run, beaten by what varies.

    Raises SubmitError where two runs would have one name.
    """
    axes = [[as_options(key, value) for value in values] for key, values in (sweep.get("grid") or {}).items()]
    listed = sweep.get("runs") or [{}]
    combined = [
        {k: v for part in (one, *cell) for k, v in part.items()} for one in listed for cell in itertools.product(*axes)
    ]
    runs = []
    for overrides in combined:
        # Recipes first: what stands behind a recipe on the command line beats it.
        layers = [{"recipe": sweep["recipe"]}] if sweep.get("recipe") else []
        layers += [{k: v for k, v in overrides.items() if is_recipe(k)}, sweep.get("options") or {}]
        words = [word(k, v) for layer in layers for k, v in layer.items()] + common
        words += [word(k, v) for k, v in overrides.items() if not is_recipe(k)]
        runs.append(Run(run_name(overrides, combined, sweep.get("grid") or {}), overrides, words))
    names = [run.name for run in runs]
    double = [name for name in names if names.count(name) > 1]
    if double:
        raise SubmitError(f"two runs are called {double[0]}: they differ in nothing that a name can show")
    return runs


def as_options(key: str, value: Any) -> dict[str, Any]:
    """A value of an axis as options: itself a mapping of options, or the value of the option `key`."""
    return value if isinstance(value, dict) else {key: value}


def is_recipe(key: str) -> bool:
    """`recipe`, or an axis of recipes: `recipe.network`, `recipe.loss`."""
    return key.split(".")[0] == "recipe"


def word(key: str, value: Any) -> str:
    """`--key=value` as spknet.train reads it."""
    return f"--{'config' if is_recipe(key) else key}={value if isinstance(value, str) else json.dumps(value)}"


def run_name(overrides: dict[str, Any], every: list[dict[str, Any]], axes: dict[str, Any]) -> str:
    """`loss=angleproto,M=2,seed=0`: the options that differ over the sweep, as far as this run sets them.

    An option that is an axis is named even while it has one value, so that the axis can be made longer later.
    """
    varying = [k for k in overrides if k in axes or len({json.dumps(o.get(k, "-")) for o in every}) > 1]
    return ",".join(f"{short(k)}={_plain(overrides[k])}" for k in varying) or "run"


def short(key: str) -> str:
    """The last word of an option, or the group's for `loss.name`; N, M and crop for the field's three usual ones."""
    group, _, last = key.rpartition(".")
    return SHORT.get(key) or (group if last == "name" else last)


def _plain(value: Any) -> str:
    if isinstance(value, (int, float)):
        return str(value)
    text = Path(value).name if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")[:60]


def check_run(run: Run, folder: Path, options: argparse.Namespace, seen: dict):
    """The run's Config; an error names the run."""
    try:
        return checks.checked_config([*run.words, "--run_dir", str(folder / run.name)], options, seen)
    except UserError as error:
        raise SubmitError(f"run {run.name}: {error}") from None


def note_changed(runs: list[Run], folder: Path) -> None:
    """Say which runs were submitted with other options than the file has now: they are not run again."""
    before = remembered(folder)
    for run in runs:
        if run.name in before and before[run.name]["words"] != run.words:
            print(
                f"note: {run.name} was submitted with other options; give another --dir, or remove {folder / run.name}"
            )


def remember(runs: list[Run], folder: Path, command: dict) -> None:
    """Write SWEEP/sweep.json: the command, and the runs of this file after those of an earlier one whose folders are still there."""
    before = {name: run for name, run in remembered(folder).items() if (folder / name).exists()}
    now = {run.name: {"overrides": run.overrides, "words": run.words} for run in runs}
    write_json(folder / "sweep.json", {"runs": {**before, **now}, "command": command})


def remembered(folder: Path) -> dict[str, dict]:
    path = folder / "sweep.json"
    return json.loads(path.read_text())["runs"] if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
