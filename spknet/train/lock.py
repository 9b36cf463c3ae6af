"""Who owns a run folder: RUN/lock, a small file that names one process, whose time stamp it renews every 10 s.

    {"token", "host", "machine", "pid", "start", "job", "restarts", "step", "group"}

A newcomer decides and writes while it holds the kernel's lock (flock) on that file, so of two only one takes it; the new file
is renamed into place, so no hard links are needed. Where the file system has no flock, the newcomer looks once more a second later.
An owner on this machine is dead when its process is; one of the same SLURM job is (SLURM has started the job anew); any other
is dead when its time stamp stands still for 35 s of the newcomer's own clock. Clocks of two machines are never compared.

An owner that stood still for so long (suspended, a stalled file server) may have lost its folder. It asks before it writes:

    with hold(run_dir) as owner: owner.check(); ...write...
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shards.format import write_file
from spknet.errors import UserError
from spknet.messages import warn
from spknet.parallel.process import machine, started

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 35.0  # an owner elsewhere whose lock is not renewed for so long counts as dead
GUARD_SECONDS = 10.0  # deciding takes milliseconds; a newcomer that was suspended meanwhile is waited for so long
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # from file systems without it
FILES, FOLDERS = ("config.yaml", "record.json", "state.json", "metrics.jsonl"), ("checkpoints", "tensorboard", "eval")
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


class RunError(UserError):
    """The run folder cannot be used; the message says why and what to do."""


class Owner:
    """The right to write into a run folder, for as long as RUN/lock holds this token."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.lock = run_dir, run_dir / "lock"
        self.token = secrets.token_hex(8)
        self._file: int | None = None
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def check(self) -> None:
        """Raises RunError where another run has taken the folder, or the lock is gone: call it before each write."""
        holder = _parse(_content(self.lock))
        if holder is None:
            raise RunError(
                f"{self.lock} has been removed while this run held it; it stops here and writes nothing more"
            )
        if holder.get("token") != self.token:
            raise RunError(
                f"{self.run_dir} was taken over by {_name(holder)} while this run stood still; it stops here and writes"
                " nothing more"
            )

    def take(self, say: Callable[[str], None]) -> None:
        """Waits until the folder is free. Raises RunError where its owner lives."""
        seen, since = None, 0.0  # the owner's sign of life, and when it was first seen (our clock)
        while True:
            with _guarded(self.lock, create=True) as (file, exact):
                content, sign = _read(file)
                holder = _parse(content)
                free = _is_free(holder) or (sign == seen and time.monotonic() - since >= STALE_SECONDS)
                if free:
                    self._write(empty=not content)
                    break
            if _lives_here(holder) or (seen is not None and sign != seen):
                raise RunError(
                    f"{self.run_dir} belongs to {_name(holder)}; wait for it or stop it, or give another --run_dir"
                )
            if seen is None:
                seen, since = sign, time.monotonic()
                say(f"{self.lock} names {_name(holder)}; waiting {STALE_SECONDS:.0f} s for a sign of life of it")
            time.sleep(min(0.5, STALE_SECONDS / 10))
        if not exact:
            time.sleep(1)
            self.check()
        self._heart.start()

    def _write(self, empty: bool) -> None:
        try:
            write_file(self.lock, json.dumps({"token": self.token, **_here()}) + "\n")
        except OSError:
            if empty:
                self.lock.unlink()
            raise
        self._file = os.open(self.lock, os.O_RDONLY)

    def _beat(self) -> None:
        # Of the file that this owner wrote, whatever stands under its name now.
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # replaced on another client of a network file system
                os.utime(self._file)

    def leave(self) -> None:
        """Gives the folder back, where it is still this owner's."""
        self._stopped.set()
        self._heart.join()
        with contextlib.suppress(FileNotFoundError, RunError), _guarded(self.lock, create=False) as (file, _):
            if (_parse(_read(file)[0]) or {}).get("token") == self.token:
                self.lock.unlink()
        os.close(self._file)


@contextlib.contextmanager
def hold(run_dir: str | Path, say: Callable[[str], None] = warn) -> Iterator[Owner]:
    """Owns RUN, which is made where it is missing and removed again where nothing has been written into it.

    say: called with a line where the owner of a lock has to be waited for. Raises RunError naming the owner.
    """
    folder = Path(run_dir).absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(f"--run_dir {run_dir}: a file stands where a folder is expected; give another path") from error
    owner = Owner(Path(run_dir))
    try:
        _check_kinds(folder)
        owner.take(say)
        try:
            yield owner
        finally:
            owner.leave()
    finally:
        with contextlib.suppress(OSError):  # not empty: something was written
            for path in made:
                path.rmdir()


def _check_kinds(folder: Path) -> None:
    """What stands in a run's places must be of their kind: a pipe would block for ever, a device would swallow what is written."""
    for names, is_kind, expected in ((FILES, stat.S_ISREG, "a file"), (FOLDERS, stat.S_ISDIR, "a folder")):
        for path in (folder / name for name in names if os.path.lexists(folder / name)):
            kind = path.stat().st_mode if path.exists() else os.lstat(path).st_mode
            if not is_kind(kind):
                found = "a file" if stat.S_ISREG(kind) else KINDS.get(stat.S_IFMT(kind), "a device")
                raise RunError(f"{path} is {found}, where {expected} is expected; remove it")


