"""Small tensors between the ranks of one machine without gloo's queues and threads: a Unix socket for each pair of ranks.

A gloo collective of a few numbers takes most of a millisecond, and BatchNorm over the global batch has two a layer and
step; over these sockets it is a system call each way. Only for CPU tensors of at most LIMIT bytes a rank, where all ranks
are on one machine; everything else stays with the process group.

    wires = put_up(rank, world_size, timeout_seconds)  # None where they cannot be
    wires.gather(out, rows)  # out[r] = rank r's rows
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

# A message must fit into a socket's buffer (at least 200 KB on Linux) beside the one before it: then the rank that is least
# far never waits in a send, and nobody waits for ever.
LIMIT = 64 * 1024
SETUP_SECONDS = 20.0


def put_up(rank: int, world_size: int, timeout_seconds: float) -> Wires | None:
    """Connects this rank to all others; every rank of the process group calls it. None, on every rank, where they are not
    on one machine or where one of them cannot open sockets: the process group then does without."""
    with contextlib.ExitStack() as stack:
        listener, address = socket.socket(socket.AF_UNIX), None
        stack.enter_context(listener)
        with contextlib.suppress(OSError):  # a socket's path has at most 107 bytes, and TMPDIR may be long
            shortest = min(tempfile.gettempdir(), "/tmp", key=len)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="spknet-", dir=shortest))
            listener.settimeout(SETUP_SECONDS)
            listener.bind(f"{folder}/wire")
            listener.listen(world_size)
            address = f"{folder}/wire"
        places = _of_all((_machine(), address), world_size)
        if len({machine for machine, _ in places}) > 1 or not all(address for _, address in places):
            return None
        wires = Wires(rank, timeout_seconds)
        with contextlib.suppress(OSError):
            wires.connect([address for _, address in places], listener)
        if not all(_of_all(len(wires.peers) == world_size - 1, world_size)):
            wires.close()
            return None
        return wires


def _machine() -> tuple[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.is_file() else ""


def _of_all(value, world_size: int) -> list:
    every = [None] * world_size
    dist.all_gather_object(every, value)
    return every


class Wires:
    """Connections of this rank to all others."""

    def __init__(self, rank: int, timeout_seconds: float):
        self.rank, self.timeout = rank, timeout_seconds
        self.peers: dict[int, socket.socket] = {}

    def connect(self, addresses: list[str], listener: socket.socket) -> None:
        """To all lower ranks, which listen at their addresses; from all higher ones."""
        for lower in range(self.rank):
            peer = socket.socket(socket.AF_UNIX)
            peer.settimeout(SETUP_SECONDS)
            peer.connect(addresses[lower])
            peer.sendall(self.rank.to_bytes(4, "little"))
            self.peers[lower] = peer
        for _ in range(self.rank + 1, len(addresses)):
            peer, _ = listener.accept()
            peer.settimeout(SETUP_SECONDS)
            who = bytearray(4)
            _receive(peer, memoryview(who))
            self.peers[int.from_bytes(who, "little")] = peer
        for peer in self.peers.values():
            peer.settimeout(self.timeout)

    def gather(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        """out: (W, ...), rows: (...), both contiguous on the CPU. Raises RuntimeError where a rank is gone or silent."""
        out[self.rank] = rows
        mine = _bytes(out[self.rank])
        for other, peer in self.peers.items():
            with self._named(other):
                peer.sendall(mine)
        for other, peer in self.peers.items():
            with self._named(other):
                _receive(peer, _bytes(out[other]))

    @contextlib.contextmanager
    def _named(self, other: int) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise RuntimeError(f"rank {other} sent nothing for {self.timeout:g} s") from error
        except ConnectionError as error:
            raise RuntimeError(f"rank {other} is gone: Connection closed by peer") from error

    def close(self) -> None:
        """The others notice at once, even where forked processes (a loader's workers) hold copies of the sockets."""
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()


def _receive(peer: socket.socket, into: memoryview) -> None:
    got = 0
    while got < len(into):
        count = peer.recv_into(into[got:])
        if count == 0:
            raise ConnectionResetError
        got += count


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().view(torch.uint8).numpy()).cast("B")
