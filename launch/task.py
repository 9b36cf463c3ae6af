"""One run as a submitit job: one task a node, each the parent of a torchrun, and what happens when the job is told to go.

    slurmd -> batch script: launch.batch begin, srun, launch.batch end
    node 0..n-1: slurmstepd -> submitit -> Task -> torchrun (a session of its own) -> one worker a rank

The Task saves nothing itself. It passes signals on and reads RUN/state.json, because torchrun hides how its workers ended.
It leaves with status 75 where the run is to go on; the batch script then asks for the requeue (launch/batch.py), and
submitit's controller does where there is no SLURM.

A torchrun that has lost its peers is ended by its task (launch/node.py), and `srun --wait` ends what still lives a while after
the first task's end.

    submitit.AutoExecutor(folder).submit(Task(["--config", "RECIPE", "--run_dir", "RUN"], "RUN", nodes=2, ranks_per_node=8))
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from submitit.core.utils import DelayedSubmission, JobPaths, UncompletedJobError

from launch import jobs, starts
from launch.log_text import BEGINNING, error_line
from launch.node import CLOSING_SECONDS, Node
from launch.processes import descendants, die_with_parent, kill, wait
from spknet.parallel.nodelist import expand, rendezvous_port
from spknet.train.run_folder import job_folder, job_id, read_state, write_state

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
MARGIN_SECONDS = 20  # of the signal delay, left for the requeue
CONTINUES = 75  # exit status: the run is to go on (EX_TEMPFAIL, as spknet.train's)


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
    stage: list[list[str]] = field(default_factory=list)  # words of shards.stage, on each node before each start
    environment: dict[str, str] = field(default_factory=dict)

    _node = None  # of a start, not of the task: a signal may come before there is one

    def __call__(self) -> dict:
        """Train until the run is done, on every node; returns state.json's content. Raises RunFailed, or leaves with 75."""
        place = Place.here()
        print(f"{BEGINNING} {self.run_dir}, job {place.job}, node {place.node}", file=sys.stderr, flush=True)
        self._node = Node(self.run_dir)
        os.environ.update(self.environment)
        if place.executor == "slurm":
            die_with_parent()  # a killed slurmstepd
        elif place.node == 0 and place.executor != "packed":
            starts.note_start(self.run_dir, place.job, [socket.gethostname()], dict(os.environ), self.ranks_per_node)
        previous = signal.signal(signal.SIGTERM, self._node.pass_on)
        try:
            self._stage()
            status = self._node.run(self.command(place))
            return self._judge(place, status) if place.node == 0 else {}
        except UncompletedJobError:  # from submitit's handler, where checkpoint() returned None
            if self._state()["state"] == "done":
                return self._state()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)

    def checkpoint(self) -> DelayedSubmission | None:
        """Called by submitit in its signal handler on node 0: what to requeue, or None for a run that has ended.

        Under SLURM the batch script requeues: this process then leaves with status 75.
        """
        if self._node is not None:
            self._node.pass_on(signal.SIGUSR2)
        grace, me = grace_seconds(self.signal_delay), os.getpid()
        if self._node is not None and self._node.torchrun is not None:  # and not still staging
            wait(grace, lambda: self._state()["state"] != "running" or not descendants(me))
        wait(min(grace, CLOSING_SECONDS), lambda: not descendants(me))
        state = self._state()["state"]
        kill(descendants(me))
        if state in ("failed", "done") or "cancelled" in jobs.read_job(self.run_dir):
            return None
        if Place.here().executor == "slurm":
            sys.exit(CONTINUES)
        starts.note_end(self.run_dir, starts.cause(self._state()))
        return DelayedSubmission(dataclasses.replace(self))

    def pass_on(self, signum: int, frame=None) -> None:
        """Signal handler of a task that is a process of its own."""
        if self._node is not None:
            self._node.pass_on(signum)

    def runs(self) -> list[Path]:
        """The run folders of this job."""
        return [Path(self.run_dir)]

    def command(self, place: Place) -> list[str]:
        """The torchrun command line of one node."""
        words = [*torchrun(place, self.nodes, self.ranks_per_node), "--max-restarts", str(self.max_restarts)]
        words += ["--signals-to-handle", SIGNALS, "--shutdown-timeout", str(grace_seconds(self.signal_delay))]
        # Each rank's words also stand in a file of their own: `spknet logs --rank`.
        words += ["--tee", "3", "--log-dir", str(job_folder(self.run_dir) / "ranks" / f"node{place.node}")]
        return [*words, "--log-line-prefix-template", "[rank ${rank}] ", "-m", "spknet.train", *self.argv]

    def _stage(self) -> None:
        """Copy the data to this node's own disk: whole tars that are there already are kept."""
        for words in self.stage:
            done = subprocess.run([sys.executable, "-m", "shards.stage", *words])
            if done.returncode:
                self._fail(
                    f"staging on {socket.gethostname()} failed: shards.stage {' '.join(words)}; the job's log says why"
                )

    def _state(self) -> dict:
        return (self._node or Node(self.run_dir)).state()

    def _judge(self, place: Place, status: int) -> dict:
        """What the end of torchrun means, on node 0. Where the run goes on, this never returns."""
        said = self._state()
        if said["state"] == "done":
            return said
        if said["state"] == "failed":
            raise RunFailed(f"{self.run_dir} failed at step {said['step']}: {said['reason']}")
        if read_state(self.run_dir) == self._node.before and not self._node.signalled:
            why = error_line(own_log(place)) or "the job's log says why"
            self._fail(f"torchrun ended with status {status} before the run started; {why}")
        if place.executor in ("slurm", "packed"):
            sys.exit(CONTINUES)
        starts.note_end(self.run_dir, starts.cause(said))
        if starts.without_progress(self.run_dir):
            self._fail(starts.without_progress(self.run_dir))
        if place.executor == "local" and "cancelled" not in jobs.read_job(self.run_dir):
            os.kill(os.getpid(), signal.SIGUSR2)  # submitit's handler: checkpoint(), and another start
            time.sleep(60)
        raise RunFailed(f"{self.run_dir} was interrupted (status {status}); the same command continues it")

    def _fail(self, reason: str) -> None:
        """Says `failed`, unless the run is done already or another holds it: then only the job fails."""
        done = (self._node.before or {}).get("state") == "done"
        if not done and jobs.living_owner(Path(self.run_dir)) is None:
            write_state(self.run_dir, "failed", starts.newest_checkpoint_step(self.run_dir), reason)
        raise RunFailed(f"{self.run_dir}: {reason}")


