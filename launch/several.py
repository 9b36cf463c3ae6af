"""Several small runs in one job on one node: each with GPUs of its own, or sharing them where there are fewer.

    Several([Task(...), Task(...)])      as a submitit job; `spknet sweep --runs-per-job 4` makes them

Every run is a process of its own (python -m launch.task), so that one that fails leaves the others alone. A run that is done
is not started again when the job is requeued for another.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from launch.processes import adopt_orphans, descendants, die_with_parent, kill, wait
from launch.task import CONTINUES, RunFailed, Task, grace_seconds
from spknet.train.run_folder import job_folder, read_state

POLL_SECONDS = 0.5


@dataclass
class Several:
    """Callable that submitit pickles: the tasks of one job, all on one node."""

    tasks: list[Task]

    _processes = ()

    @property
    def ranks_per_node(self) -> int:
        return self.tasks[0].ranks_per_node

    def runs(self) -> list[Path]:
        """The run folders of this job."""
        return [Path(task.run_dir) for task in self.tasks]

    def __call__(self) -> None:
        """Train all until each is done. Raises RunFailed where one failed; leaves with 75 where one is to go on."""
        die_with_parent()
        adopt_orphans()
        signal.signal(signal.SIGTERM, self._pass_on)
        waiting = [task for task in self.tasks if (read_state(task.run_dir) or {}).get("state") != "done"]
        self._processes = [self._start(task, self.tasks.index(task)) for task in waiting]
        try:
            while any(p.poll() is None for p in self._processes):
                time.sleep(POLL_SECONDS)
        finally:
            kill(descendants(os.getpid()))
        codes = [p.returncode for p in self._processes]
        if any(code not in (0, 1) for code in codes):
            sys.exit(CONTINUES)
        failed = [task.run_dir for task, code in zip(waiting, codes) if code]
        if failed:
            raise RunFailed(f"{len(failed)} of {len(self.tasks)} runs failed: {', '.join(failed)}")

    def checkpoint(self) -> DelayedSubmission | None:
        """Called by submitit in its signal handler: all runs save, and the batch script requeues the job."""
        self._pass_on(signal.SIGUSR2, None)
        wait(grace_seconds(self.tasks[0].signal_delay), lambda: not descendants(os.getpid()))
        kill(descendants(os.getpid()))
        if all((read_state(run) or {}).get("state") in ("done", "failed") for run in self.runs()):
            return None
        if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            sys.exit(CONTINUES)
        return DelayedSubmission(dataclasses.replace(self))

    def _start(self, task: Task, index: int) -> subprocess.Popen:
        environment = {**os.environ, "SUBMITIT_EXECUTOR": "packed", **gpus_of(index, task.ranks_per_node)}
        folder = job_folder(task.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.err", "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "launch.task", json.dumps(dataclasses.asdict(task))],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _pass_on(self, signum: int, frame) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signum)


def gpus_of(index: int, ranks: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of the index-th run with so many ranks: the next GPUs of the job, round and round."""
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if not visible:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[(index * ranks + i) % len(visible)] for i in range(ranks))}
