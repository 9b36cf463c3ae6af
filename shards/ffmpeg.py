"""ffmpeg as a decoder of what libsndfile does not read (MP4, AAC, WebM, WMA, AMR): many files in one process, in memory.

Usage: wavs = ffmpeg_to_wavs([data], ["a.m4a"])
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from shards.format import ShardError

AHEAD = 16  # files for one ffmpeg
LONGEST = 4 * 3600  # seconds of an utterance: what inflates beyond is no speech


def ffmpeg_to_wavs(files: list[bytes], names: list[str]) -> list[bytes]:
    """16-bit PCM WAV of anything ffmpeg reads, at its own rate and channels. Raises ShardError naming the first file."""
    outputs: list[int] = []
    try:
        outputs += [os.memfd_create("wav", 0) for _ in files]
        _convert(files, names, outputs)
        return [os.pread(fd, os.fstat(fd).st_size, 0) for fd in outputs]
    finally:
        for fd in outputs:
            os.close(fd)


def ffmpeg_to_file(data: bytes, name: str, fd: int) -> None:
    """The same of one file, into an open empty one: hours of audio never lie in memory."""
    _convert([data], [name], [fd])


def _convert(files: list[bytes], names: list[str], outputs: list[int]) -> None:
    program = shutil.which("ffmpeg")
    if program is None:
        raise ShardError(
            f"{names[0]}: only ffmpeg reads this kind of file, and it is not installed (Debian: package ffmpeg)"
        )
    # m4a keeps its directory at the end, so ffmpeg must be able to seek: files in memory, not pipes.
    inputs: list[int] = []
    command = [program, "-nostdin", "-v", "error", "-xerror", "-y"]
    form = ["-t", str(LONGEST + 1), "-c:a", "pcm_s16le", "-bitexact", "-f", "wav"]
    try:
        for data in files:
            inputs.append(os.memfd_create("audio", 0))
            _write(inputs[-1], data)
            command += ["-threads", "1", "-i", f"/proc/self/fd/{inputs[-1]}"]
        for i, fd in enumerate(outputs):
            command += ["-vn", "-map", f"{i}:a:0", *form, f"/proc/self/fd/{fd}"]
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, pass_fds=[*inputs, *outputs], check=False
        )
    finally:
        for fd in inputs:
            os.close(fd)
    complaints = result.stderr.decode(errors="replace").strip().splitlines()
    if any("matches no streams" in line for line in complaints):
        raise ShardError(f"{names[0]}: no audio in it, or a picture alone; give a recording")
    if result.returncode or complaints:  # it may go on past damage, and end well
        reason = re.sub(" @ 0x[0-9a-f]+", "", complaints[-1]) if complaints else f"it ended with {result.returncode}"
        raise ShardError(f"{names[0]}: ffmpeg cannot read it ({ascii(reason)[1:-1]})")
    for fd, name in zip(outputs, names):
        _check_length(fd, name)


def _check_length(fd: int, name: str) -> None:
    head = os.pread(fd, 44, 0)
    rate, channels = int.from_bytes(head[24:28], "little"), int.from_bytes(head[22:24], "little")
    if os.fstat(fd).st_size - 44 > LONGEST * rate * channels * 2:
        raise ShardError(f"{name}: longer than {LONGEST // 3600} hours; cut it")


def _write(fd: int, data: bytes) -> None:
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
