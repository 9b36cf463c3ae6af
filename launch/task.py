"""One run as a submitit job: one task a node, each the parent of a torchrun, and what happens when the job is told to go.

    node 0..n-1: slurmstepd -> submitit -> Task -> torchrun (a session of its own) -> one worker a rank

submitit keeps a job alive by pickling: on its signal (USR2) it calls `Task.checkpoint()` on node 0, writes the returned
DelayedSubmission over the job's pickle and calls `scontrol requeue`. The Task saves nothing itself. It passes the
signal on and reads RUN/state.json, because torchrun hides how its workers ended:

    done      the job is over                        requeue   saved on a signal: requeue the job
    failed    an error of the run: never requeued    running   the workers died: requeue, go on from the last checkpoint

RUN/launch.json holds one entry a start: two requeues in a row without a new checkpoint end the run as failed.

    submitit.AutoExecutor(folder).submit(Task(["--config", "RECIPE", "--run_dir", "RUN"], "RUN", nodes=2, ranks_per_node=8))
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import UncompletedJobError
from submitit.helpers import DelayedSubmission

from spknet.train.run_folder import read_state, write_json, write_state

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
MARGIN_SECONDS = 20  # of the signal delay, left for submitit to write its pickle and for SLURM to requeue


class RunFailed(RuntimeError):
    """The run ended as failed; the message has state.json's reason."""


@dataclass
class Task:
    """Callable that submitit pickles. `argv` are spknet.train's words; run_dir must be absolute."""

    argv: list[str]
    run_dir: str
    nodes: int = 1
    ranks_per_node: int = 1
    signal_delay: int = 180  # seconds between the signal and the kill
    max_restarts: int = 1  # of torchrun: a rank that dies takes the group back to the last checkpoint

    # Of a start, not of the task: a signal may come before there is a torchrun.
    _torchrun = None
    _before = None
    _signalled = False

    def __call__(self) -> dict:
        """Train until the run is done, on every node; returns state.json's content. Raises RunFailed."""
        place = Place.here()
        self._before = read_state(self.run_dir)  # every write has a time of its own
        if place.node == 0:
            self._note_start(place.job)
        _adopt_orphans()
        self._torchrun = subprocess.Popen(
            self.command(place), start_new_session=True, preexec_fn=_die_with_parent, stdin=subprocess.DEVNULL
        )
        previous = signal.signal(signal.SIGTERM, self._pass_on)
        try:
            while not _has_ended(self._torchrun.pid):
                time.sleep(0.2)
            status = self._torchrun.wait()
            return self._judge(place, status) if place.node == 0 else {}
        except UncompletedJobError:  # from submitit's handler, where checkpoint() returned None
            if self._state()["state"] == "done":
                return self._state()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
            _kill(_descendants(os.getpid()))

    def checkpoint(self) -> DelayedSubmission | None:
        """Called by submitit in its signal handler on node 0: what to requeue, or None for a run that has ended."""
        self._pass_on(signal.SIGUSR2, None)
        grace, me = grace_seconds(self.signal_delay), os.getpid()
        _wait(grace, lambda: self._state()["state"] != "running" or not _descendants(me))
        _wait(min(grace, 5), lambda: not _descendants(me))  # saved: let it close its files
        state = self._state()["state"]
        _kill(_descendants(me))
        return None if state in ("failed", "done") else DelayedSubmission(dataclasses.replace(self))

    def command(self, place: Place) -> list[str]:
        """The torchrun command line of one node."""
        # On one node torchrun finds a free port; several can only meet at one that each of them can compute.
        endpoint = "127.0.0.1:0" if self.nodes == 1 else f"{place.head}:{rendezvous_port(place.job)}"
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(self.nodes), "--nproc-per-node", str(self.ranks_per_node)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", place.job),
            *("--rdzv-conf", f"is_host={int(place.node == 0)}"),
            *("--max-restarts", str(self.max_restarts)),
            *("--signals-to-handle", SIGNALS, "--shutdown-timeout", str(grace_seconds(self.signal_delay))),
            *("-m", "spknet.train", *self.argv),
        ]

    def _note_start(self, job: str) -> None:
        """Append to RUN/launch.json; fail where this job's last two requeues brought no new checkpoint."""
        path = Path(self.run_dir) / "launch.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        starts = json.loads(path.read_text())["starts"] if path.exists() else []
        step = newest_checkpoint_step(self.run_dir)
        starts.append({"job": job, "step": step, "time": time.time()})
        write_json(path, {"starts": starts})
        last = starts[-3:]
        if len(last) == 3 and all(s["job"] == job and s["step"] == step for s in last):
            self._fail(f"requeued twice without progress: job {job} has started three times at step {step}")

    def _state(self) -> dict:
        """state.json if this start has written it, else `running`: an earlier start's word does not count."""
        said = read_state(self.run_dir)
        return said if said and said != self._before else {"state": "running", "step": 0}

    def _judge(self, place: Place, status: int) -> dict:
        """What the end of torchrun means, on node 0. Where the job is requeued, this never returns."""
        said = self._state()
        if said["state"] == "done":
            return said
        if said["state"] == "failed":
            raise RunFailed(f"{self.run_dir} failed at step {said['step']}: {said['reason']}")
        if read_state(self.run_dir) == self._before and not self._signalled:
            self._fail(f"torchrun ended with status {status} before the run started; the job's log says why")
        if place.slurm_ends_it():
            print(
                f"{self.run_dir} stopped: job {place.job} was cancelled, or requeued by SLURM itself", file=sys.stderr
            )
            return said
        if place.executor != "debug":
            os.kill(os.getpid(), signal.SIGUSR2)  # submitit's handler: checkpoint(), requeue, exit
            time.sleep(60)
        raise RunFailed(f"{self.run_dir} was interrupted (status {status}); the same command continues it")

    def _fail(self, reason: str) -> None:
        write_state(self.run_dir, "failed", newest_checkpoint_step(self.run_dir), reason)
        raise RunFailed(f"{self.run_dir}: {reason}")

    def _pass_on(self, signum: int, frame) -> None:
        self._signalled = True
        if self._torchrun is not None and not _has_ended(self._torchrun.pid):
            os.kill(self._torchrun.pid, signum)


