"""Is a compressed audio file whole? Decoders mostly do not say: they return what they could read, and call that the recording.

Each check walks over a container's own parts (pages, frames, boxes, chunks) without decoding them, and raises ShardError where they
do not fill the file exactly. What a format does not say cannot be seen: an MP3 without an Info frame that was cut between two
frames looks whole.

    Ogg  RFC 3533    FLAC  RFC 9639    MP3  ISO 11172-3, 13818-3, Info/Xing frame    MP4  ISO 14496-12    WebM  RFC 8794
    ADTS  ISO 13818-7    ASF (WMA)    AMR  RFC 4867    AIFF    CAF    W64    AU    NIST SPHERE

Usage: kind = kind_of(data[:64]); CHECKS[kind](data, "a.ogg")
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from shards import flac
from shards.format import ShardError
from shards.mpeg import check_adts, check_mp3, starts_mp3

REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
ASF_ID = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
W64_ID = b"riff\x2e\x91\xcf\x11"
AMR_BYTES = (12, 13, 15, 17, 19, 20, 26, 31, 5, 1, 1, 1, 1, 1, 1, 1)  # of a frame with its first byte, by mode
AMR_WB_BYTES = (17, 23, 32, 36, 40, 46, 50, 58, 60, 5, 1, 1, 1, 1, 1, 1)
BY_FFMPEG = ("MP4", "WebM", "ADTS", "WMA", "AMR")  # libsndfile reads the others


def kind_of(head: bytes) -> str | None:
    """The container of a file that begins with `head` (at least 64 bytes where there are as many); None: none that is known."""
    for magic, kind in (
        (b"fLaC", "FLAC"),
        (b"OggS", "Ogg"),
        (b"\x1aE\xdf\xa3", "WebM"),
        (b"NIST_1A\n", "SPHERE"),
        (b".snd", "AU"),
        (b"caff", "CAF"),
        (W64_ID, "W64"),
        (ASF_ID, "WMA"),
        (b"#!AMR", "AMR"),
    ):
        if head.startswith(magic):
            return kind
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "AIFF"
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return "MP4"
    if head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xF6 == 0xF0:
        return "ADTS"
    return "MP3" if starts_mp3(head) else None


def _cut(name: str, what: str) -> ShardError:
    return ShardError(f"{name}: cut or damaged: {what}; get the file again")


def _several(kind: str, name: str) -> ShardError:
    return ShardError(f"{name}: several {kind} streams in one file, expected one; convert it with ffmpeg")


def _nothing_behind(data: bytes, end: int, name: str) -> None:
    """Behind the length that a header tells there may be zeros: else it is wrong, or a second recording stands there."""
    if data[end:].strip(b"\0"):
        raise ShardError(
            f"{name}: {len(data) - end} bytes stand behind the length that its header tells: several recordings in one"
            " file, or a wrong header; split it, or write it again"
        )


def ogg_crc(page: bytes) -> int:
    """CRC-32 of an Ogg page: polynomial 0x04c11db7, bits not reversed, start 0. zlib's is the reversed one."""
    raw = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{raw:032b}"[::-1], 2)


def check_ogg(data: bytes, name: str) -> None:
    """Every page with its sum, none missing, the last with the flag that ends the stream; one stream only."""
    position, number, serial, ended = 0, None, None, False
    while position < len(data):
        head = data[position : position + 27]
        if len(head) < 27 or head[:4] != b"OggS":
            if ended and not data[position:].strip(b"\0"):
                break
            raise _cut(name, f"no Ogg page at byte {position}")
        flags, page_serial, sequence, crc, segments = head[5], *struct.unpack_from("<IIIB", head, 14)
        end = position + 27 + segments + sum(data[position + 27 : position + 27 + segments])
        if end > len(data):
            raise _cut(name, f"its last Ogg page ends at byte {end}, the file at {len(data)}")
        page = bytearray(data[position:end])
        page[22:26] = bytes(4)
        if ogg_crc(bytes(page)) != crc:
            raise _cut(name, f"the sum of the Ogg page at byte {position} is wrong")
        if serial not in (None, page_serial) or ended:
            raise _several("Ogg", name)
        if number is not None and sequence != number + 1:
            raise _cut(name, f"Ogg page {number + 1} is missing")
        position, number, serial, ended = end, sequence, page_serial, bool(flags & 4)
    if not ended:
        raise _cut(name, "its last Ogg page does not end the stream")


def check_flac(data: bytes, name: str) -> None:
    """One stream, and its last frame ends where the header says; the decoder compares the sum of all samples."""
    if data.find(flac.BEGIN, 1) > 0:
        raise _several("FLAC", name)
    flac.with_length(data, name)


