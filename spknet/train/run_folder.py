"""The run folder and the signals: who owns the run, what state it is in, and what asks it to stop.

RUN/lock         the owner: host, pid, job; touched every 10 s
RUN/state.json   {"state": running | requeue | done | failed, "step", "reason", "time"}: what launchers act on
RUN/record.json  git revision, command, hosts, package versions, GPUs: what a reader of the results wants to know
RUN/config.yaml  every option of the run

with owned(run_dir) as run, StopSignals() as stop: run.state("running", step=0)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from shards.format import atomic_write
from spknet.errors import UserError

HEARTBEAT_SECONDS = 10
STALE_SECONDS = 35  # without a heartbeat an owner on another machine counts as dead
PACKAGES = ("spknet", "torch", "torchaudio", "numpy", "soundfile", "webdataset", "pydantic")


class RunError(UserError):
    """The run folder cannot be used; the message says why and what to do."""


def write_json(path: Path, value) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def read_state(run_dir: str | Path) -> dict | None:
    """RUN/state.json, or None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads((Path(run_dir) / "state.json").read_text())
    return None


def write_state(run_dir: str | Path, state: str, step: int, reason: str = "") -> None:
    """Sets RUN/state.json to running, requeue, done or failed."""
    write_json(Path(run_dir) / "state.json", {"state": state, "step": step, "reason": reason, "time": time.time()})


def record(devices: list[str], hosts: list[str]) -> dict:
    """What made this run: revision, command, hosts, versions, devices."""
    git = ["git", "-C", str(Path(__file__).parent)]
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "git_revision": revision + ("-modified" if changed else "") if revision else None,
        "command": sys.argv,
        "hosts": hosts,
        "devices": devices,
        "python": platform.python_version(),
        "packages": versions(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that shape a run's numbers."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def code_digest() -> str:
    """Digest of the source files that a rank runs: all ranks must have the same."""
    digest = hashlib.sha256()
    here = Path(__file__).parents[1]
    for path in sorted([*here.rglob("*.py"), *(here.parent / "shards").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def owned(run_dir: str | Path) -> Iterator[None]:
    """Holds RUN/lock. Raises RunError naming the owner where another living run holds it."""
    lock = Path(run_dir) / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": _start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    while not _take(lock, me):
        owner, age = _owner(lock)
        if owner is None:
            continue
        if not _dead(owner, age, me):
            raise RunError(
                f"{lock.parent} belongs to a run on {owner.get('host')} (pid {owner.get('pid')}, job {owner.get('job')}; last"
                f" sign of life {age:.0f} s ago); wait for it or stop it, or give another --run_dir"
            )
        # Renamed first, so that of two newcomers only one removes the dead owner's lock.
        with contextlib.suppress(FileNotFoundError):
            stale = lock.with_name(f"lock.{me['host']}.{os.getpid()}")
            os.replace(lock, stale)
            stale.unlink()
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(FileNotFoundError):
                os.utime(lock)

    threading.Thread(target=beat, daemon=True, name="heartbeat").start()
    try:
        yield
    finally:
        stopped.set()
        owner, _ = _owner(lock)
        if owner == me:
            lock.unlink()


def _take(lock: Path, me: dict) -> bool:
    # Linked into place whole: a reader never sees an empty lock.
    draft = lock.with_name(f"lock.{me['host']}.{me['pid']}.new")
    draft.write_text(json.dumps(me))
    try:
        os.link(draft, lock)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _owner(lock: Path) -> tuple[dict | None, float]:
    try:
        return json.loads(lock.read_text()), time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None, 0.0
    except json.JSONDecodeError:
        return {"host": "?", "pid": "?"}, time.time() - lock.stat().st_mtime


def _start(pid: int) -> str | None:
    """When a process of this machine started (ticks since boot): tells a reused pid from the old one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except FileNotFoundError:
        return None


def _dead(owner: dict, age: float, me: dict) -> bool:
    if owner.get("host") == me["host"]:
        return _start(owner["pid"]) != owner.get("start")
    same_job = owner.get("job") is not None and owner.get("job") == me["job"]  # requeued: the old step is gone
    return same_job or age > STALE_SECONDS


class StopSignals:
    """SIGTERM, SIGUSR1, SIGUSR2 and the first SIGINT ask the run to save and stop; repeats change nothing.

    A second SIGINT, a second or more after the first, leaves at once (one Ctrl-C under torchrun arrives twice: from the
    terminal and from the agent).
    """

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self):
        self.received: str | None = None
        self._first_interrupt: float | None = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is not None and now - self._first_interrupt >= 1:
                os._exit(130)
            self._first_interrupt = self._first_interrupt or now
        self.received = self.received or signal.Signals(number).name
