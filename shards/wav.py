"""RIFF/WAVE files as they come: from editors, from recorders that were killed, from programs that write to a pipe.

    RIFF size WAVE   chunks: name (4 bytes) size (u32) data, filled up to an even length
    RF64 or BW64     the same beyond 4 GiB; the true sizes stand in the chunk `ds64` (EBU Tech 3306)

Whoever writes to a pipe cannot go back to fill in the sizes. Such a data chunk has the size 0, 0x7FFFF000 (sox), 0x7FFFFFFF or
0xFFFFFFFF (ffmpeg) and reaches to the end of the file, or to the chunks that stand there. Any other size is a promise: a file with
less is cut, and what lies behind it must be chunks again, else the size was wrong.

Usage: wave = parse(lambda offset, n: data[offset:offset + n], len(data), "a.wav")
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from shards.format import ShardError

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
LONGEST_PIPE_SIZE = 0x7FFF0000  # sizes from here on are those of a pipe, unless the file is as long as that
TAIL = 1 << 20  # bytes at the end of a pipe's file in which further chunks are looked for
TRAILERS = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"cue ", b"iXML", b"_PMX", b"JUNK", b"fact", b"PAD ", b"afsp")
TAGS = (b"TAG", b"ID3", b"APETAGEX")  # of MP3, which some programs hang behind anything
Read = Callable[[int, int], bytes]  # (offset, bytes) -> at most so many bytes


@dataclass(frozen=True)
class Wave:
    """tag: the format's number (1: PCM, 3: float); offset, nbytes: of the audio; blocks: bytes of one sample of all channels."""

    tag: int
    channels: int
    rate: int
    bits: int
    block: int
    offset: int
    nbytes: int
    form: bytes  # the chunks `fmt ` and `fact`, for a decoder
    stray: int  # bytes at the end that are no whole sample
    from_pipe: bool

    @property
    def is_pcm16(self) -> bool:
        return self.tag == PCM and self.bits == 16 and self.block == 2 * self.channels

    @property
    def samples(self) -> int | None:
        """Samples of a channel; None where a codec packs several into a block."""
        return self.nbytes // self.block if self.tag in (PCM, FLOAT) and self.block else None

    @property
    def header(self) -> bytes:
        """What stands before the audio in a file that every decoder reads alike: sizes filled in, nothing behind it."""
        body = b"WAVE" + self.form + b"data" + struct.pack("<I", self.nbytes)
        return b"RIFF" + struct.pack("<I", len(body) + self.nbytes) + body


def is_wave(head: bytes) -> bool:
    return head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE"


def parse(read: Read, size: int, name: str) -> Wave:
    """The layout of a WAV of `size` bytes. Raises ShardError where it is cut, damaged or holds several pieces of audio."""
    form, fact, big, position = b"", b"", None, 12
    while True:
        head = read(position, 8)
        if len(head) < 8:
            raise ShardError(f"{name}: cut or damaged: no data chunk in its {size} bytes")
        chunk, length = struct.unpack("<4sI", head)
        if chunk == b"data":
            if length == 0xFFFFFFFF and big and position + 8 + big > size:
                raise ShardError(
                    f"{name}: cut: its header promises {big} bytes of audio, {size - position - 8} are there"
                )
            length = big if length == 0xFFFFFFFF and big else length
            return _with_data(read, size, name, (form, fact), position + 8, length)
        if chunk == b"fmt ":
            form = head + read(position + 8, min(length, 4096))
        elif chunk == b"fact":
            fact = head + read(position + 8, min(length, 64))
        elif chunk == b"ds64":  # 0 from a pipe
            big = struct.unpack_from("<Q", read(position + 8, 16).ljust(16, b"\0"), 8)[0]
        position += 8 + length + length % 2


def _with_data(read: Read, size: int, name: str, chunks: tuple[bytes, bytes], offset: int, length: int) -> Wave:
    form, fact = chunks
    if len(form) < 24:
        raise ShardError(f"{name}: damaged: no format (chunk `fmt `) before its audio")
    tag, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", form, 8)
    if tag == EXTENSIBLE and len(form) >= 48:
        tag = struct.unpack_from("<H", form, 32)[0]
    if tag in (PCM, FLOAT) and block not in (0, channels * ((bits + 7) // 8)):
        raise ShardError(
            f"{name}: damaged: its header gives samples of {block} bytes for {channels} channels of {bits} bits; write the file again"
        )
    found = size - offset
    from_pipe = (length == 0 or length >= LONGEST_PIPE_SIZE) and (length > found or length == 0)
    if length == 0 and _are_chunks(read, offset, size):
        from_pipe = False
    if from_pipe:
        length = _end_of_audio(read, offset, size) - offset
    elif length > found:
        raise ShardError(f"{name}: cut: its header promises {length} bytes of audio, {found} are there")
    else:
        _check_rest(read, offset + length, length % 2, size, name)
    stray = length % block if block and tag in (PCM, FLOAT) else 0
    packed = (form + b"\0" * (len(form) % 2)) + (fact + b"\0" * (len(fact) % 2))
    return Wave(tag, channels, rate, bits, block, offset, length - stray, packed, stray, from_pipe)


def _chunks(read: Read, position: int, size: int) -> list[tuple[bytes, int]] | None:
    """(name, offset) of the chunks from `position` to the end of the file; None where there is anything else."""
    found = []
    while position < size:
        head = read(position, 8)
        rest = size - position
        if head[:3] == b"TAG" and rest == 128 or head.startswith(TAGS[1:]):
            return found
        if not head.strip(b"\0") and not read(position, min(rest, TAIL)).strip(b"\0"):
            return found  # filled up with zeros
        if len(head) < 8 or not all(0x20 <= byte < 0x7F for byte in head[:4]):
            return None
        length = int.from_bytes(head[4:], "little")
        if length > rest - 8:
            return None
        found.append((head[:4], position))
        position += 8 + length + (length % 2 if length < rest - 8 else 0)
    return found


def _are_chunks(read: Read, position: int, size: int) -> bool:
    return position == size or bool(_chunks(read, position, size))


def _check_rest(read: Read, end: int, odd: int, size: int, name: str) -> None:
    """What lies behind the audio must be chunks, and no second audio."""
    if end + odd >= size:
        return
    behind = _chunks(read, end + odd, size)
    if behind is None and odd:  # some writers forget to fill up
        behind = _chunks(read, end, size)
    if behind is None:
        raise ShardError(
            f"{name}: {size - end} bytes behind its audio are no chunks: its header gives a wrong length; write the file again"
        )
    if any(chunk in (b"data", b"RIFF", b"RF64", b"BW64") for chunk, _ in behind):
        raise ShardError(f"{name}: two pieces of audio (chunks `data`), expected one; join them, or split the file")


def _end_of_audio(read: Read, offset: int, size: int) -> int:
    """Where the audio of a pipe ends: at chunks that reach exactly to the end of the file, or there."""
    start = max(offset, size - TAIL)
    tail = read(start, size - start)
    ends = []
    for chunk in TRAILERS:
        at = tail.find(chunk)
        while at >= 0:
            if _reaches_end(tail, at):
                ends.append(start + at)
                break
            at = tail.find(chunk, at + 1)
    return min(ends, default=size)


def _reaches_end(tail: bytes, at: int) -> bool:
    while at + 8 <= len(tail):
        if not all(0x20 <= byte < 0x7F for byte in tail[at : at + 4]):
            return False
        length = int.from_bytes(tail[at + 4 : at + 8], "little")
        at += 8 + length + length % 2
    return at in (len(tail), len(tail) + 1)
