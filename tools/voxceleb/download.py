"""Fetches files over http(s) or from file: URLs: in parallel, from where a killed run stopped, each with its md5 checked.

    DIR/NAME.partial   what has come so far; a run goes on at its end (HTTP range), or anew where the server knows no ranges
    DIR/NAME           appears when the md5 agrees (rename)
    DIR/NAME.md5       the receipt, as `md5sum` writes it: a file that is older than its receipt is not read again

Who asks, where, and what a server may answer: access.py.

    fetch_all({"a.zip": MD5}, Path("data"), Access("https://host/folder", user="me", password=secret))
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import shutil
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from shards.format import write_file
from tools.voxceleb.access import Access, DownloadError, Interrupted, open_file

PIECE = 1 << 20  # bytes
LONGEST_PAUSE = 60.0  # seconds
RESERVE = 1 << 30  # bytes that a body of unknown length leaves free on the disk


class _Retries:
    """Counts tries in a row that brought nothing, and waits longer and longer between them, unless `stop` is set."""

    def __init__(self, access: Access, name: str, stop: threading.Event):
        self.access, self.name, self.stop, self.failures = access, name, stop, 0

    def after(self, error: Interrupted, progressed: bool) -> None:
        self.failures = 1 if progressed else self.failures + 1
        if self.failures > self.access.retries:
            raise DownloadError(
                f"{self.access.shown(self.name)}: gave up after {self.failures} tries without a new byte, the last: {error.args[0]}; "
                "what has come is kept: run the same command again"
            )
        asked = error.args[1] if len(error.args) > 1 else 0.0
        pause = min(LONGEST_PAUSE, max(asked, self.access.first_pause * 2.0 ** (self.failures - 1)))
        if pause >= 1:
            tqdm.write(f"{self.name}: {error.args[0]}; next try in {pause:.0f} s", file=sys.stderr)
        self.stop.wait(pause)


def _size(access: Access, name: str, stop: threading.Event) -> int | None:
    """Bytes of a file as the server tells them. It is also the first to hear that a key is refused."""
    tries = _Retries(replace(access, retries=min(3, access.retries)), name, stop)  # a wrong host shows soon
    while not stop.is_set():
        try:
            stream, _, total = open_file(access, name, 0, 0)
            stream.close()
            return total
        except Interrupted as error:
            tries.after(error, False)
    return None


class _Partial:
    """NAME.partial, open for one process at a time, and the md5 of what it holds."""

    def __init__(self, path: Path, bar: tqdm):
        self.path, self.bar = path, bar
        self.file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise DownloadError(f"{path} is being written by another download: wait for it or stop it") from None
        self.digest, self.size = hashlib.md5(), 0
        self.file.seek(0)
        while piece := self.file.read(PIECE):
            self._count(piece)
        self.best = self.size

    def _count(self, piece: bytes) -> None:
        self.digest.update(piece)
        self.size += len(piece)
        self.bar.update(len(piece))

    def append(self, piece: bytes) -> None:
        self.file.write(piece)
        self._count(piece)

    def clear(self) -> None:
        self.file.truncate(0)
        self.bar.update(-self.size)
        self.digest, self.size = hashlib.md5(), 0

    def progressed(self) -> bool:
        """Whether it is longer than ever before: a server without ranges begins anew each time, and may never end."""
        before, self.best = self.best, max(self.best, self.size)
        return self.size > before

    def close(self) -> None:
        self.file.close()

    def finish(self, md5: str) -> bool:
        """Gives the file its name, and a receipt, if the md5 agrees."""
        if self.digest.hexdigest() != md5:
            return False
        self.file.flush()
        os.fsync(self.file.fileno())
        final = self.path.with_name(self.path.name.removesuffix(".partial"))
        os.replace(self.path, final)
        write_receipt(final, md5)
        return True


def _receive(access: Access, name: str, partial: _Partial, stop: threading.Event) -> None:
    """One connection: appends what comes. Raises Interrupted where it ends too early."""
    stream, first, total = open_file(access, name, partial.size)
    if stream is None and total == partial.size:
        return
    if stream is None or first not in (0, partial.size):
        if stream is not None:
            stream.close()
        partial.clear()
        raise Interrupted("the server has another file than before")
    with stream:
        if first == 0:
            partial.clear()
        while not stop.is_set():
            try:
                piece = stream.read1(PIECE)
            except (OSError, http.client.HTTPException) as error:
                raise Interrupted(access.clean(error) or type(error).__name__) from None
            if not piece:
                break
            partial.append(piece)
            _check_end(access, name, partial, total)
    if total is not None and partial.size < total and not stop.is_set():
        raise Interrupted(f"the connection ended at byte {partial.size} of {total}")


def _check_end(access: Access, name: str, partial: _Partial, total: int | None) -> None:
    """Raises DownloadError where more comes than was told, or more than can be; nothing of it is kept."""
    limit = access.largest if total is None else total
    # Every piece is looked at while the length is unknown: a body without an end fills any disk.
    full = total is None and shutil.disk_usage(partial.path.parent).free < RESERVE
    if partial.size > limit or full:
        size = partial.size
        partial.clear()
        what = f"{limit} were expected" if not full else "the disk is nearly full and the server tells no length"
        raise DownloadError(f"{access.shown(name)}: {size} bytes came, {what}; nothing of it was kept")


def _fetch(access: Access, name: str, md5: str, folder: Path, bar: tqdm, stop: threading.Event) -> None:
    """One file, whatever the connection does, twice if its md5 is wrong."""
    with contextlib.closing(_Partial(folder / f"{name}.partial", bar)) as partial:
        for _ in range(2):
            tries = _Retries(access, name, stop)
            while not stop.is_set():
                try:
                    _receive(access, name, partial, stop)
                    break
                except Interrupted as error:
                    tries.after(error, partial.progressed())
            if stop.is_set() or partial.finish(md5):
                return
            found, size = partial.digest.hexdigest(), partial.size
            partial.clear()
        os.unlink(partial.path)
    raise DownloadError(
        f"{access.shown(name)}: md5 {found} of {size} bytes, expected {md5}, twice: "
        "the host has another version, or what comes is damaged; nothing of it was kept"
    )


def fetch_all(files: dict[str, str], folder: Path, access: Access, *, parallel: int = 4) -> None:
    """Every NAME of {NAME: md5} into folder, unless it is there. Raises DownloadError; what has come is then kept.

    Sizes are asked for first: a refused key, a missing file and a full disk show before anything is fetched.
    """
    access.check()
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: md5 for name, md5 in files.items() if not is_verified(folder / name, md5)}
    if not missing:
        return
    stop = threading.Event()
    with ThreadPoolExecutor(parallel) as pool:
        try:
            sizes = _all([pool.submit(_size, access, name, stop) for name in missing])
            _check_space(folder, dict(zip(missing, sizes)))
            total = None if None in sizes else sum(sizes)
            with tqdm(total=total, desc="download", unit="B", unit_scale=True, unit_divisor=1024) as bar:
                _all([pool.submit(_fetch, access, name, missing[name], folder, bar, stop) for name in missing])
        finally:
            stop.set()


def _all(futures: list) -> list:
    done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
    for future in waiting if any(future.exception() for future in done) else ():
        future.cancel()
    for future in done:
        future.result()
    return [future.result() for future in futures]


def _check_space(folder: Path, sizes: dict[str, int | None]) -> None:
    have = sum(path.stat().st_size for name in sizes if (path := folder / f"{name}.partial").exists())
    need, free = sum(size or 0 for size in sizes.values()) - have, shutil.disk_usage(folder).free
    if need > free:
        raise DownloadError(
            f"{folder}: {need / 1e9:.2f} GB are still to come, {free / 1e9:.2f} GB are free: make room or choose another --save_path"
        )


def receipt(path: Path) -> Path:
    return path.with_name(path.name + ".md5")


def write_receipt(path: Path, md5: str) -> None:
    write_file(receipt(path), f"{md5}  {path.name}\n")


def is_verified(path: Path, md5: str) -> bool:
    """Whether path is there with this md5: by its receipt, or by reading it. Raises DownloadError where it has another md5."""
    if not path.exists():
        return False
    with contextlib.suppress(FileNotFoundError):
        paper = receipt(path)
        if paper.stat().st_mtime_ns >= path.stat().st_mtime_ns and paper.read_text().split() == [md5, path.name]:
            return True
    found = md5_of(path)
    if found != md5:
        raise DownloadError(
            f"{path}: md5 {found}, expected {md5}: it is damaged or another version; move it away and run this again"
        )
    write_receipt(path, md5)
    return True


def md5_of(path: Path) -> str:
    """Hex md5 of a file, with a bar."""
    digest = hashlib.md5()
    with (
        open(path, "rb", buffering=0) as file,
        tqdm(total=path.stat().st_size, desc=f"md5 of {path.name}", unit="B", unit_scale=True, delay=2) as bar,
    ):
        while piece := file.read(4 * PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()
