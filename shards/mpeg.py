"""MPEG audio frames: MP3 (and layers I and II) and AAC's ADTS, counted without decoding them.

libsndfile believes the Info (or Xing) frame at the beginning of an MP3, and where there is none it guesses the length from the first
frames' bit rate: of a file with a variable rate it then drops a quarter without a word. So the frames are counted here, and a
file without a right Info frame gets one before it goes to the decoder.

Usage: data = with_length(data, "a.mp3")  # what libsndfile decodes to the end
"""

from __future__ import annotations

from shards.format import ShardError

RATES = ((11025, 12000, 8000), (), (22050, 24000, 16000), (44100, 48000, 32000))  # Hz, by version: 2.5, none, 2, 1
KBIT = {  # kbit/s by (MPEG 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
TAGS = (b"TAG", b"APETAGEX", b"LYRICS", b"3DI", b"ID3")  # may follow the last frame


def frame_bytes(head: bytes) -> int:
    """Bytes of the frame with this header of 4 bytes; 0 where it is none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    version, layer, kbit, rate = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or kbit in (0, 15) or rate == 3:
        return 0
    bits = 1000 * KBIT[version == 3, layer][kbit - 1]
    padded, hertz = head[2] >> 1 & 1, RATES[version][rate]
    if layer == 1:
        return (12 * bits // hertz + padded) * 4
    return (72 if layer == 3 and version != 3 else 144) * bits // hertz + padded


def starts_mp3(head: bytes) -> bool:
    return head.startswith(b"ID3") or frame_bytes(head[:4]) > 0


def _behind_tags(data: bytes, position: int = 0) -> int:
    """Where the frames begin: behind tags and zeros that stand at a position."""
    while data[position : position + 3] in (b"ID3", b"TAG") and position + 10 <= len(data):
        size = data[position + 6 : position + 10]
        footer = 10 if data[position + 5] & 0x10 else 0
        old = data[position : position + 3] == b"TAG"
        position += 128 if old else 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3]) + footer
    while position < len(data) and not data[position]:  # some writers fill up with zeros
        position += 1
    return position


def _frames(data: bytes, name: str) -> tuple[int, int, int]:
    """(first byte, bytes of the first frame, frames) of an MP3. Raises ShardError where frames do not follow each other."""
    start = position = _behind_tags(data)
    count, first = 0, frame_bytes(data[start : start + 4])
    while position < len(data):
        size = frame_bytes(data[position : position + 4])
        if not size:
            rest = data[position : position + 8]
            if count and (rest.startswith(TAGS) or not data[position:].strip(b"\0")):
                if frame_bytes(data[_behind_tags(data, position) :][:4]):
                    raise ShardError(f"{name}: several MP3 streams in one file, expected one; convert it with ffmpeg")
                break
            raise ShardError(f"{name}: cut or damaged: no MPEG frame at byte {position}; get the file again")
        if position + size > len(data):
            raise ShardError(
                f"{name}: cut: its last frame ends at byte {position + size}, the file at {len(data)}; get it again"
            )
        position, count = position + size, count + 1
    if not count:
        raise ShardError(f"{name}: no MPEG frames in it; get the file again")
    return start, first, count


def _info_at(data: bytes, start: int) -> int:
    """Where the word Xing or Info stands in a first frame."""
    mpeg1, mono = data[start + 1] >> 3 & 3 == 3, data[start + 3] >> 6 == 3
    return start + 4 + ((17 if mono else 32) if mpeg1 else (9 if mono else 17))


def _promised(data: bytes, start: int) -> int | None:
    """Frames (without the first) that an Info frame tells; None where there is no such frame, 0 where it does not know."""
    at = _info_at(data, start)
    if data[at : at + 4] not in (b"Xing", b"Info"):
        return None
    return int.from_bytes(data[at + 8 : at + 12], "big") if data[at + 7] & 1 else 0


def check_mp3(data: bytes, name: str) -> None:
    """Raises ShardError where the last frame is not whole, or fewer frames are there than the Info frame tells."""
    start, _, count = _frames(data, name)
    promised = _promised(data, start)
    if promised and promised > count - 1:
        raise ShardError(f"{name}: cut: its header promises {promised} frames, {count - 1} are there; get it again")


def with_length(data: bytes, name: str) -> bytes:
    """The file with an Info frame that tells its true number of frames. Raises ShardError as check_mp3 does."""
    start, first, count = _frames(data, name)
    promised = _promised(data, start)
    if promised == count - 1 or data[start + 1] >> 1 & 3 != 1:  # right, or not layer III
        return data
    head = bytearray(data[start : start + 4])
    head[1] |= 1  # no CRC
    head[2] = 0x90 | head[2] & 0x0C  # enough bits for the table, not filled up
    frame = bytearray(frame_bytes(bytes(head)))
    frame[:4] = head
    at = _info_at(bytes(frame), 0)
    frames = count if promised is None else count - 1
    frame[at : at + 12] = b"Info" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return bytes(frame) + data[start if promised is None else start + first :]


def check_adts(data: bytes, name: str) -> None:
    """Raises ShardError where the frames of an AAC stream do not fill the file."""
    position = 0
    while position < len(data):
        head = data[position : position + 6]
        if len(head) < 6 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
            if position and (head.startswith(TAGS) or not data[position:].strip(b"\0")):
                return
            raise ShardError(f"{name}: cut or damaged: no AAC frame at byte {position}; get the file again")
        position += max(7, (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5)
    if position != len(data):
        raise ShardError(f"{name}: cut: its last frame ends at byte {position}, the file at {len(data)}; get it again")
