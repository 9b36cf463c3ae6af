"""Jobs of a run: RUN/job.json, and what SLURM says of them in one squeue and one sacct call.

RUN/job.json   {"job", "executor", "log", "time", "cluster": [...], "run": [...], "cwd", "cancelled": time or absent}

    known = slurm_jobs(runs)         {"812": "RUNNING|None", "811_3": "CANCELLED by 1000|"} or None without SLURM
    holder = holder_of("runs/a")     "job 812 (RUNNING)", "a run on gpu1 (pid 77)" or None: who must end before another may start
"""

from __future__ import annotations

import getpass
import json
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Collection, Iterable
from pathlib import Path

from spknet.train.lock import STALE_SECONDS
from spknet.train.run_folder import write_json

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "CONFIGURING", "SUSPENDED", "SPECIAL_EXIT")
ALIVE = (*WAITING, "RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")
SLURM_SECONDS = 30  # a client that cannot reach its controller tries for a minute or more


def read_json(path: Path) -> dict:
    """The object in a small JSON file; {} where it is missing, damaged or something else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_job(run: str | Path) -> dict:
    return read_json(Path(run) / "job.json")


def note_job(folder: str | Path, **values) -> None:
    """Write RUN/job.json: the run's newest job."""
    write_json(Path(folder) / "job.json", {**values, "time": time.time()})


def ask(*command: str) -> str | None:
    """What a client of SLURM prints; None where it is missing, fails or does not answer."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return None if done.returncode else done.stdout


def slurm_jobs(runs: Iterable[Path] = ()) -> dict[str, str] | None:
    """STATE|reason of this user's queued and running jobs by id (array elements as 12_3), and of the ended jobs of `runs`.

    None without SLURM. One squeue call, and one of sacct for all runs whose job is no longer in the queue.
    """
    queue = ask("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%r")
    if queue is None:
        return None
    known = dict(line.split("|", 1) for line in queue.splitlines())
    notes = [read_job(run) for run in runs]
    ended = sorted({str(n["job"]) for n in notes if n.get("executor") == "slurm" and n.get("job") not in known})
    said = ask("sacct", "-X", "-n", "-P", "-j", ",".join(ended), "-o", "JobID,State,ExitCode") if ended else None
    for line in (said or "").splitlines():
        job, state, code = line.split("|")
        known.setdefault(job, f"{state}|{'' if code == '0:0' else f'exit code {code}'}")
    return known


def state_of(job: str) -> str:
    """SLURM's word for a job: RUNNING, PENDING, CANCELLED, ...; empty where it does not know it."""
    queued = ask("squeue", "-h", "-j", job, "-o", "%T")
    if queued and queued.strip():
        return queued.split()[0]
    ended = ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State")
    return ended.split()[0] if ended and ended.strip() else ""


def holder_of(run: str | Path, mine: Collection[str] = ()) -> str | None:
    """Who has the run already: its queued or running job, or a living process. `mine`: names of the asking job."""
    run = Path(run).resolve()
    note = read_job(run)
    job, executor = str(note.get("job")), note.get("executor")
    if executor == "slurm" and job not in mine:
        state = state_of(job)
        if state in ALIVE:
            return f"job {job} ({state})"
    if executor == "local" and job not in mine and Path(f"/proc/{job}").exists():
        return f"job {job} on this machine (RUNNING)"
    batch = _batch_job_of(run, mine)
    if batch is not None:
        return batch
    owner = living_owner(run)
    if owner is None or owner.get("job") in mine:
        return None
    state = state_of(str(owner["job"])) if owner.get("job") and shutil.which("sacct") else ""
    if state and state not in ALIVE:  # its node may be another one, where a lock looks alive for 35 s after a kill
        return None
    return f"a run on {owner.get('host')} (pid {owner.get('pid')}, job {owner.get('job')})"


def living_owner(run: Path) -> dict | None:
    """Content of RUN/lock where its owner breathes: its process lives here, or its heartbeat is fresh."""
    lock = run / "lock"
    owner = read_json(lock)
    if not owner:
        return None
    if owner.get("host") == socket.gethostname() and not Path(f"/proc/{owner.get('pid')}").exists():
        return None
    return owner if breathes(run) else None


def breathes(run: Path) -> bool:
    """Whether the owner of RUN/lock has touched it lately."""
    try:
        return time.time() - (run / "lock").stat().st_mtime < STALE_SECONDS
    except OSError:
        return False


def _batch_job_of(run: Path, mine: Collection[str]) -> str | None:
    """A queued or running `sbatch slurm/train.sbatch ... --run_dir RUN`, which leaves nothing in the folder before it starts.

    Of two that wait, the one with the lower number goes first.
    """
    said = ask("squeue", "-h", "-u", getpass.getuser(), "-o", "%A|%T|%Z|%o") or ""
    for line in said.splitlines():
        number, state, folder, command = line.split("|", 3)
        if number in mine or (mine and state in WAITING and int(number) > min(int(m) for m in mine if m.isdigit())):
            continue
        if any(run == Path(os.path.join(folder, path)).resolve() for path in run_dirs(command)):
            return f"job {number} ({state})"
    return None


def run_dirs(command: str) -> list[str]:
    """Values of --run_dir in a command line."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    joined = [word.removeprefix("--run_dir=") for word in words if word.startswith("--run_dir=")]
    return joined + [b for a, b in zip(words, words[1:]) if a == "--run_dir"]
