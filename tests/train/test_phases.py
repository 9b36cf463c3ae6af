"""Kills and signals in every phase of a run under torchrun, of every kind of process: it goes on to the same bits.

SPKNET_KILLS=30 python -m pytest -s --timeout 3600 tests/train/test_phases.py       the suite makes three
"""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.processes import descendants
from spknet.parallel.process import started
from spknet.train.metrics_log import read_metrics
from spknet.train.run_folder import read_state
from tests.train.test_kill import KILLS, SEED, assert_same_run
from tests.train.test_metrics_log import events

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("start", "loading", "training", "saving", "evaluating")
VICTIMS = ("worker", "agent", "tree", "loader")
END_SECONDS = 60.0  # from the event until torchrun and all below it have ended
EPOCH = 6  # steps between two evaluations


class Life:
    """One start of the run: two ranks with two loaders each."""

    def __init__(self, words: list[str], run: Path):
        self.run, self.before, self.lines = run, read_state(run), len(lines_of(run))
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*agent, "--shutdown-timeout", "30", "-m", "spknet.train", *words, "--run_dir", str(run)]
        self.agent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)

    def is_in(self, phase: str) -> bool:
        """Whether the run has just come to this phase."""
        added = lines_of(self.run)[self.lines :]
        if phase == "start":
            return bool(children(self.agent.pid))
        if phase == "loading":
            return read_state(self.run) != self.before
        if phase == "saving":
            return bool(added) and bool(list(self.run.glob("checkpoints/.*.tmp")))
        if phase == "evaluating":  # saved, and not yet told
            return bool(added) and added[-1]["step"] % EPOCH == 0 and "eval" not in added[-1]
        return bool(added)

    def victims(self, kind: str) -> list[int]:
        """Process numbers; none where that kind has not started yet."""
        ranks = children(self.agent.pid)
        loaders = [loader for rank in ranks for loader in children(rank)]
        return {
            "worker": ranks[-1:],
            "agent": [self.agent.pid],
            "tree": [self.agent.pid, *descendants(self.agent.pid)],
            "loader": loaders[-1:],
        }[kind]

    def wait_for(self, reached: Callable[[], bool]) -> bool:
        """False where the run has ended before."""
        while not reached():
            if self.agent.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def end(self, seconds: float = 900) -> None:
        """Waits until nothing of it is left."""
        begun = time.monotonic()
        while self.agent.poll() is None or self.left():
            assert time.monotonic() - begun < seconds, self.left()
            time.sleep(0.05)

    def left(self) -> list[int]:
        """Living processes whose command line names the run; loaders have that of their rank."""
        return [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if str(self.run).encode() in read(path) and started(int(path.parent.name))
        ]


def read(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def lines_of(run: Path) -> list[dict]:
    return read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []


def interrupt(life: Life, phase: str, kind: str, number: int, after: float) -> bool:
    """Sends the signal, that many seconds into the phase; False where the run has ended before."""
    if not life.wait_for(lambda: life.is_in(phase)):
        return False
    time.sleep(after)
    if not life.wait_for(lambda: bool(life.victims(kind))):
        return False
    for pid in life.victims(kind):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return True


@pytest.mark.slow
def test_kills_and_signals_in_every_phase_and_of_every_process_continue_to_the_same_bits(options, corpus, tmp_path):
    steps = EPOCH * (2 + KILLS // 2)
    words = [*options, "--data.workers", "2", "--train.max_steps", str(steps), "--train.save_every_steps", "4"]
    words += ["--eval.trials", f"{corpus}/test_list.txt", "--eval.root", str(corpus), "--log.tensorboard", "true"]
    words += ["--eval.every_epochs", str(EPOCH / 3), "--train.keep_checkpoints", "0", "--train.timeout_seconds", "60"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    Life(words, whole).end()
    generator = random.Random(SEED)
    plan = [way for way in itertools.product(PHASES, VICTIMS) if way != ("start", "loader")]  # there is none yet
    generator.shuffle(plan)
    kills, terms = (
        itertools.cycle(plan),
        itertools.cycle([way for way in plan if way[1] != "loader"]),
    )  # they ignore SIGTERM
    for count in range(KILLS):
        number = signal.SIGTERM if count % 3 == 2 else signal.SIGKILL
        phase, kind = next(terms if number == signal.SIGTERM else kills)
        life = Life(words, run)
        hit = interrupt(life, phase, kind, number, 0 if phase == "saving" else generator.uniform(0, 0.5))
        assert hit, f"interruption {count} ({phase}, {kind}) was not made: the run has ended before"
        life.end(END_SECONDS)
        state = read_state(run) or {}
        print(count, signal.Signals(number).name, phase, kind, state.get("state"), state.get("step"), flush=True)
    life = Life(words, run)
    ending = life.wait_for(
        lambda: lines_of(run)[-1:] and "eval" in lines_of(run)[-1] and lines_of(run)[-1]["step"] == steps
    )
    if ending and life.agent.poll() is None:
        os.killpg(life.agent.pid, signal.SIGKILL)  # in its last moments
    life.end()
    Life(words, run).end()
    assert_same_run(run, whole, steps)
    evaluations = [(line["step"], line["eval"]["eer"]) for line in lines_of(run) if "eval" in line]
    assert evaluations == [(line["step"], line["eval"]["eer"]) for line in lines_of(whole) if "eval" in line]
    assert [e.step for e in events(run).Scalars("train/loss")] == list(range(1, steps + 1))
    assert json.loads((run / "state.json").read_text())["step"] == steps
