"""What a rank must know of the torchrun that has started it: what it has set by itself, and that it starts all ranks again.

torchrun cannot tell an error of the run from a lost rank: with `--max-restarts` it repeats both. So the rank that ends for
good also ends its torchrun.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

PARENT = os.getppid()  # when this process began
PROGRAMS = [b"torch.distributed.run", b"torch.distributed.launch", b"torchrun"]
CONNECT_SECONDS = 3  # a lost host does not even refuse


def is_gone() -> bool:
    """Whether the torchrun that has started this rank is dead. It may have died before this process looked first."""
    return "TORCHELASTIC_RUN_ID" in os.environ and (os.getppid() != PARENT or not _may_be_agent(PARENT))


def sets_threads() -> bool:
    """Whether OMP_NUM_THREADS is torchrun's own, which it sets to 1 where nobody has said anything."""
    # The agent changes its own environment: what it was started with still stands in /proc.
    given = _of_parent("environ")
    return bool(given) and not any(word.startswith(b"OMP_NUM_THREADS=") for word in given)


def end() -> None:
    """Sends TERM to this rank's torchrun, where it would start all ranks again. Called by one rank of each machine."""
    restarts = [int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    # A program that runs an agent inside itself is left alone.
    if restarts[0] < restarts[1] and _is_torchrun():
        os.kill(os.getppid(), signal.SIGTERM)


def end_if_cut_off() -> None:
    """KILL to this rank's torchrun where the host at which all of them meet no longer answers: it would ask it for minutes,
    and heed no other signal meanwhile. Called by one rank of each machine that has lost the others."""
    words = _of_parent("cmdline")
    pairs = dict(
        word.split(b"=", 1) if b"=" in word else (word, after) for word, after in zip(words, [*words[1:], b""])
    )
    endpoint = pairs.get(b"--rdzv-endpoint", pairs.get(b"--rdzv_endpoint", b"")).decode()
    host, _, port = endpoint.rpartition(":")
    if not _is_torchrun() or not port.isdigit() or port == "0":  # at node number 0 it is a port that torchrun has found
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError:
        print(f"ending torchrun, which would wait for {endpoint}", file=sys.stderr, flush=True)
        os.kill(os.getppid(), signal.SIGKILL)


def _may_be_agent(pid: int) -> bool:
    """Whether a process has torch loaded; process 1 and other adopters of orphans (SLURM's step, an init) have not."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return pid != 1  # that of another user cannot be read


def _is_torchrun() -> bool:
    """Whether the parent is one."""
    return any(os.path.basename(word) in PROGRAMS for word in _of_parent("cmdline")[:4])


def _of_parent(name: str) -> list[bytes]:
    """Words of /proc/PID/environ or cmdline of the torchrun above this process; none where there is none."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{os.getppid()}/{name}").read_bytes().split(b"\0")
    return []
