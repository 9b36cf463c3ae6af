"""Who writes to the folder of a data set, and what its disk says to that.

A whole pack has the folder alone, tasks (`--task I/N`) share it. The lock is the kernel's (flock on the folder), so it ends with its
process; on mounts without locks nobody is kept out, and temporary names keep the writers apart.

Usage: with room(out), only_writer(out): ...
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from shards import format
from shards.format import ShardError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def only_writer(out: Path, shared: bool = False) -> Iterator[Callable[[], bool]]:
    """Locks OUT while it is packed: tasks share it, a whole pack has it alone. Its value asks whether a task is alone, and keeps it so."""
    (out / "parts").mkdir(parents=True, exist_ok=True)
    fd = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not format.lock(fd, shared):
            raise ShardError(f"another pack is writing to {out}; wait for its end, or stop it")
        yield lambda: format.lock(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def room(out: Path):
    """Turns `no space left on device` into what to do about it, and a temporary file that is gone."""
    try:
        yield
    except FileNotFoundError as error:
        if not str(error.filename).endswith(".tmp"):
            raise
        raise ShardError(
            f"{error.filename} is gone: is another pack writing to {out}? Run the same command again"
        ) from None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ShardError(
            f"no room left in {out} ({error.strerror}): the finished tars are kept; make room and run the same command again"
        ) from None
