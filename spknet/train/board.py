"""TensorBoard's files, written by whole records: curves and pictures of a run that may be killed at any moment.

An event file is a row of records, each a length, its checksum, an `Event` (tensorboard/compat/proto/event.proto) and its checksum.
TensorBoard reads a folder's files in the order of their names, which begin with a number; a session that starts at step k makes
it forget what it has read of step k and later. The number of each new file is larger than those that are there, whatever the
clocks of the machines say that wrote them. (torch's SummaryWriter names files by the machine's clock, and a disk that is full
for a moment ends its thread.)

    board = Board(run_dir / "tensorboard", step=1200, say=print); board.add(1210, {"train/loss": 2.3})
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from spknet.train.growing import GrowingFile

PNG = b"\x89PNG\r\n\x1a\n"
RGB = 3  # summary.proto: colour space of an image


class Board:
    """A new event file in a folder. step: what stands there of this step and later ones is void."""

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]):
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [
            int(match[1]) for p in folder.iterdir() if (match := re.match(r"events\.out\.tfevents\.(\d+)\.", p.name))
        ]
        number = max([int(time.time()), *(n + 1 for n in numbers)])
        self.file = GrowingFile(folder / f"events.out.tfevents.{number:010d}.spknet", say)
        self._append(file_version="brain.Event:2")
        self._append(step=step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """One point of each curve."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._append(step=step, summary=Summary(value=values))

    def add_picture(self, step: int, name: str, path: Path) -> None:
        """A PNG file as it is."""
        content = path.read_bytes()
        if not content.startswith(PNG) or len(content) < 24:
            return
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))  # of the IHDR chunk
        image = Summary.Image(height=height, width=width, colorspace=RGB, encoded_image_string=content)
        self._append(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def _append(self, **fields: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self.file.append(record.getvalue())
