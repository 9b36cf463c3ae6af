"""Where the bytes of a source lie: a plain file, a member of a zip, or a member of an uncompressed tar. Nothing is extracted.

VoxCeleb comes as zips of a million members. zipfile holds about 600 bytes a member, in every process that opens it; so one
process finds the members (`locate`) and the others read by position, with one open file per archive.

Usage: where = locate(["vox2.zip::dev/aac/id1/a/0.m4a"], 1); data = read_source("vox2.zip::dev/aac/id1/a/0.m4a", where[0])
"""

from __future__ import annotations

import functools
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterable

import numpy as np

from shards.format import ShardError, read_bytes

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
UNSUPPORTED, MISSING, TAR, PLAIN = 252, 253, 254, 255  # beside zip's own methods
LOCATION = np.dtype(
    [
        ("offset", "<u8"),  # zip: of the local header; tar: of the data
        ("packed", "<u8"),  # bytes in the archive
        ("size", "<u8"),  # bytes of the file itself
        ("crc32", "<u4"),  # zip only
        ("method", "u1"),
    ]
)
SEPARATOR = "::"
LARGEST = 2 << 30  # bytes of a file or member; an hour of 16 kHz audio has 115 MB
# A member that inflates further, and beyond these bytes, is a bomb; speech inflates 1.2 times.
LARGEST_RATIO, HARMLESS = 100, 64 << 20


def split(source: str) -> tuple[str, str | None]:
    """`a.zip::b/c.wav` -> (`a.zip`, `b/c.wav`); a plain path -> (path, None)."""
    archive, separator, member = source.partition(SEPARATOR)
    if separator and archive.lower().endswith((".zip", ".tar")):
        return archive, member
    return source, None


def locate(sources: Iterable[str], n: int) -> np.ndarray:
    """(n,) LOCATION of n sources; `method` is MISSING where there is no such file or member."""
    where = np.zeros(n, LOCATION)
    by_archive = defaultdict(list)
    for i, source in enumerate(sources):
        archive, member = split(source)
        if member is None:
            where[i] = _plain(archive)
        else:
            by_archive[archive].append((i, member))
    for archive, wanted in by_archive.items():
        find = _tar_members if archive.lower().endswith(".tar") else _zip_members
        members = find(archive) if os.path.isfile(archive) else {}
        for i, member in wanted:
            where[i] = members.get(member, (0, 0, 0, 0, MISSING))
    return where


def _plain(path: str) -> tuple:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0, 0, MISSING)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise ShardError(f"{path} is {kind}; expected audio")
    return (0, status.st_size, status.st_size, 0, PLAIN)


def _zip_members(archive: str) -> dict[str, tuple]:
    members = {}
    try:
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                method = UNSUPPORTED if info.flag_bits & 1 else min(info.compress_type, UNSUPPORTED)
                members[info.filename] = (info.header_offset, info.compress_size, info.file_size, info.CRC, method)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, IndexError) as error:
        raise ShardError(
            f"{archive}: not a readable zip ({error}); download it again or join its pieces first"
        ) from None
    return members


def _tar_members(archive: str) -> dict[str, tuple]:
    members = {}
    try:
        with tarfile.open(archive, "r:") as file:
            for info in file:
                if info.isreg():
                    members[info.name] = (info.offset_data, info.size, info.size, 0, TAR)
                file.members = []
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ShardError(f"{archive}: not a readable uncompressed tar ({error}); decompress it first") from None
    return members


def read_source(source: str, where: np.void | None = None) -> bytes:
    """The bytes of a source, checked against the archive's own length and crc. Raises ShardError naming the source."""
    archive, member = split(source)
    if where is None:
        where = _located(source)
    if where["method"] == MISSING:
        raise ShardError(f"{source}: no such {'file' if member is None else 'member'}")
    _check_size(source, where)
    if member is None:
        try:
            return read_bytes(archive)
        except OSError as error:
            raise ShardError(f"{source}: not readable ({error.strerror})") from None
    offset, packed = int(where["offset"]), int(where["packed"])
    if where["method"] != TAR:
        header = _pread(archive, 30, offset)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ShardError(f"{source}: no zip member at byte {offset}; the archive has changed or is damaged")
        offset += 30 + sum(struct.unpack("<HH", header[26:30]))  # its name and its extra field
    data = _pread(archive, packed, offset)
    if len(data) != packed:
        raise ShardError(f"{source}: found {len(data)} bytes, expected {packed}; the archive is cut")
    return data if where["method"] == TAR else _unzip(source, data, where)


def _check_size(source: str, where: np.void) -> None:
    size, packed = int(where["size"]), int(where["packed"])
    if size > LARGEST:
        raise ShardError(f"{source}: {size} bytes, at most {LARGEST} are taken for a recording; cut it")
    if size > HARMLESS and size > LARGEST_RATIO * packed:
        raise ShardError(
            f"{source}: {packed} bytes would unpack to {size}, over {LARGEST_RATIO} times as many: no recording"
        )


def _unzip(source: str, data: bytes, where: np.void) -> bytes:
    size = int(where["size"])
    if where["method"] not in (STORED, DEFLATED):
        raise ShardError(f"{source}: encrypted or compressed by a method other than deflate; unpack that zip first")
    if where["method"] == DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, size + 1)
        except zlib.error as error:
            raise ShardError(f"{source}: damaged in its archive ({error})") from None
    if len(data) != size or zlib.crc32(data) != where["crc32"]:
        raise ShardError(f"{source}: damaged in its archive: length or crc32 differ from the zip's directory")
    return data


@functools.lru_cache(maxsize=4)
def _directory(archive: str, mtime_ns: int) -> dict[str, tuple]:
    return _tar_members(archive) if archive.lower().endswith(".tar") else _zip_members(archive)


def _located(source: str) -> np.void:
    archive, member = split(source)
    if member is None:
        return np.array(_plain(archive), LOCATION)[()]
    if not os.path.isfile(archive):
        raise ShardError(f"{source}: there is no archive {archive}")
    found = _directory(archive, os.stat(archive).st_mtime_ns).get(member, (0, 0, 0, 0, MISSING))
    return np.array(found, LOCATION)[()]


MAX_OPEN = 16  # archives of a process
_open_archives: OrderedDict[str, int] = OrderedDict()
_lock = threading.Lock()


def _pread(archive: str, nbytes: int, offset: int) -> bytes:
    # pread leaves the position alone, so a forked child may go on with its parent's descriptors.
    with _lock:
        if archive not in _open_archives:
            if len(_open_archives) >= MAX_OPEN:
                os.close(_open_archives.popitem(last=False)[1])
            _open_archives[archive] = os.open(archive, os.O_RDONLY | os.O_CLOEXEC)
        _open_archives.move_to_end(archive)
        return os.pread(_open_archives[archive], nbytes, offset)
