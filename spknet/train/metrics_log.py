"""What a run tells: metrics.jsonl (one object a logged step or evaluation) and the same in TensorBoard.

After a restart, lines beyond the checkpoint's step and a torn last line are cut, and TensorBoard is told to forget what
lies beyond: each step stands once. A line in the middle that cannot be read is named and left out; those behind it stay.
Both files grow by whole records (growing.py), and a checkpoint is saved only when all of them are written.

    log = MetricsLog(run_dir, step=1200, tensorboard=True, owner=owner); log.write({"step": 1210, "loss": 2.3})
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.format import write_file
from spknet.messages import warn
from spknet.train.growing import GrowingFile
from spknet.train.lock import Owner


def read_metrics(path: str | Path, say: Callable[[str], None] = lambda message: None) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl. say: called for each line that cannot be read; a torn last line is left out silently."""
    return [value for value, _ in _read(Path(path), say)]


def _read(path: Path, say: Callable[[str], None]) -> list[tuple[dict[str, Any], bytes]]:
    """(object, its line) of each step and evaluation, once: where one stands twice, the later."""
    lines = path.read_bytes().split(b"\n")
    entries = {}
    for number, line in enumerate(lines, start=1):
        value = _parse(line)
        if value is None and line.strip() and number < len(lines):
            start = line.rfind(b'{"step"')  # behind a line whose writer was killed, or had no room
            value, line, torn = _parse(line[start:]) if start > 0 else None, line[start:], line
            kept = "what follows on it is kept" if value else "it is left out"
            say(f"{path}, line {number} cannot be read ({ascii(torn[:40].decode(errors='replace'))}...); {kept}")
        if value is not None:
            key = (value["step"], "eval" in value)
            entries.pop(key, None)
            entries[key] = (value, line)
    return list(entries.values())


def _parse(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(line)
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            return value
    return None


class MetricsLog:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard. step: steps done; 0 starts anew.

    owner: of the run folder, asked before each line; say: called with a line where something is wrong with a file.
    """

    def __init__(
        self,
        run_dir: str | Path,
        step: int,
        tensorboard: bool,
        owner: Owner | None = None,
        say: Callable[[str], None] = warn,
    ):
        self.run_dir, self.owner, self.say = Path(run_dir), owner, say
        self.path = self.run_dir / "metrics.jsonl"
        self.kept = self._cut(step)
        self.file = GrowingFile(self.path, self.say)
        self.board = None
        if tensorboard:
            from spknet.train.board import Board

            # What stands there of the checkpoint's own step may lack its picture: it is shown once more.
            self.board = Board(self.run_dir / "tensorboard", step, self.say)
            for value in self.kept:
                if value["step"] == step:
                    self._show(value)
            if self.has_evaluation(step):
                self.add_picture("eval/det", self.run_dir / "eval" / f"step-{step:08d}" / "det.png", step)

    def _cut(self, step: int) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        self._check()
        entries = [(value, line) for value, line in _read(self.path, self.say) if step > 0 and value["step"] <= step]
        content = b"".join(line + b"\n" for _, line in entries)
        if content != self.path.read_bytes():
            write_file(self.path, content)
        return [value for value, _ in entries]

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation of this step stands there already, from before a restart."""
        return any(line["step"] == step and "eval" in line for line in self.kept)

    def write(self, values: dict[str, Any]) -> None:
        """One line, of a step or of an evaluation {"step", "eval": {...}}; its numbers go to TensorBoard too.

        Raises RunError where the folder is another run's by now.
        """
        self._check()
        self.file.append(json.dumps(values).encode() + b"\n")
        self._show(values)

    def _show(self, values: dict[str, Any]) -> None:
        if self.board is not None:
            group, numbers = ("eval", values["eval"]) if "eval" in values else ("train", values)
            points = {f"{group}/{k}": v for k, v in numbers.items() if isinstance(v, (int, float)) and k != "step"}
            points |= {f"step_seconds/{part}": spent for part, spent in values.get("step_seconds", {}).items()}
            self.board.add(values["step"], points)

    def add_picture(self, name: str, path: Path, step: int) -> None:
        """A PNG for TensorBoard, where it exists."""
        if self.board is not None and path.is_file():
            self.board.add_picture(step, name, path)

    def _check(self) -> None:
        if self.owner is not None:
            self.owner.check()

    def sync(self) -> None:
        """What is written so far outlives the machine: called before a checkpoint of the same step is. Raises UserError."""
        self.file.sync()
        if self.board is not None:
            self.board.file.sync()

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.file.close()


@contextlib.contextmanager
def profiler(run_dir: str | Path, enabled: bool):
    """One torch.profiler trace, of the 5 steps after the first 10 of this start, in RUN/profile; call its step() after each."""
    if not enabled:
        yield None
        return
    import torch

    handler = torch.profiler.tensorboard_trace_handler(str(Path(run_dir) / "profile"))
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=5, warmup=5, active=5, repeat=1), on_trace_ready=handler
    ) as p:
        yield p
