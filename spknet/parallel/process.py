"""Whether a process still lives: told by its machine, its number and its start, since numbers are used again.

place = identity()          # on one process
has_died(*place)            # on any other: True only where that process was of this machine and is gone
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path


@functools.cache
def machine() -> str | None:
    """Tells machines, and containers with process numbers of their own, apart where host names do not."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return None


def started(pid: int) -> str | None:
    """When a process of this machine started (ticks since boot): tells a reused pid from the old one. None: it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def identity() -> tuple[str | None, int, str | None]:
    """Machine, number and start of this process."""
    return machine(), os.getpid(), started(os.getpid())


def has_died(where: str | None, pid: int, start: str | None) -> bool:
    """Whether the process of that identity is known to be dead; False where only another machine can know."""
    return None not in (where, start) and where == machine() and started(pid) != start
