"""A node-local copy of what lies on a shared file system: whole tars and the index, under names made from their content.

    CACHE/<16 hex of sha256>-train-000000.tar     a tar, sha256 checked while it was copied; renamed into place when it is whole
    CACHE/<16 hex of sha256>-train-000000.tar.ok     size, times and inode of the copy when it was checked
    CACHE/<16 hex of sha256>-train-000000.tar.part   one that a process is copying, or left when it was killed; never read
    CACHE/index-<16 hex>/                         the index files, and their .ok

One process of a node copies a tar (flock on the .part file); the others read the source meanwhile. A copy that somebody
wrote to since differs from its .ok, is checked again, and is copied again where it is damaged. A name made from
content is never stale, so several data sets and several runs share a cache. What does not fit under the size limit stays
at its source; nothing is evicted, since training touches all tars equally often.

Usage: cache = Cache("/local/scratch/spknet", limit_gib=500); path = cache.tar(Path("data/shards/vox2"), entry)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import stat
import tempfile
import threading
import warnings
from pathlib import Path

from shards import format
from shards.commands import command
from shards.format import ShardError

NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "glusterfs", "afs", "fuse.", "9p", "pvfs")
NETWORK += ("wekafs",)
PIECE = 1 << 23  # bytes copied at a time


class Cache:
    """The tars of one node. limit_gib 0: no limit. copy: start copying what is asked for, in a thread of this process."""

    def __init__(self, folder: str | Path, limit_gib: float = 0.0, copy: bool = True):
        self.folder, self.limit = Path(folder), int(limit_gib * 2**30)
        make_folder(self.folder)
        self._copies = copy
        self._queue: queue.SimpleQueue | None = None
        self._asked: set[str] = set()
        self._pid = os.getpid()

    def __getstate__(self):
        return {"folder": self.folder, "limit": self.limit, "copy": self._copies}

    def __setstate__(self, state):
        self.__init__(state["folder"], state["limit"] / 2**30, state["copy"])

    def path(self, entry: dict) -> Path:
        """Where the copy of a tar lies or will lie. entry: its element of index.json's shardlist."""
        return self.folder / f"{entry['sha256'][:16]}-{entry['url']}"

    def tar(self, source: Path, entry: dict) -> Path:
        """The path to read a tar from: the copy where it is whole, else the source (and the copy is asked for)."""
        path = self.path(entry)
        if _is_checked(path, entry["filesize"]):
            return path
        if self._copies:
            self._ask(source, entry)
        return source

    def _ask(self, source: Path, entry: dict) -> None:
        if self._pid != os.getpid():  # threads do not survive a fork
            self._queue, self._asked, self._pid = None, set(), os.getpid()
        if entry["url"] + entry["sha256"] in self._asked:
            return
        self._asked.add(entry["url"] + entry["sha256"])
        if self._queue is None:
            self._queue = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(self._queue,), daemon=True).start()
        self._queue.put((source, entry))

    def _work(self, jobs: queue.SimpleQueue) -> None:
        while True:
            source, entry = jobs.get()
            try:
                self.copy(source, entry)
            except (ShardError, OSError) as error:
                # The source is still there to be read, and says itself what is wrong with it.
                warnings.warn(f"{source} is not copied to {self.folder}: {error}", stacklevel=1)

    def copy(self, source: Path, entry: dict, progress=None, block: bool = False) -> bool:
        """Copies a tar; True when a whole copy is there. False: another process is at it (unless block), or no room is left.

        Raises ShardError where the source's size or sha256 is not that of the index.
        """
        path = self.path(entry)
        if _is_checked(path, entry["filesize"]):
            return True
        part = path.with_name(path.name + ".part")
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            if _is_checked(path, entry["filesize"]):
                if _same_file(fd, part):  # made anew after the copy had been renamed
                    part.unlink()
                return True
            if not _same_file(fd, part):  # whoever held the lock has renamed or removed it
                return self.copy(source, entry, progress, block)
            if _is_whole(path, entry):  # of an older cache, or touched
                part.unlink(missing_ok=True)
                _mark_checked(path)
                return True
            path.unlink(missing_ok=True)
            if not self._reserve(fd, entry["filesize"]):
                part.unlink(missing_ok=True)
                return False
            _copy_checked(source, entry, fd, progress)
            os.replace(part, path)
            _mark_checked(path)
            return True
        finally:
            os.close(fd)

    def _reserve(self, fd: int, size: int) -> bool:
        # Under one lock for the node, so that two copiers do not both take the last room.
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.ftruncate(fd, 0)
            if self.limit and self.used() + size > self.limit:
                return False
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError:
                os.ftruncate(fd, 0)
                return False
            return True

    def used(self) -> int:
        """Bytes that the cache holds or has reserved."""
        total = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                    total += os.stat(os.path.join(folder, name)).st_size
        return total


