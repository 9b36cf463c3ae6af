"""A file that grows by whole records, through disks that are full for a moment.

What does not fit is taken back, so that no half record stands in the middle of the file, and waits in memory for the next try.
A killed process can leave a half record at the end only.

    file = GrowingFile(path, say); file.append(line); file.sync()
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from spknet.errors import UserError, of_system


class GrowingFile:
    """Appends to a file, which is made where it is missing. say: called with a line when writing fails, and when it works again."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self.path, self.say = path, say
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.waiting: deque[bytes] = deque()
        self._told = False

    def append(self, record: bytes) -> None:
        """Writes what waits and this record, or keeps it in memory."""
        self.waiting.append(record)
        try:
            self._write_waiting()
        except OSError as error:
            if not self._told:
                self.say(f"{self._problem(error)}; what belongs there waits in memory until there is room")
            self._told = True

    def sync(self) -> None:
        """All records outlive the machine. Raises UserError where some cannot be written, or their bytes not be kept."""
        try:
            self._write_waiting()
            os.fsync(self.file)
        except OSError as error:
            raise UserError(f"{self._problem(error)}; {len(self.waiting)} records of the log cannot be kept") from error

    def close(self) -> None:
        """Tries a last time, and says what is lost."""
        try:
            self._write_waiting()
        except OSError as error:
            self.say(f"{self._problem(error)}; {len(self.waiting)} records that waited in memory are lost")
        os.close(self.file)

    def _write_waiting(self) -> None:
        while self.waiting:
            size = os.fstat(self.file).st_size
            record = self.waiting[0]
            rest = memoryview(record)
            try:
                while rest:
                    rest = rest[os.write(self.file, rest) :]
            except OSError:
                if len(rest) < len(record):
                    os.ftruncate(self.file, size)
                raise
            self.waiting.popleft()
        if self._told:
            self.say(f"{self.path}: there is room again; nothing of it was lost")
            self._told = False

    def _problem(self, error: OSError) -> str:
        error.filename = error.filename or str(self.path)
        return str(of_system(error))
