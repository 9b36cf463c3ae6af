"""What the runs of a sweep, or one run, are doing: RUN/state.json and metrics.jsonl together with what SLURM knows.

spknet status runs/my_sweep [--watch [SECONDS]]

queued     submitted, not started             done      the last step is trained and evaluated
running    training now                       failed    an error of the run, or its job ended without a word
requeued   interrupted, goes on by itself     missing   never submitted
cancelled  stopped by its user; submitting it again continues it

FOLDER is a sweep's, a run's, or any folder with runs in it, however they were started.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from launch import jobs
from launch.jobs import WAITING, breathes, read_json, slurm_jobs
from launch.log_text import killed_ranks, last_life, plain
from launch.starts import newest_checkpoint_step
from shards.commands import Parser
from spknet.errors import UserError, run
from spknet.train.metrics_log import read_metrics

ACTIVE = ("queued", "running", "requeued")
ORDINARY = ("", "None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime")  # reasons that pass by themselves
LOG_LINES = 12  # shown of a failed run's log
NEW_SECONDS = 20  # a job that SLURM does not list although it was submitted


class StatusError(UserError):
    """The folder holds no runs; the message says what was looked for."""


@dataclass
class Status:
    """One run as a line of the table; None where it is not known (yet)."""

    name: str
    state: str
    step: int = 0
    total_steps: int | None = None
    utterances_per_second: float | None = None
    seconds_left: float | None = None
    eer: float | None = None  # percent, of the newest evaluation
    reason: str = ""
    log: str | None = None  # path


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 1 where a run failed; 2 for a folder without runs (StatusError)."""
    parser = Parser(prog="spknet status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a sweep's folder or a run's")
    parser.add_argument(
        "--watch", nargs="?", type=float, const=10.0, metavar="SECONDS", help="until all runs have ended"
    )
    options = parser.parse_args(argv)
    while True:
        found = statuses(options.folder)
        if options.watch:
            print("\033[2J\033[H" + time.strftime("%H:%M:%S"))  # clear the terminal
        print(table(found), flush=True)
        if not options.watch or not any(s.state in ACTIVE for s in found):
            return int(any(s.state == "failed" for s in found))
        time.sleep(options.watch)


def statuses(folder: Path) -> list[Status]:
    """Status of every run in `folder`: a sweep, a run, or a folder of runs. Raises StatusError where it is none of these."""
    runs = runs_in(folder)
    known = slurm_jobs(runs)
    return [run_status(one, known) for one in runs]


def runs_in(folder: Path) -> list[Path]:
    """The runs of a sweep in its order, the run itself, or the runs among the folders below. Raises StatusError."""
    named = read_json(folder / "sweep.json").get("runs", {})
    if named:
        return [folder / name for name in named]
    if is_run(folder):
        return [folder]
    below = sorted(path for path in folder.glob("*/") if is_run(path)) if folder.is_dir() else []
    if not below:
        raise StatusError(
            f"{folder} is neither a sweep (no sweep.json) nor a run (no state.json or job.json), and has no runs in it"
        )
    return below


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "job.json", "metrics.jsonl"))


def run_status(run: Path, known: dict[str, str] | None) -> Status:
    """What one run is doing, from its folder and what SLURM knows of its job."""
    said, job = read_json(run / "state.json"), jobs.read_job(run)
    damaged = not said and (run / "state.json").exists()
    fresh = said.get("time", 0) >= job.get("time", 0)  # not what an earlier job left behind
    state, reason = _state(run, said if fresh or said.get("state") == "done" else {}, job, known)
    if damaged:
        reason = f"state.json cannot be read; {reason}".removesuffix("; ")
        state = "failed" if state == "missing" else state
    status = Status(run.name, state, said.get("step", 0), reason=reason, log=job.get("log"))
    _add_metrics(status, run)
    return status


