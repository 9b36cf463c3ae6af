"""The open tars of a process: at most 256, checked at their first touch, read from the node's cache where a copy is whole.

Usage: with tars.lock() as opened: data = os.pread(opened(shard), nbytes, offset)
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from shards import index
from shards.cache import Cache
from shards.format import BLOCK, ShardError, identity_block, open_regular

MAX_OPEN = 256  # files of a process
RECHECK_SECONDS = 10.0  # between two looks whether a cached copy has come to be


class Tars:
    """The open tars of a process: at most MAX_OPEN, the least recently used closed first."""

    def __init__(self, indexes: list[index.Index], cache: Cache | None):
        self._indexes = indexes
        self._first_shard = np.cumsum([0] + [len(i.tars) for i in indexes])
        self._cache = cache
        self._fds: OrderedDict[int, int] = OrderedDict()
        self._at_source: set[int] = set()
        self._looked = 0.0
        self._pid, self._lock = os.getpid(), threading.Lock()

    def path(self, shard: int) -> Path:
        return self._source(shard)[0]

    def _source(self, shard: int) -> tuple[Path, dict]:
        where, shard = self._place(shard)
        entry = self._indexes[where].entry(shard)
        return self._indexes[where].folder / entry["url"], entry

    def _place(self, shard: int) -> tuple[int, int]:
        where = int(np.searchsorted(self._first_shard, shard, "right")) - 1
        return where, shard - int(self._first_shard[where])

    @contextlib.contextmanager
    def lock(self) -> Iterator[Callable[[int], int]]:
        """A context in which open tars stay open; its value opens a tar: shard -> file descriptor."""
        if self._pid != os.getpid():
            # The parent's lock may be held for ever in a forked child; its descriptors are the child's own copies.
            self._pid, self._lock = os.getpid(), threading.Lock()
            self._close_all()
        with self._lock:
            self.look_for_copies()
            yield self.fd

    def _close_all(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._at_source.clear()

    def __del__(self):
        if self._pid == os.getpid():
            self._close_all()

    def fd(self, shard: int) -> int:
        fd = self._fds.get(shard)
        if fd is not None:
            self._fds.move_to_end(shard)
            return fd
        while len(self._fds) >= MAX_OPEN:
            os.close(self._fds.popitem(last=False)[1])
        path, entry = self._source(shard)
        if self._cache is not None:
            chosen = self._cache.tar(path, entry)
            (self._at_source.add if chosen == path else self._at_source.discard)(shard)
            path = chosen
        where, number = self._place(shard)
        fd = self._fds[shard] = _open_tar(path, entry, self._indexes[where].identity(number))
        return fd

    def look_for_copies(self) -> None:
        """Drops the descriptors of sources whose copy has come to be, at most every RECHECK_SECONDS."""
        if not self._at_source or time.monotonic() < self._looked + RECHECK_SECONDS:
            return
        self._looked = time.monotonic()
        for shard in list(self._at_source):
            path, entry = self._source(shard)
            if self._cache.tar(path, entry) != path:
                self._at_source.discard(shard)
                if shard in self._fds:
                    os.close(self._fds.pop(shard))


def _open_tar(path: Path, entry: dict, identity: str | None) -> int:
    """Opens a tar whose size, first header and identity (None: of an older pack, not known) are those of the index."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise ShardError(
            f"{path} is missing; index.json lists it with {entry['filesize']} bytes; copy or pack it again"
        ) from None
    except OSError as error:
        raise ShardError(f"{path} is not readable ({error.strerror}); correct that, or copy it again") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["filesize"]:
            raise ShardError(
                f"{path}: found {size} bytes, index.json says {entry['filesize']}: cut, swapped, or the index is stale; "
                "copy or pack it again"
            )
        if zlib.crc32(os.pread(file.fileno(), BLOCK, 0)) != entry["head_crc32"]:
            raise ShardError(
                f"{path}: its first header is not the one in index.json: damaged, or another tar of the same size; copy or pack it again"
            )
        if identity and os.pread(file.fileno(), BLOCK, size - BLOCK) != identity_block(identity):
            raise ShardError(
                f"{path}: its last block is not that of the tar in index.json: a tar or an index of another data set or of an "
                "earlier pack; copy both from the same place, or pack it again"
            )
        return os.dup(file.fileno())
