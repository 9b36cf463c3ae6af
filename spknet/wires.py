"""Small tensors between the ranks of one machine without gloo's queues and threads: a Unix socket for each pair of ranks.

A gloo collective of a few numbers takes most of a millisecond, and BatchNorm over the global batch has two a layer and
step; over these sockets it is a system call each way. Only for CPU tensors of at most LIMIT bytes a rank, where all ranks
are on one machine; everything else stays with the process group.

    wires = Wires(store, rank, world_size, timeout_seconds)
    wires.gather(out, rows)  # out[r] = rank r's rows
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator

import torch
import torch.distributed as dist

# A message must fit into a socket's buffer (at least 200 KB on Linux) beside the one before it: then the rank that is least
# far never waits in a send, and nobody waits for ever.
LIMIT = 64 * 1024


class Wires:
    """Connections of this rank to all others; every rank of the process group must make one, at the same place."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float):
        self.rank, self.timeout = rank, timeout_seconds
        if rank == 0:  # a socket's path has at most 107 bytes, and TMPDIR may be long
            folder = tempfile.mkdtemp(prefix="spknet-", dir=min(tempfile.gettempdir(), "/tmp", key=len))
            store.set("wires", folder)
        folder = store.get("wires").decode()
        self.peers: dict[int, socket.socket] = {}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(timeout_seconds)
            listener.bind(f"{folder}/{rank}")
            listener.listen(world_size)
            store.set(f"wires/{rank}", "listens")
            for lower in range(rank):
                store.get(f"wires/{lower}")
                self.peers[lower] = socket.socket(socket.AF_UNIX)
                self.peers[lower].connect(f"{folder}/{lower}")
                self.peers[lower].sendall(rank.to_bytes(4, "little"))
            for _ in range(rank + 1, world_size):
                peer, _ = listener.accept()
                self.peers[int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "little")] = peer
        for peer in self.peers.values():
            peer.settimeout(timeout_seconds)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder)

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
        for peer in self.peers.values():
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
