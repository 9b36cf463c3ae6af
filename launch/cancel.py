"""Stop runs: they save, and are not requeued. `spknet resubmit` continues them.

spknet cancel runs/a         spknet cancel runs/my_sweep
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch import jobs
from launch.jobs import ALIVE
from launch.status import ACTIVE, run_status, runs_in, slurm_jobs
from shards.commands import Parser
from spknet.errors import UserError, run
from spknet.train.run_folder import write_json


class CancelError(UserError):
    """Nothing could be cancelled; the message says why."""


def cancel(folder: Path) -> str:
    """Ends a run's job, or its process on this machine; what was done. Raises CancelError."""
    note = jobs.read_job(folder)
    number = str(note.get("job"))
    if note.get("executor") == "slurm" and jobs.state_of(number) in ALIVE:
        done = subprocess.run(["scancel", number], capture_output=True, text=True)
        if done.returncode:
            raise CancelError(f"scancel {number}: {done.stderr.strip()}")
        return f"job {number}"
    if note.get("executor") == "local" and Path(f"/proc/{number}").exists():
        write_json(
            folder / "job.json", {**note, "cancelled": time.time()}
        )  # the task reads it and asks for no other start
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGTERM)
        return f"job {number} on this machine"
    owner = jobs.living_owner(folder)
    if owner is None:
        raise CancelError(f"{folder}: no job of it is queued or running")
    if owner.get("host") != os.uname().nodename:
        raise CancelError(
            f"{folder} is trained on {owner.get('host')} (pid {owner.get('pid')}) without a job: stop it there"
        )
    os.kill(int(owner["pid"]), signal.SIGTERM)
    return f"process {owner['pid']}"


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 2 where there is nothing to cancel."""
    parser = Parser(prog="spknet cancel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run's folder or a sweep's")
    options = parser.parse_args(argv)
    runs = runs_in(options.folder)
    known = slurm_jobs(runs)
    active = [one for one in runs if run_status(one, known).state in ACTIVE]
    if not active:
        raise CancelError(f"{options.folder}: no run of it is queued or running")
    for one in active:
        print(f"{one}: cancelled {cancel(one)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
