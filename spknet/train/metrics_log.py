"""What a run tells: metrics.jsonl (one object a logged step or evaluation), TensorBoard, a progress bar.

After a restart, lines beyond the checkpoint's step and a torn last line are cut, and TensorBoard is told to forget what
lies beyond: each step stands once.

    log = MetricsLog(run_dir, first_step=1200); log.write({"step": 1210, "loss": 2.3})
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from shards.format import atomic_write


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl; a torn last line is left out."""
    objects = []
    for line in Path(path).read_bytes().splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return objects


class MetricsLog:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard. step: steps done; 0 starts anew."""

    def __init__(self, run_dir: str | Path, step: int, tensorboard: bool):
        self.path = Path(run_dir) / "metrics.jsonl"
        self.kept = [line for line in read_metrics(self.path) if line["step"] <= step] if self.path.exists() else []
        if step == 0:
            self.kept = []
        with atomic_write(self.path) as file:
            for line in self.kept:
                file.write(json.dumps(line).encode() + b"\n")
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (held open for the whole run)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(Path(run_dir) / "tensorboard", purge_step=step + 1)

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation of this step stands there already, from before a restart."""
        return any(line["step"] == step and "eval" in line for line in self.kept)

    def write(self, values: dict[str, Any]) -> None:
        """One line, in one write, so that a kill tears at most the last; numbers go to TensorBoard too."""
        self.file.write(json.dumps(values).encode() + b"\n")
        if self.board is None:
            return
        group, numbers = ("eval", values["eval"]) if "eval" in values else ("train", values)
        for name, value in numbers.items():
            if isinstance(value, (int, float)) and name != "step":
                self.board.add_scalar(f"{group}/{name}", value, values["step"])

    def add_picture(self, name: str, path: Path, step: int) -> None:
        """A PNG for TensorBoard."""
        if self.board is not None and path.exists():
            import matplotlib.image

            pixels = matplotlib.image.imread(path)[..., :3]
            self.board.add_image(name, pixels, step, dataformats="HWC")

    def sync(self) -> None:
        """What is written so far outlives the machine: called before a checkpoint of the same step is."""
        os.fsync(self.file.fileno())
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


class Meter:
    """Training time and the part of it spent waiting for data, since the last reading; stands still while paused."""

    def __init__(self):
        self.begun = self.last = time.monotonic()
        self.waited = 0.0

    def wait_begins(self) -> None:
        self.wait = time.monotonic()

    def wait_ends(self) -> None:
        self.waited += time.monotonic() - self.wait

    def elapsed(self) -> float:
        """Seconds since the last pause."""
        return time.monotonic() - self.begun

    def pause(self) -> float:
        self.stopped = time.monotonic()
        return self.stopped - self.begun

    def resume(self) -> None:
        now = time.monotonic()
        self.last += now - self.stopped
        self.begun = now

    def read(self, utterances: int) -> tuple[float, float]:
        """(utterances a second, fraction of the time that waited for data) since the last reading."""
        now = time.monotonic()
        seconds = max(now - self.last, 1e-9)
        fraction = min(1.0, self.waited / seconds)
        self.last, self.waited = now, 0.0
        return utterances / seconds, fraction


@contextlib.contextmanager
def profiler(run_dir: str | Path, enabled: bool):
    """A torch.profiler trace of 5 steps after 10, in RUN/profile; call its step() after each step."""
    if not enabled:
        yield None
        return
    import torch

    handler = torch.profiler.tensorboard_trace_handler(str(Path(run_dir) / "profile"))
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=5, warmup=5, active=5), on_trace_ready=handler
    ) as p:
        yield p