def make_folder(folder: Path) -> None:
    """Makes the folder of a cache. Raises ShardError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardError(f"cache folder {folder}: {error.strerror}; give another one (--data.cache_dir)") from None


def _copy_checked(source: Path, entry: dict, fd: int, progress) -> None:
    digest, position = hashlib.sha256(), 0
    try:
        opened = format.open_regular(source)
    except FileNotFoundError:
        raise ShardError(f"{source} is missing; copy or pack it again") from None
    with opened as file:
        while piece := file.read(PIECE):
            if position + len(piece) > entry["filesize"]:
                break
            digest.update(piece)
            os.pwrite(fd, piece, position)
            position += len(piece)
            if progress:
                progress(len(piece))
    if piece or position != entry["filesize"] or digest.hexdigest() != entry["sha256"]:
        os.ftruncate(fd, 0)
        raise ShardError(
            f"{source}: its size or sha256 is not the one in index.json: damaged; `{command('check')}` says what is affected"
        )
    os.fsync(fd)


def _stamp(path: Path) -> str:
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def _is_checked(path: Path, size: int) -> bool:
    """Whether a copy is the one that was checked, and nobody wrote to it since."""
    try:
        ok = format.read_bytes(path.with_name(path.name + ".ok"))
        return path.stat().st_size == size and ok.decode("ascii", "replace") == _stamp(path)
    except (FileNotFoundError, ShardError):
        return False


def _mark_checked(path: Path) -> None:
    format.write_file(path.with_name(path.name + ".ok"), _stamp(path))


def _is_whole(path: Path, entry: dict) -> bool:
    """Whether a copy has the content that it should have: by reading it."""
    try:
        return path.stat().st_size == entry["filesize"] and format.sha256_file(path) == entry["sha256"]
    except (FileNotFoundError, ShardError):
        return False


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def is_network(path: Path, mounts: str | Path = "/proc/mounts") -> bool:
    """Whether a path lies on a network file system; mounts: the list of mounted ones, as in fstab."""
    try:
        lines = Path(mounts).read_text().splitlines()
    except FileNotFoundError:
        return False
    best, kind = "", ""
    real = str(path.resolve())
    for line in lines:
        mount, found = line.split()[1:3]
        below = real == mount or real.startswith(mount.rstrip("/") + "/")
        if below and len(mount) >= len(best):
            best, kind = mount, found
    return kind.startswith(NETWORK)


def local_index(folder: Path, meta: dict, cache_dir: str | Path | None) -> Path:
    """The folder to map index files from: a map of a file that is replaced on a network file system kills the process.

    So they are copied to cache_dir, or without one, where `folder` is on a network file system, to the temporary folder.
    """
    if cache_dir is None and not is_network(folder):
        return folder
    base = Path(cache_dir) if cache_dir is not None else _private(Path(tempfile.gettempdir()) / f"spknet-{os.getuid()}")
    local = base / f"index-{meta['checksum'][:16]}"
    make_folder(local)
    with open(base / f".{local.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, entry in meta["files"].items():
            copy = local / name
            # The small ones are read as a whole when they are opened; they may as well be checked here.
            if not _is_whole(copy, entry) if entry["filesize"] < PIECE else not _is_checked(copy, entry["filesize"]):
                if not _is_whole(copy, entry):
                    _copy_index_file(folder / name, copy, entry)
                _mark_checked(copy)
    return local


def _private(folder: Path) -> Path:
    """A folder in the temporary one that nobody else can write to: what lies there is believed."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ShardError(
            f"{folder} is not a folder of this user that others cannot write to; remove it, or give a folder with --data.cache_dir"
        )
    return folder


def _copy_index_file(source: Path, target: Path, entry: dict) -> None:
    digest = hashlib.sha256()
    try:
        with format.open_regular(source) as file, format.atomic_write(target) as copy:
            while piece := file.read(PIECE):
                digest.update(piece)
                copy.write(piece)
            if digest.hexdigest() != entry["sha256"]:
                raise ShardError(f"{source}: its sha256 is not the one in index.json: damaged; {format.REMAKE}")
    except FileNotFoundError:
        raise ShardError(f"{source} is missing; {format.REMAKE}") from None
