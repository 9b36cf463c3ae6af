"""FLAC files whose header gives no length, as they come out of a pipe (RFC 9639).

The number of samples, 36 bits of STREAMINFO at byte 21, is 0 there. The last frame tells it: its header has the number of the frame
(or of its first sample), and its CRC-16 says whether it is whole and really the last one.

Usage: data = with_length(data, "a.flac")  # what libsndfile decodes to the end
"""

from __future__ import annotations

from collections.abc import Iterator

from shards.format import ShardError

BEGIN = b"fLaC\0\0\0\x22"  # the marker, then STREAMINFO of 34 bytes
LAST_FRAME = 1 << 20  # bytes at the end in which the last frame begins
CANDIDATES = 256  # sync codes tried from the end; one may stand inside a frame by chance
BLOCK_SIZES = {1: 192, 2: 576, 3: 1152, 4: 2304, 5: 4608} | {code: 256 << code - 8 for code in range(8, 16)}


def _crc16_of(byte: int) -> int:
    crc = byte << 8
    for _ in range(8):
        crc = (crc << 1 ^ 0x8005 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc


_CRC16 = [_crc16_of(byte) for byte in range(256)]


def crc16(data: bytes) -> int:
    """CRC-16 with the polynomial 0x8005, start 0: it is 0 over data that end with their own CRC."""
    crc = 0
    for byte in data:
        crc = (crc << 8 & 0xFFFF) ^ _CRC16[crc >> 8 ^ byte]
    return crc


def promised(data: bytes) -> int:
    """Samples of a channel that STREAMINFO tells; 0: it does not know."""
    return int.from_bytes(data[21:26], "big") & (1 << 36) - 1


def with_length(data: bytes, name: str) -> bytes:
    """The file with its length in the header. Raises ShardError where the last frame of one without a length is not whole."""
    if len(data) < 42:
        raise ShardError(f"{name}: cut: {len(data)} bytes, a FLAC header alone has 42; get the file again")
    if told := promised(data):
        if not ends_at(data[-LAST_FRAME:], told, _block_size(data)):
            raise ShardError(
                f"{name}: cut or damaged: no frame ends at the {told} samples of its header; get the file again"
            )
        return data  # the decoder's count is compared with it
    total = _end_of_last_frame(data)
    if not total:
        raise ShardError(f"{name}: cut or damaged: its last FLAC frame is not whole; get the file again")
    word = int.from_bytes(data[18:26], "big") | total
    return data[:18] + word.to_bytes(8, "big") + data[26:]


def _block_size(head: bytes) -> int:
    return int.from_bytes(head[8:10], "big")


def _frames_from_the_end(tail: bytes) -> Iterator[int]:
    """Where a frame may begin: a sync code may also stand inside one by chance."""
    at = len(tail)
    for _ in range(CANDIDATES):
        at = max(tail.rfind(b"\xff\xf8", 0, at), tail.rfind(b"\xff\xf9", 0, at))
        if at < 0:
            return
        yield at


def ends_at(tail: bytes, samples: int, block_size: int) -> bool:
    """Whether the last bytes of a file hold a frame that ends with this sample, and none behind it: a quick look, no sum."""
    frames = [_samples_of(tail[at : at + 16].ljust(16, b"\0"), block_size) for at in _frames_from_the_end(tail)]
    return samples in [end for _, end in frames] and samples not in [start for start, _ in frames]


def _end_of_last_frame(data: bytes) -> int:
    tail = data[max(42, len(data) - LAST_FRAME) :]
    whole = (at for at in _frames_from_the_end(tail) if crc16(tail[at:]) == 0)
    return next((_samples_of(tail[at : at + 16], _block_size(data))[1] for at in whole), 0)


def _samples_of(head: bytes, block_size: int) -> tuple[int, int]:
    """(first sample, the one behind the last) of a frame, from its header. block_size: of the stream, where frames are counted."""
    code, length = head[2] >> 4, 8 - (head[4] ^ 0xFF).bit_length()  # leading ones of a number as in UTF-8
    number, behind = head[4], 5
    if length:
        number, behind = head[4] & (0x7F >> length), 4 + length
        for byte in head[5:behind]:
            number = number << 6 | byte & 0x3F
    size = BLOCK_SIZES.get(code, 0)
    if code == 6:
        size = head[behind] + 1
    elif code == 7:
        size = int.from_bytes(head[behind : behind + 2], "big") + 1
    start = number if head[1] & 1 else number * block_size
    return start, start + size
