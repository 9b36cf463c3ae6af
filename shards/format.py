"""The bytes of a packed data set: what a tar member, an index row and a key look like. FORMAT.md says the same in words.

    OUT/train-000000.tar   per utterance: 512-byte USTAR header, KEY.spk (the speaker as text, padded to 512),
                           512-byte USTAR header, KEY.wav (44-byte RIFF header + PCM) or KEY.flac, padded to 512
    OUT/index/*.npy        one 32-byte ROW per utterance in the order of the keys, and what goes with the rows
    OUT/parts/*.npz        commit records of the packer;  OUT/SHA256SUMS  for `sha256sum -c`

Usage: with atomic_write(path) as file: file.write(tar_header("id1/a/0.spk", 3))
"""

from __future__ import annotations

import ast
import binascii
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import stat
import struct
import tempfile
from pathlib import Path

import numpy as np

from shards.commands import command
from shards.errors import UserError

VERSION = 1
CODECS = ("wav", "flac")
BLOCK = 512  # tar block, bytes
WAV_HEADER = 44  # bytes before the first PCM byte of a canonical RIFF file
TAR_END = bytes(2 * BLOCK)
IDENTITY = b"spknet-shards identity\n"  # first line of a tar's last block, behind TAR_END, where no reader looks
MAX_KEY = 95  # KEY.flac then fits the 100 bytes of a USTAR name, and no prefix field is needed
MAX_SAMPLES = (2**32 - 1 - WAV_HEADER) // 2

# key_check and row_check make a damaged row or key show itself even where only a crop is read, which no checksum covers.
ROW = np.dtype(
    [
        ("offset", "<u8"),  # of the first PCM byte (wav) or of the first byte of the file (flac) in its tar
        ("nbytes", "<u4"),  # of PCM, or of the flac file
        ("samples", "<u4"),
        ("shard", "<u4"),  # position in index.json's shardlist
        ("speaker", "<u4"),  # position in speakers.npy
        ("crc32", "<u4"),  # of the nbytes bytes
        ("key_check", "<u2"),  # CRC-16 of the key
        ("row_check", "<u2"),  # CRC-16 of the 30 bytes before
    ]
)
# What index.json says of each tar, for a program that opens a data set of 25,000 tars in milliseconds.
TAR = np.dtype(
    [("filesize", "<u8"), ("nsamples", "<u4"), ("head_crc32", "<u4"), ("generation", "<u4"), ("sha256", "V32")]
)
CHECKED = ROW.itemsize - 2
MAX_NPY_HEADER = 4096
REMAKE = f"make the index again with `{command('pack')} --out OUT --merge`"
DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


class ShardError(UserError):
    """Something about a data set is not as it must be: the message says what was found, what was expected, what to do."""


def crc16(data: bytes) -> int:
    """CRC-16/XMODEM (polynomial 0x1021, start 0): finds every flip of one or two bits in a row or a key."""
    return binascii.crc_hqx(data, 0)


@functools.cache
def _crc16_table() -> np.ndarray:
    # The CRC is linear: that of a row is the XOR of those of its bytes, each alone in a row of zeros.
    table = np.empty((CHECKED, 256), np.uint16)
    for position in range(CHECKED):
        for byte in range(256):
            table[position, byte] = crc16(bytes(position) + bytes([byte]) + bytes(CHECKED - 1 - position))
    return table


def row_checks(rows: np.ndarray) -> np.ndarray:
    """CRC-16 of each row's first 30 bytes. rows: (n,) ROW, contiguous -> (n,) u16."""
    table, rows = _crc16_table(), rows.reshape(-1)
    checks = np.empty(len(rows), np.uint16)
    for a in range(0, len(rows), 65536):
        octets = rows[a : a + 65536].view(np.uint8).reshape(-1, ROW.itemsize)[:, :CHECKED]
        checks[a : a + 65536] = np.bitwise_xor.reduce(table[np.arange(CHECKED), octets], axis=1)
    return checks


def check_speaker(speaker: str) -> None:
    """Raises ShardError where a speaker's name cannot be the first part of a key."""
    if not speaker or "/" in speaker:
        raise ShardError(f"speaker {speaker!r}: expected a name without '/', at least one character")
    check_key(speaker, speaker + "/0")


def check_key(speaker: str, key: str) -> bytes:
    """The bytes of a key `<speaker>/...`. Raises ShardError with the rule that the key breaks."""
    try:
        data = key.encode("utf-8")
    except UnicodeEncodeError:
        raise ShardError(f"key {ascii(key)} is not UTF-8; rename the file") from None
    problem = _key_problem(speaker, key, data)
    if problem:
        raise ShardError(f"key {ascii(key)} {problem}; rename the file or give another key")
    return data


def _key_problem(speaker: str, key: str, data: bytes) -> str | None:
    if not key.isprintable():
        return "has a control character or another that does not print"
    if "\\" in key:
        return "has a backslash"
    if not key.startswith(speaker + "/"):
        return f"does not begin with its speaker, {ascii(speaker + '/')}"
    if len(data) > MAX_KEY:
        return f"has {len(data)} bytes, at most {MAX_KEY} fit the name of a tar member"
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "has an empty part, '.' or '..'"
    if any(DEVICE_NAMES.fullmatch(part) for part in parts):
        return "has the name of a device as a part"
    if "." in parts[-1]:
        return "has a dot in its last part, where webdataset would cut it"
    if parts[0].startswith("__") and parts[0].endswith("__"):
        return "has a speaker like __NAME__, which webdataset skips"
    return None