@contextlib.contextmanager
def may_write(run_dir: str | Path, token: str | None = None) -> Iterator[tuple[bool, str | None]]:
    """(whether this process may write RUN/state.json now, token of the lock): nobody does while another run holds it.

    token: of the run that this process is a rank of. None: a launcher, or the owner itself; it may where there is no lock,
    where the owner is dead, or belongs to the same process, process group or SLURM job.
    """
    try:
        with _guarded(Path(run_dir) / "lock", create=False) as (file, _):
            holder = _parse(_read(file)[0]) or {}
            theirs = holder.get("token")
            if token is not None:
                yield theirs == token, theirs
            else:
                yield not holder or _is_free(holder) or _is_ours(holder), theirs
    except (FileNotFoundError, RunError):
        yield token is None, None


@contextlib.contextmanager
def _guarded(lock: Path, create: bool) -> Iterator[tuple[int, bool]]:
    """(the open lock file, whether the kernel's lock on it is held). Raises RunError where it is no file."""
    deadline = time.monotonic() + GUARD_SECONDS
    while True:
        file = _open(lock, os.O_RDWR | (os.O_CREAT if create else 0))
        try:
            exact = _flock(file, lock, deadline)
            if _same_file(file, lock):
                yield file, exact
                return
        finally:
            os.close(file)


def _flock(file: int, lock: Path, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RunError(
                    f"another process has {lock} open and does not go on; look for it, or start again"
                ) from None
            time.sleep(0.02)
        except OSError as error:
            if error.errno in NO_FLOCK:
                return False
            raise


def _same_file(file: int, lock: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.lstat(lock))
    return False


def _open(lock: Path, flags: int) -> int:
    with contextlib.suppress(FileNotFoundError):
        kind = stat.S_IFMT(os.lstat(lock).st_mode)
        if kind != stat.S_IFREG:
            raise RunError(f"{lock} is {KINDS.get(kind, 'a device')}, where a file is expected; remove it")
    return os.open(lock, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _read(file: int) -> tuple[bytes, tuple]:
    """Content of a lock and what changes with each sign of life."""
    about, content = os.fstat(file), os.pread(file, 1 << 16, 0)
    return content, (about.st_ino, about.st_mtime_ns, content)


def _content(lock: Path) -> bytes:
    try:
        file = _open(lock, os.O_RDONLY)
    except (FileNotFoundError, RunError):
        return b""
    try:
        return _read(file)[0]
    finally:
        os.close(file)


def _parse(content: bytes) -> dict[str, Any] | None:
    """The owner; None for an empty file (its maker died before it wrote); {} for anything unreadable."""
    if not content.strip():
        return None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content)
        if isinstance(value, dict):
            return value
    return {}


def _here() -> dict[str, Any]:
    place = os.environ
    return {
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "start": started(os.getpid()),
        "job": place.get("SLURM_JOB_ID"),
        "restarts": place.get("SLURM_RESTART_COUNT"),
        "step": place.get("SLURM_STEP_ID"),
        "group": _group(place.get("MASTER_ADDR"), place.get("MASTER_PORT")),
    }


def _group(address: str | None, port: str | None) -> str | None:
    """Where the ranks of this run meet: what its processes on all machines have in common."""
    if not address or not port:
        return None
    if address == "localhost" or address.startswith("127."):  # every machine has such an address
        address = socket.gethostname()
    return f"{address}:{port}"


def _is_free(holder: dict[str, Any] | None) -> bool:
    """Whether the owner is known to be dead, without waiting."""
    if holder is None:
        return True
    me = _here()
    if _is_here(holder, me):
        return started(holder["pid"]) != holder.get("start")
    if holder.get("job") is None or holder["job"] != me["job"]:
        return False
    # The job was requeued, or torchrun has started its step anew; another step of one allocation may well live.
    return holder.get("restarts") != me["restarts"] or holder.get("step") == me["step"]


def _lives_here(holder: dict[str, Any]) -> bool:
    return _is_here(holder, _here()) and not _is_free(holder)


def _is_here(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether /proc of this machine knows the owner. (Locks of earlier versions lack `machine`.)"""
    known = holder.get("host") == me["host"] and holder.get("machine", me["machine"]) == me["machine"]
    return known and isinstance(holder.get("pid"), int) and isinstance(holder.get("start"), str)


def _is_ours(holder: dict[str, Any]) -> bool:
    me = _here()
    return any(me[name] is not None and holder.get(name) == me[name] for name in ("group", "job")) or (
        _is_here(holder, me) and holder["pid"] == me["pid"]
    )


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "an owner that it does not name"
    return f"a run on {holder.get('host')} (pid {holder.get('pid')}, job {holder.get('job')})"