@dataclass
class Place:
    """Where a task runs: node index, host of node 0, job id (of the array's element)."""

    node: int
    head: str
    job: str
    executor: str  # slurm, local, debug, or packed: one of several runs of a job

    @classmethod
    def here(cls) -> Place:
        """Read from the environment that SLURM or submitit's local executor set."""
        executor = os.environ.get("SUBMITIT_EXECUTOR", "debug")
        if executor == "slurm":
            head = expand(os.environ["SLURM_JOB_NODELIST"])[0]
            return cls(int(os.environ["SLURM_NODEID"]), head, os.environ["SLURM_JOB_ID"], executor)
        job = os.environ.get("SLURM_JOB_ID") if executor == "packed" else os.environ.get("SUBMITIT_LOCAL_JOB_ID")
        return cls(0, "127.0.0.1", job or str(os.getpid()), executor)


def torchrun(place: Place, nodes: int, ranks_per_node: int) -> list[str]:
    """The words that start a torchrun on one node."""
    # On one node torchrun finds a free port; several can only meet at one that each of them can compute.
    endpoint = "127.0.0.1:0" if nodes == 1 else f"{place.head}:{rendezvous_port(place.job)}"
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(nodes), "--nproc-per-node", str(ranks_per_node)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", place.job),
        *("--rdzv-conf", f"is_host={int(place.node == 0)}"),
    ]


def own_log(place: Place) -> Path:
    """This task's stderr, as submitit redirects it; a path that is not there without submitit."""
    folder = os.environ.get("SUBMITIT_FOLDER")
    if folder is None:
        return Path("/nonexistent")
    return JobPaths(folder, job_id=job_id(), task_id=place.node).stderr


def grace_seconds(signal_delay: int) -> int:
    """Seconds that a run has for saving: the rest of the delay is for the requeue."""
    return max(signal_delay - MARGIN_SECONDS, signal_delay // 2)


def main(argv: list[str] | None = None) -> int:
    """`python -m launch.task JSON`: one run of several in a job (launch/several.py)."""
    task = Task(**json.loads((sys.argv[1:] if argv is None else argv)[0]))
    signal.signal(signal.SIGUSR2, task.pass_on)
    try:
        task()
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