def _walk(data: bytes, name: str, position: int, step: Callable[[bytes, int], int]) -> None:
    """Follows parts from `position`; step(data, position) gives where the next begins, and must arrive at the end of the file."""
    while position < len(data):
        following = step(data, position)
        if following <= position:
            raise _cut(name, f"a part of no length at byte {position}")
        if following > len(data):
            raise _cut(name, f"the part at byte {position} ends at byte {following}, the file at {len(data)}")
        position = following


def check_mp4(data: bytes, name: str) -> None:
    def box(data: bytes, at: int) -> int:
        if at and data[at + 4 : at + 8] == b"ftyp":
            raise _several("MP4", name)
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 0:
            return len(data)
        return at + (int.from_bytes(data[at + 8 : at + 16], "big") if size == 1 else size)

    _walk(data, name, 0, box)
    if b"moov" not in data and b"moof" not in data:
        raise _cut(name, "its directory (box `moov`) is missing")


def check_aiff(data: bytes, name: str) -> None:
    def chunk(data: bytes, at: int) -> int:
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "big")
        return end if end == len(data) else end + (end - at) % 2  # the last may lack the byte that fills it up

    _walk(data, name, 12, chunk)


def check_caf(data: bytes, name: str) -> None:
    def chunk(data: bytes, at: int) -> int:
        size = int.from_bytes(data[at + 4 : at + 12], "big", signed=True)
        return len(data) if size == -1 else at + 12 + size  # -1: to the end, from a pipe

    _walk(data, name, 8, chunk)


def check_w64(data: bytes, name: str) -> None:
    def chunk(data: bytes, at: int) -> int:
        if data[at : at + 8] == W64_ID:
            raise _several("W64", name)
        end = at + int.from_bytes(data[at + 16 : at + 24], "little")
        return end if end == len(data) else end + (at - end) % 8

    _walk(data, name, 40, chunk)


def check_au(data: bytes, name: str) -> None:
    offset, size = struct.unpack_from(">II", data.ljust(24, b"\0"), 4)
    if size != 0xFFFFFFFF and offset + size > len(data):
        raise _cut(name, f"its header promises {size} bytes of audio, {max(0, len(data) - offset)} are there")
    if size != 0xFFFFFFFF:
        _nothing_behind(data, offset + size, name)


def check_sphere(data: bytes, name: str) -> None:
    fields = dict(line.split(" ", 2)[::2] for line in data[:1024].decode("latin-1").split("\n") if line.count(" ") >= 2)
    try:
        head = int(data[8:16])
        need = int(fields["sample_count"]) * int(fields.get("sample_n_bytes", 2)) * int(fields.get("channel_count", 1))
    except (ValueError, KeyError):
        raise _cut(name, "its SPHERE header gives no length") from None
    if fields.get("sample_coding", "pcm") != "pcm":
        return
    if len(data) - head < need:
        raise _cut(name, f"its header promises {need} bytes of audio, {max(0, len(data) - head)} are there")
    _nothing_behind(data, head + need, name)


def check_webm(data: bytes, name: str) -> None:
    def element(data: bytes, at: int) -> int:
        first, second = data[at], data[at + _width(data[at]) : at + _width(data[at]) + 8]
        width = _width(second[0]) if second else 0
        if not 0 < _width(first) <= 4 or not 0 < width <= 8:
            raise _cut(name, f"no element at byte {at}")
        size = int.from_bytes(second[:width], "big") & (1 << 7 * width) - 1
        unknown = size == (1 << 7 * width) - 1  # from a pipe
        return len(data) if unknown else at + _width(first) + width + size

    _walk(data, name, 0, element)


def _width(byte: int) -> int:
    """Bytes of a variable-length number whose first byte this is."""
    return 9 - byte.bit_length() if byte else 0


def check_asf(data: bytes, name: str) -> None:
    at = data.find(ASF_FILE, 0, 1 << 16)
    size = int.from_bytes(data[at + 40 : at + 48], "little") if at >= 0 else 0
    if at < 0 or (size and size > len(data)):
        raise _cut(name, f"its header promises {size} bytes, {len(data)} are there")
    if size:
        _nothing_behind(data, size, name)


def check_amr(data: bytes, name: str) -> None:
    wide = data.startswith(b"#!AMR-WB\n")
    table = AMR_WB_BYTES if wide else AMR_BYTES
    position = 9 if wide else 6
    while position < len(data):
        position += table[data[position] >> 3 & 15]
    if position != len(data):
        raise _cut(name, f"its last frame ends at byte {position}, the file at {len(data)}")


CHECKS: dict[str, Callable[[bytes, str], None]] = {
    "Ogg": check_ogg,
    "FLAC": check_flac,
    "MP3": check_mp3,
    "ADTS": check_adts,
    "MP4": check_mp4,
    "WebM": check_webm,
    "WMA": check_asf,
    "AMR": check_amr,
    "AIFF": check_aiff,
    "CAF": check_caf,
    "W64": check_w64,
    "AU": check_au,
    "SPHERE": check_sphere,
}
