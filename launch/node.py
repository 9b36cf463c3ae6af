"""The parent of a torchrun on one node: passes signals on, and ends it where it only waits for peers that are gone.

    srun python -m launch.node RUN python -m torch.distributed.run ... -m spknet.train ...

A torchrun that has lost its peers waits for them for minutes: at the rendezvous, or at its end. So it is ended

    5 s after its last worker, once RUN/state.json says `requeue`        5 s after it says `failed`, 20 s after `done`
    20 s after its last worker, whatever state.json says (a restart takes some seconds)
    5 s after it where the first node's torchrun, at which all meet, no longer answers
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from launch import batch, starts
from launch.processes import adopt_orphans, descendants, die_with_parent, has_ended, kill, wait
from spknet.errors import UserError, run
from spknet.train.run_folder import read_state

# Seconds until torchrun is ended: without workers, or once the run is over, whatever lives.
LIMITS = {"running": 20.0, "requeue": 5.0, "failed": 5.0, "done": 20.0}
CONNECT_SECONDS = 3  # a lost host does not even refuse
CLOSING_SECONDS = 5  # for workers to close their files once they have saved
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Node:
    """A torchrun and the run that it trains. `before`: what state.json held at the start, which says nothing of this one."""

    def __init__(self, run_dir: str):
        self.run_dir, self.before = run_dir, read_state(run_dir)  # every write has a time of its own
        self.torchrun: subprocess.Popen | None = None
        self.signalled = False
        self.met = False  # whether the torchrun at which all meet has answered

    def state(self) -> dict:
        """state.json if this start has written it, else `running`: an earlier start's word does not count."""
        said = read_state(self.run_dir)
        return said if said and said != self.before else {"state": "running", "step": 0}

    def pass_on(self, signum: int, frame=None) -> None:
        """Signal handler: hands the signal to torchrun, and notes that this start's end was asked for."""
        if not self.signalled and os.environ.get("SLURM_NODEID", "0") == "0":
            starts.note_end(self.run_dir, "signal")
        self.signalled = True
        if self.torchrun is not None and not has_ended(self.torchrun.pid):
            os.kill(self.torchrun.pid, signum)

    def run(self, command: list[str]) -> int:
        """torchrun's exit status. All that is left of it is killed before this returns."""
        adopt_orphans()
        try:
            self.torchrun = subprocess.Popen(
                command, start_new_session=True, preexec_fn=die_with_parent, stdin=subprocess.DEVNULL
            )
            self._watch()
        finally:
            kill(descendants(os.getpid()))
        if self.state()["state"] not in ("failed", "done"):
            batch.take_over([Path(self.run_dir)])
        return self.torchrun.wait()

    def _watch(self) -> None:
        worked, since = False, time.monotonic()
        while not has_ended(self.torchrun.pid):
            time.sleep(0.5)
            state, workers = self.state()["state"], descendants(self.torchrun.pid)
            worked = worked or bool(workers)
            if workers and state not in ("failed", "done"):
                since = time.monotonic()
            limit = LIMITS.get(state, CLOSING_SECONDS)
            if not (workers and self.met) and self._has_lost_the_meeting_point():
                limit = CLOSING_SECONDS
            if (worked or state != "running") and time.monotonic() - since > limit:
                self._end(state, len(workers))

    def _has_lost_the_meeting_point(self) -> bool:
        """Whether the first node's torchrun has answered once and does no longer."""
        words = self.torchrun.args
        host, _, port = dict(zip(words, words[1:])).get("--rdzv-endpoint", "").rpartition(":")
        if not port.isdigit() or port == "0":  # on one node torchrun finds a free one
            return False
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError:
            return self.met
        self.met = True
        return False

    def _end(self, state: str, workers: int) -> None:
        print(
            f"ending torchrun on {socket.gethostname()}: the run is '{state}', {workers} workers left", file=sys.stderr
        )
        os.kill(self.torchrun.pid, signal.SIGTERM)
        wait(CLOSING_SECONDS if workers else 1, lambda: has_ended(self.torchrun.pid))
        kill(descendants(os.getpid()))


def main(argv: list[str] | None = None) -> int:
    """Exit status of the command."""
    run_dir, *command = (sys.argv[1:] if argv is None else argv) or [""]
    if not command:
        raise UserError("usage: python -m launch.node RUN COMMAND ..., such as: runs/a torchrun -m spknet.train ...")
    die_with_parent()  # a killed slurmstepd
    node = Node(run_dir)
    for number in PASSED_ON:
        signal.signal(number, node.pass_on)
    return node.run(command)


if __name__ == "__main__":
    sys.exit(run(main))