def tar_header(name: bytes | str, size: int) -> bytes:
    """USTAR header of a regular file, mode 0644, owner 0, mtime 0: 512 bytes. name: at most 100 bytes; size below 8 GiB."""
    if isinstance(name, str):
        name = name.encode("utf-8")
    fields = (name, b"0000644", b"0000000", b"0000000", b"%011o" % size, b"00000000000", b" " * 8, b"0", b"ustar\x0000")
    header = struct.pack("<100s8s8s8s12s12s8s1s100x8s", *fields).ljust(BLOCK, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def identity_block(sha256: str) -> bytes:
    """The last block of a tar. sha256: hex, of all bytes before it."""
    return (IDENTITY + sha256.encode() + b"\n").ljust(BLOCK, b"\0")


def padding(size: int) -> bytes:
    """The zeros that fill a member of `size` bytes up to the next tar block."""
    return bytes(-size % BLOCK)


def wav_header(samples: int, sample_rate: int) -> bytes:
    """Canonical 44-byte RIFF header: PCM, mono, 16 bits."""
    size = 2 * samples
    riff = struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE")
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return riff + form + struct.pack("<4sI", b"data", size)


@contextlib.contextmanager
def atomic_write(path: str | Path, *, exclusive: bool = False):
    """A binary file that appears under `path` whole and durable, or not at all: temporary name, fsync, os.replace.

    exclusive: raise FileExistsError, and leave the file that is there, instead of replacing it.
    A killed process leaves `.NAME.*.tmp` beside the path, which nothing ever reads. While it is written, the temporary file is
    locked (flock), so that nobody takes it for such a leftover.
    """
    path = Path(path)
    fd, temporary = _temporary(path)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o666 & ~_umask())
            yield file
            file.flush()
            os.fsync(fd)
            # Renamed before it is closed: closing ends the lock.
            if exclusive:
                _link(temporary, path)
            else:
                os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_folder(path.parent)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file by atomic_write. Text as UTF-8; names of files in it that are none get their own bytes back."""
    with atomic_write(path) as file:
        file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def _temporary(path: Path) -> tuple[int, str]:
    """A new locked file beside path. One that remove_leftovers of another process took, before it was locked, is made again."""
    while True:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        if lock(fd) and os.fstat(fd).st_nlink:
            return fd, temporary
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _link(temporary: str, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a mount without hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(temporary, path)


@functools.cache
def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(fd: int, shared: bool = False) -> bool:
    """Locks an open file or folder (flock) for this process; False where another holds it. Where there are no locks: True."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network and FUSE mounts have none
        return True
    return True


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Deletes what killed writers of `name` (of any file, if empty) left in a folder; what a living one writes stays."""
    for path in folder.glob(f".{name}*.tmp"):
        with contextlib.suppress(FileNotFoundError), open_regular(path) as file:
            if lock(file.fileno()):
                path.unlink(missing_ok=True)


KINDS = {stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def open_regular(path: str | Path, buffering: int = 0):
    """Opens a file for reading bytes; a pipe, device or folder, which could block for ever, is a ShardError at once."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a folder" if stat.S_ISDIR(mode) else KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise ShardError(f"{path} is {kind}, expected a file")
    return open(fd, "rb", buffering=buffering)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a regular file."""
    with open_regular(path, -1) as file:
        return file.read()


def refuse_overwriting(path: str | Path, inputs: dict[str, str | Path | None]) -> None:
    """Raises ShardError where a file to be written is one of the inputs (name -> path), a folder, or in no folder."""
    path = Path(path)
    if path.is_dir():
        raise ShardError(f"{path} is a folder, expected the name of a file to write")
    if not path.absolute().parent.is_dir():
        raise ShardError(f"{path}: the folder {path.parent} is not there; make it first")
    for name, given in inputs.items():
        with contextlib.suppress(OSError):
            if given is not None and os.path.samefile(path, given):
                raise ShardError(f"{path} is the {name} itself, which would be overwritten; give another file")


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def write_npy(path: str | Path, array: np.ndarray) -> None:
    """Writes a contiguous array as .npy version 1.0 (atomically)."""
    with atomic_write(path) as file:
        file.write(npy_header(array.dtype, array.shape))
        array = np.ascontiguousarray(array)
        for a in range(0, len(array), 1 << 20):
            file.write(array[a : a + (1 << 20)].tobytes())


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file, version 1.0, padded to a multiple of 64 bytes."""
    descr = np.lib.format.dtype_to_descr(dtype)
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode("latin-1")
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def open_npy(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    """Read-only map of a one-dimensional .npy whose type and length are known. Raises ShardError on anything else."""
    dtype = np.dtype(dtype)
    try:
        with open_regular(path, -1) as file:
            start, size = file.read(10), os.fstat(file.fileno()).st_size
            header = file.read(min(int.from_bytes(start[8:10], "little"), MAX_NPY_HEADER))
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; {REMAKE}") from None
    wanted = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    if not start.startswith(b"\x93NUMPY\x01\x00") or _parsed(header) != wanted:
        raise ShardError(f"{path}: found {_described(header)}, expected {dtype} of {length}; {REMAKE}")
    offset = len(start) + len(header)
    if size != offset + length * dtype.itemsize:
        expected = offset + length * dtype.itemsize
        raise ShardError(f"{path}: found {size} bytes, expected {expected}: cut or replaced; {REMAKE}")
    return np.memmap(path, dtype, "r", offset, (length,)) if length else np.empty(0, dtype)


def _parsed(header: bytes):
    try:
        return ast.literal_eval(header.decode("latin-1").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _described(header: bytes) -> str:
    entries = _parsed(header)
    if not isinstance(entries, dict):
        return "a damaged .npy header"
    if "O" in str(entries.get("descr")):
        return f"a pickle (type {entries['descr']}), which is never loaded"
    return f"{entries.get('descr')} of {entries.get('shape')}"
