"""What the runs of a sweep, or one run, are doing: RUN/state.json and metrics.jsonl together with what SLURM knows.

python -m launch.status runs/my_sweep [--watch [SECONDS]]

queued     submitted, not started          done    the last step is trained and evaluated
running    training now                    failed  an error of the run, or its job ended without a word
requeued   interrupted, goes on by itself  missing never submitted
"""

from __future__ import annotations

import argparse
import getpass
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from spknet.train.metrics_log import read_metrics
from spknet.train.run_folder import STALE_SECONDS, read_state

ACTIVE = ("queued", "running", "requeued")
ORDINARY = ("", "None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime")  # reasons that pass by themselves
LOG_LINES = 12  # shown of a failed run's log


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
    """Exit status 0; 1 where a run failed; 2 for a folder without runs."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a sweep's folder or a run's")
    parser.add_argument(
        "--watch", nargs="?", type=float, const=10.0, metavar="SECONDS", help="until all runs have ended"
    )
    options = parser.parse_args(argv)
    while True:
        try:
            found = statuses(options.folder)
        except FileNotFoundError as error:
            print(f"launch.status: {error}", file=sys.stderr)
            return 2
        if options.watch:
            print("\033[2J\033[H" + time.strftime("%H:%M:%S"))  # clear the terminal
        print(table(found), flush=True)
        if not options.watch or not any(s.state in ACTIVE for s in found):
            return int(any(s.state == "failed" for s in found))
        time.sleep(options.watch)


def statuses(folder: Path) -> list[Status]:
    """Status of every run of a sweep, or of the one run that `folder` is. Raises FileNotFoundError where it is neither."""
    if (folder / "sweep.json").exists():
        runs = [folder / name for name in json.loads((folder / "sweep.json").read_text())["runs"]]
    elif any((folder / name).exists() for name in ("state.json", "job.json")):
        runs = [folder]
    else:
        raise FileNotFoundError(f"{folder} is neither a sweep (no sweep.json) nor a run (no state.json or job.json)")
    jobs = slurm_jobs()
    return [run_status(run, jobs) for run in runs]


def slurm_jobs() -> dict[str, str] | None:
    """State and reason of each of this user's queued and running jobs by id (array elements as 12_3); None without SLURM."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%r"]
    asked = subprocess.run(command, capture_output=True, text=True)
    return None if asked.returncode else dict(line.split("|", 1) for line in asked.stdout.splitlines())


def run_status(run: Path, jobs: dict[str, str] | None) -> Status:
    """What one run is doing, from its folder and the jobs that SLURM has."""
    said = read_state(run) or {}
    job = json.loads((run / "job.json").read_text()) if (run / "job.json").exists() else {}
    fresh = said.get("time", 0) >= job.get("time", 0)  # not what an earlier job left behind
    state, reason = _state(run, said if fresh or said.get("state") == "done" else {}, job, jobs)
    status = Status(run.name, state, said.get("step", 0), reason=reason, log=job.get("log"))
    _add_metrics(status, run)
    return status


def _state(run: Path, said: dict, job: dict, jobs: dict[str, str] | None) -> tuple[str, str]:
    if said.get("state") in ("done", "failed"):
        return said["state"], said.get("reason", "")
    if not job and not said:
        return "missing", ""
    in_slurm, _, why = (_job_state(job, jobs) or "").partition("|")
    if in_slurm in ("PENDING", "REQUEUED", "CONFIGURING", "SUSPENDED"):
        return ("requeued", said.get("reason", "")) if said else ("queued", why)
    if in_slurm == "COMPLETING" and said.get("state") == "requeue":
        return "requeued", said.get("reason", "")
    if in_slurm in ("RUNNING", "COMPLETING") or (not in_slurm and _breathes(run)):
        return "running", ""
    where = f"at step {said['step']}" if said else "before it started"
    if in_slurm:
        return "failed", f"job {job['job']} ended ({in_slurm}) {where}; submitting it again continues it"
    if said.get("state") == "requeue":
        return "requeued", said.get("reason", "")
    return "failed", f"no sign of life {where}; the same command continues it"


def _job_state(job: dict, jobs: dict[str, str] | None) -> str | None:
    """PENDING, RUNNING, ... or the state a job ended with; None where nobody can tell."""
    if job.get("executor") == "slurm" and jobs is not None:
        return jobs.get(job["job"]) or _ended_as(job["job"])
    if job.get("executor") == "local":
        return "RUNNING" if Path(f"/proc/{job['job']}").exists() else "gone"
    return None


def _ended_as(job: str) -> str:
    asked = subprocess.run(["sacct", "-X", "-n", "-P", "-j", job, "-o", "State"], capture_output=True, text=True)
    return asked.stdout.split("\n")[0].strip() or "unknown to SLURM"


def _breathes(run: Path) -> bool:
    lock = run / "lock"
    return lock.exists() and time.time() - lock.stat().st_mtime < STALE_SECONDS


def _add_metrics(status: Status, run: Path) -> None:
    """Fill in what metrics.jsonl and config.yaml tell: step, speed, time left, newest EER."""
    if not (run / "metrics.jsonl").exists():
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
    config = yaml.safe_load((run / "config.yaml").read_text())
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
        if s.state == "failed":
            text += f"\n\n{s.name}: {s.reason or 'no reason given'}{last_lines(s.log)}"
    return text


def summary(found: list[Status]) -> str:
    names = ("queued", "running", "requeued", "done", "failed", "missing")
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
    if log is None or not os.path.exists(log):
        return ""
    lines = Path(log).read_text(errors="replace").splitlines()
    # torchrun and submitit each add a traceback of their own below the run's.
    last = [i for i, line in enumerate(lines) if "failed (exitcode" in line or line.startswith("submitit ERROR")]
    own = lines[: last[0]] if last else lines
    return "".join(f"\n    {line}" for line in [f"{log}:", *own[-count:]])


if __name__ == "__main__":
    sys.exit(main())