@dataclass
class Place:
    """Where a task runs: node index, host of node 0, job id (of the array's element)."""

    node: int
    head: str
    job: str
    executor: str  # slurm, local or debug

    @classmethod
    def here(cls) -> Place:
        """Read from the environment that SLURM or submitit's local executor set."""
        executor = os.environ.get("SUBMITIT_EXECUTOR", "debug")
        if executor == "slurm":
            head = submitit.JobEnvironment().hostnames[0]
            return cls(int(os.environ["SLURM_NODEID"]), head, os.environ["SLURM_JOB_ID"], executor)
        return cls(0, "127.0.0.1", os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid())), executor)

    def slurm_ends_it(self) -> bool:
        """Whether SLURM is taking the job down already (scancel, scontrol requeue): a requeue is not ours to ask for."""
        if self.executor != "slurm":
            return False
        asked = subprocess.run(["squeue", "-h", "-j", self.job, "-o", "%T"], capture_output=True, text=True)
        return asked.stdout.strip() != "RUNNING"


def newest_checkpoint_step(run_dir: str | Path) -> int:
    """Step of the newest RUN/checkpoints/step-NNNNNNNN.pt, 0 where there is none."""
    names = (p.stem for p in Path(run_dir).glob("checkpoints/step-*.pt"))
    return max((int(n.removeprefix("step-")) for n in names if n.removeprefix("step-").isdigit()), default=0)


def rendezvous_port(job: str) -> int:
    """A port below the usual ephemeral range that every node computes alike."""
    return 15000 + int(job) % 15000


def grace_seconds(signal_delay: int) -> int:
    """Seconds that a run has for saving: the rest of the delay is for submitit's pickle and for SLURM."""
    return max(signal_delay - MARGIN_SECONDS, signal_delay // 2)


def _wait(seconds: float, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.2)


def _has_ended(pid: int) -> bool:
    """Without reaping: Popen.poll() takes a lock, and a signal handler may have interrupted its holder."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:  # reaped
        return True


def _adopt_orphans() -> None:
    """torchrun's workers are sessions of their own; where torchrun dies first they become this process's children."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _die_with_parent() -> None:
    """In the child: TERM to torchrun, hence to its workers, if this task is killed. SLURM may not find a new session."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _descendants(pid: int) -> list[int]:
    """Living processes below pid, read from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