def _state(run: Path, said: dict, job: dict, known: dict[str, str] | None) -> tuple[str, str]:
    word, reason = said.get("state"), said.get("reason", "")
    if word in ("done", "failed"):
        return word, reason
    if not job and not said:
        return "missing", ""
    in_slurm, _, why = _job_state(run, job, known).partition("|")
    if in_slurm in WAITING:
        return ("requeued", reason) if said else ("queued", why)
    if in_slurm == "COMPLETING" and word == "requeue":
        return "requeued", reason
    if in_slurm in jobs.ALIVE or breathes(run):
        return "running", ""
    saved = newest_checkpoint_step(run)
    again = f"`spknet resubmit {run}` continues it at step {saved}"
    if in_slurm.startswith("CANCELLED") or "cancelled" in job:
        return "cancelled", f"job {job.get('job')} was cancelled; {again}"
    if word == "requeue" and not job:
        return "cancelled", f"stopped by {reason or 'a signal'}; the same command continues it at step {saved}"
    killed = killed_ranks(Path(job["log"])) if job.get("log") else []
    signals = (
        f", a rank was killed by signal {killed[0]}" + (" (often: out of memory)" if killed[0] == 9 else "")
        if killed
        else ""
    )
    if in_slurm:
        code = f", {why}" if why and why != "None" else ""
        return "failed", f"job {job['job']} ended ({in_slurm}{code}{signals}); {again}"
    return "failed", f"no sign of life; the same command continues it at step {saved}"


def _job_state(run: Path, job: dict, known: dict[str, str] | None) -> str:
    """PENDING|reason, RUNNING|..., or the state a job ended with; empty where there is no job or nobody can tell."""
    number = str(job.get("job"))
    if job.get("executor") == "slurm" and known is not None:
        # What was submitted a moment ago may not have reached the accounting yet.
        return known.get(number) or (
            "PENDING|" if time.time() - job.get("time", 0) < NEW_SECONDS else "unknown to SLURM"
        )
    if job.get("executor") in ("local", "debug"):
        return "RUNNING" if Path(f"/proc/{number}").exists() else "gone"
    return ""


def _add_metrics(status: Status, run: Path) -> None:
    """Fill in what metrics.jsonl and config.yaml tell: step, speed, time left, newest EER."""
    if not (run / "metrics.jsonl").is_file():
        return
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "eval" not in line]
    evaluations = [line["eval"] for line in lines if line.get("eval", {}).get("eer") is not None]
    status.eer = evaluations[-1]["eer"] if evaluations else None
    if not steps:
        return
    last = steps[-1]
    status.step = max(status.step, last["step"])
    status.utterances_per_second = last.get("utterances_per_second")
    if not (run / "config.yaml").exists() or not last.get("epoch"):
        return
    try:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["train"]["epochs"], config["data"]["speakers_per_batch"]
    except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError):
        return
    an_epoch = round(last["step"] / last["epoch"])  # steps
    status.total_steps = int(min(config["train"]["epochs"] * an_epoch, config["train"]["max_steps"] or math.inf))
    if status.utterances_per_second and status.state in ACTIVE:
        a_step = config["data"]["speakers_per_batch"] * config["data"]["utterances_per_speaker"]  # utterances
        status.seconds_left = (status.total_steps - status.step) * a_step / status.utterances_per_second


def table(found: list[Status]) -> str:
    """The runs as text, and below it why the failed ones failed."""
    rows = [("run", "state", "step", "utterances/s", "left", "EER %")]
    for s in found:
        total = f"/{s.total_steps}" if s.total_steps else ""
        speed = f"{s.utterances_per_second:.0f}" if s.utterances_per_second and s.state == "running" else ""
        eer = "" if s.eer is None else f"{s.eer:.2f}"
        state = f"queued ({s.reason})" if s.state == "queued" and s.reason not in ORDINARY else s.state
        rows.append((s.name, state, f"{s.step}{total}", speed, duration(s.seconds_left), eer))
    text = aligned(rows) + f"\n{summary(found)}"
    for s in found:
        if s.state in ("failed", "cancelled"):
            text += f"\n\n{s.name}: {s.reason or 'no reason given'}{last_lines(s.log) if s.state == 'failed' else ''}"
    return text


def summary(found: list[Status]) -> str:
    names = ("queued", "running", "requeued", "done", "failed", "cancelled", "missing")
    counts = [(sum(s.state == name for s in found), name) for name in names]
    return ", ".join(f"{n} {name}" for n, name in counts if n)


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns of equal width: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = (0, 1)
    cells = ([c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d} h"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )


def last_lines(log: str | None, count: int = LOG_LINES) -> str:
    """The end of what the run itself wrote to its log, indented, after the log's name; empty where there is none."""
    if log is None or not Path(log).exists():
        return ""
    lines = plain(last_life(Path(log)))
    # torchrun and submitit each add a traceback of their own below the run's.
    last = [i for i, line in enumerate(lines) if "failed (exitcode" in line or line.startswith("submitit ERROR")]
    own = lines[: last[0]] if last else lines
    return "".join(f"\n    {line}" for line in [f"{log}:", *own[-count:]])


if __name__ == "__main__":
    sys.exit(run(main))
