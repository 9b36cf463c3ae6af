"""The job that follows a run: spknet.evaluate on the same nodes and ranks, once the run's job has ended as done.

SLURM starts it (--dependency=afterok); interrupted, it starts anew.

    executor.submit(Evaluation(["--trials", "veri_test.txt", "--root", "DIR"], "runs/a", nodes=1, ranks_per_node=8))
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from dataclasses import dataclass

from submitit.core.utils import DelayedSubmission

from launch.processes import adopt_orphans, descendants, die_with_parent, kill
from launch.task import Place, RunFailed, torchrun


@dataclass
class Evaluation:
    """Callable that submitit pickles. `argv` are spknet.evaluate's words; the report goes to RUN/evaluation unless they say --out."""

    argv: list[str]
    run_dir: str
    nodes: int = 1
    ranks_per_node: int = 1

    def __call__(self) -> None:
        """Raises RunFailed where spknet.evaluate does not end with 0."""
        words = self.argv if "--out" in self.argv else [*self.argv, "--out", f"{self.run_dir}/evaluation"]
        command = [*torchrun(Place.here(), self.nodes, self.ranks_per_node), "-m", "spknet.evaluate"]
        adopt_orphans()
        try:
            status = subprocess.run(
                [*command, "--checkpoint", self.run_dir, *words], preexec_fn=die_with_parent
            ).returncode
        finally:
            kill(descendants(os.getpid()))
        if status:
            raise RunFailed(f"the evaluation of {self.run_dir} ended with status {status}; the job's log says why")

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit at a signal: start anew."""
        kill(descendants(os.getpid()))
        return DelayedSubmission(dataclasses.replace(self))
