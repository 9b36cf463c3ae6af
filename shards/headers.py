"""The one reader of audio headers: what a file is, by its content and not by its name, and how long it says it is.

Packing, loose lists and evaluation all ask here, so that they agree. A length is told only where the format promises one that
the decoder is held to (WAV, and FLAC with a length); everywhere else it is None, "not known until decoded".

Usage: header = read_header("a.wav"); header.samples, header.rate, header.offset
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shards import containers, format, wav
from shards.format import ShardError

HEAD = 4096  # bytes read at first: nearly always the whole header


@dataclass(frozen=True)
class Header:
    """rate in Hz, channels and bits: 0 where only a decoder knows them; samples of a channel: None where only a decoder knows.

    offset: of the first PCM byte of a WAV with 16-bit PCM, else 0; size: bytes of the file.
    """

    container: str
    size: int
    rate: int = 0
    channels: int = 0
    bits: int = 0
    samples: int | None = None
    offset: int = 0

    def is_plain(self, sample_rate: int) -> bool:
        """Whether crops can be cut out of the file as they are: 16-bit PCM WAV, mono, at this rate."""
        return self.offset > 0 and (self.rate, self.channels) == (sample_rate, 1)


def read_header(path: str | os.PathLike) -> Header:
    """The header of a file. Raises ShardError where there is none, or it does not fit the file; FileNotFoundError."""
    with format.open_regular(path) as file:
        return header_of(file.fileno(), os.fspath(path))


def header_of(fd: int, name: str) -> Header:
    """The header of an open file."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, HEAD, 0)

    def read(offset: int, n: int) -> bytes:
        return head[offset : offset + n] if offset + n <= len(head) else os.pread(fd, n, offset)

    return parse(head, read, size, name)


def parse(head: bytes, read: wav.Read, size: int, name: str) -> Header:
    """The header of a file that begins with `head`; read(offset, bytes) reads more of it."""
    if wav.is_wave(head):
        found = wav.parse(read, size, name)
        offset = found.offset if found.is_pcm16 else 0
        return Header("WAV", size, found.rate, found.channels, found.bits, found.samples, offset)
    kind = containers.kind_of(head)
    if kind == "FLAC" and len(head) >= 26:
        word = int.from_bytes(head[18:26], "big")  # rate 20 bits, channels 3, bits 5, samples 36
        rate, channels, bits = word >> 44, (word >> 41 & 7) + 1, (word >> 36 & 31) + 1
        return Header("FLAC", size, rate, channels, bits, (word & (1 << 36) - 1) or None)
    if kind is None:
        raise unknown(head, name)
    return Header(kind, size)


def unknown(head: bytes, name: str) -> ShardError:
    """What to say of a file that is no audio known here."""
    ending = Path(name).suffix.lower() or "no ending"
    if not head:
        return ShardError(f"{name}: not readable as audio (an empty file); get it again")
    if head.startswith(b"\x00\x05\x16\x07"):
        return ShardError(
            f"{name}: not readable as audio (what a Mac keeps beside a file, `._NAME`); leave it out of the list"
        )
    if head.lstrip()[:1] == b"<":
        return ShardError(f"{name}: not readable as audio (a web page or XML); get the file again")
    if head.startswith(b"version https://git-lfs"):
        return ShardError(f"{name}: not readable as audio (a pointer of git-lfs); run `git lfs pull`")
    return ShardError(
        f"{name}: not readable as audio ({ending}, begins with {bytes(head[:12])!r}, which is no container known here);"
        " if ffmpeg reads it, convert it to WAV or FLAC"
    )
