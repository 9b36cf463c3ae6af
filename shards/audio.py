"""Audio files <-> int16 samples, mono, at one rate. Nothing is converted unless it is asked for.

PCM WAV is cut out of the file as it is (an order faster than a decoder); FLAC, OGG, Opus and MP3 go through libsndfile; anything
else (m4a) through ffmpeg, from memory to memory. With convert=True channels are averaged, wider samples rounded, other rates resampled
by soxr (very high quality).

Usage: samples = read_audio("vox2.zip::dev/aac/id00012/21Uxsk56VDQ/00001.m4a", 16000)  # (n,) int16
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator

import numpy as np
import soundfile

from shards.archive import read_source
from shards.format import MAX_SAMPLES, ShardError

EXACT_SUBTYPES = {"PCM_16", "PCM_S8", "PCM_U8", "VORBIS", "OPUS", "MPEG_LAYER_III", "MPEG_LAYER_II", "MPEG_LAYER_I"}
BY_FFMPEG = (".m4a", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".wma")
AHEAD = 16  # files for one ffmpeg
UNKNOWN_SIZE = 0xFFFFFFFF  # length of a data chunk that was written to a pipe


def read_audio(source: str | os.PathLike, sample_rate: int, convert: bool = False) -> np.ndarray:
    """(samples,) int16 of a file, or of `ARCHIVE.zip::member` or `ARCHIVE.tar::member`.

    Raises ShardError naming the source: no such file, unreadable, no samples, not mono 16-bit audio at sample_rate (Hz).
    """
    source = os.fspath(source)
    return np.frombuffer(decode(read_source(source), source, sample_rate, convert), "<i2").astype(np.int16, copy=False)


def decode(data: bytes, name: str, sample_rate: int, convert: bool = False) -> bytes | memoryview:
    """The bytes of an audio file -> PCM bytes (little endian, mono, 16 bits). name is for the errors and its ending."""
    if name.lower().endswith(BY_FFMPEG):
        [data] = ffmpeg_to_wavs([data], [name])
    return decode_wav(data, name, sample_rate, convert)


def decode_wav(data: bytes, name: str, sample_rate: int, convert: bool = False) -> bytes | memoryview:
    """decode() of what ffmpeg has made a WAV of, or of what needs no ffmpeg."""
    pcm = riff_pcm(data, name, sample_rate)
    if pcm is None:
        pcm = _decode_soundfile(data, name, sample_rate, convert)
    if len(pcm) == 0:
        raise ShardError(f"{name}: no audio in it (0 samples)")
    if len(pcm) > 2 * MAX_SAMPLES:
        raise ShardError(f"{name}: {len(pcm) // 2} samples, at most {MAX_SAMPLES} fit an utterance; cut it")
    return pcm


def riff_layout(data: bytes) -> tuple[int, int, int, int] | None:
    """(sample rate, channels, offset of the first PCM byte, PCM bytes) of 16-bit PCM WAV whose chunks begin in `data`, else None."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    position, form = 12, None
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, position)
        position += 8
        if name == b"fmt " and size >= 16 and position + 16 <= len(data):
            form = struct.unpack_from("<HHIIHH", data, position)
        if name == b"data":
            is_pcm16 = form is not None and form[0] == 1 and form[5] == 16
            return (form[2], form[1], position, size) if is_pcm16 else None
        position += size + size % 2
    return None


def riff_pcm(data: bytes, name: str, sample_rate: int) -> memoryview | None:
    """The PCM bytes of a mono 16-bit WAV at sample_rate, or None where the file is anything else. Raises ShardError if cut."""
    layout = riff_layout(data)
    if layout is None or layout[:2] != (sample_rate, 1):
        return None
    _, _, position, size = layout
    found = len(data) - position
    if size == UNKNOWN_SIZE:
        size = found - found % 2
    if size > found or size % 2:
        raise ShardError(f"{name}: cut: its header promises {size} bytes of audio, {found} are there")
    return memoryview(data)[position : position + size]


def _decode_soundfile(data: bytes, name: str, sample_rate: int, convert: bool) -> bytes:
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            found = (file.samplerate, file.channels, file.subtype)
            problem = mismatch(found, sample_rate)
            if problem and not convert:
                raise ShardError(f"{name}: {problem}; convert it, or pack with --convert")
            # libsndfile reads float files as int16 without scaling them: all zeros.
            samples = file.read(dtype="float64" if problem else "int16", always_2d=True)
            if file.frames < 2**62 and len(samples) != file.frames:
                raise ShardError(f"{name}: cut: its header promises {file.frames} samples, {len(samples)} are there")
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise ShardError(f"{name}: not readable as audio ({error})") from None
    if problem:
        samples = _converted(samples, found[0], sample_rate)
    return np.ascontiguousarray(samples.reshape(-1), "<i2").tobytes()


def mismatch(found: tuple[int, int, str], sample_rate: int) -> str:
    """What keeps (rate, channels, libsndfile subtype) from being mono 16-bit audio at sample_rate; empty if nothing."""
    rate, channels, subtype = found
    problems = []
    if rate != sample_rate:
        problems.append(f"{rate} Hz, expected {sample_rate} Hz")
    if channels != 1:
        problems.append(f"{channels} channels, expected mono")
    if subtype not in EXACT_SUBTYPES:
        problems.append(f"{subtype} samples, expected 16 bits")
    return " and ".join(problems)


def _converted(samples: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    import soxr  # needed by few: 30 ms of imports

    mono = samples.mean(axis=1)
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate, quality="VHQ")
    return np.clip(np.rint(mono * 32768), -32768, 32767).astype("<i2")[:, None]


def decode_ahead(sources: list[str], read: Callable[[int], bytes], sample_rate: int, convert: bool = False) -> Iterator:
    """PCM bytes of each source in turn, or the ShardError that it is. read(i): the bytes of sources[i].

    Files for ffmpeg are read AHEAD at a time and decoded by one process: starting it costs ten times as much as decoding 8 s of AAC.
    """
    for first in range(0, len(sources), AHEAD):
        chosen = range(first, min(first + AHEAD, len(sources)))
        wavs: dict[int, bytes] = {}
        many = [i for i in chosen if sources[i].lower().endswith(BY_FFMPEG)]
        # One bad file spoils the batch: each is then decoded on its own, and says what is wrong with it.
        with contextlib.suppress(ShardError):
            wavs = dict(zip(many, ffmpeg_to_wavs([read(i) for i in many], [sources[i] for i in many]))) if many else {}
        for i in chosen:
            try:
                if i in wavs:
                    yield decode_wav(wavs.pop(i), sources[i], sample_rate, convert)
                else:
                    yield decode(read(i), sources[i], sample_rate, convert)
            except ShardError as error:
                yield error


def ffmpeg_to_wavs(files: list[bytes], names: list[str]) -> list[bytes]:
    """16-bit PCM WAV of anything ffmpeg reads, at its own rate and channels. Raises ShardError naming the first file."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise ShardError(
            f"{names[0]}: only ffmpeg reads this kind of file, and it is not installed (Debian: package ffmpeg)"
        )
    # m4a keeps its directory at the end, so ffmpeg must be able to seek: files in memory, not pipes.
    inputs, outputs = [], []
    command = [program, "-nostdin", "-v", "error", "-xerror", "-y"]
    try:
        for data in files:
            inputs.append(os.memfd_create("audio", 0))
            _write(inputs[-1], data)
            outputs.append(os.memfd_create("wav", 0))
            command += ["-threads", "1", "-i", f"/proc/self/fd/{inputs[-1]}"]
        for i, fd in enumerate(outputs):
            command += ["-vn", "-map", f"{i}:a:0", "-c:a", "pcm_s16le", "-bitexact", "-f", "wav", f"/proc/self/fd/{fd}"]
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, pass_fds=[*inputs, *outputs], check=False
        )
        if result.returncode:
            reason = result.stderr.decode(errors="replace").strip().splitlines()
            raise ShardError(f"{names[0]}: ffmpeg cannot read it ({reason[-1] if reason else result.returncode})")
        return [os.pread(fd, os.fstat(fd).st_size, 0) for fd in outputs]
    finally:
        for fd in inputs + outputs:
            os.close(fd)


def _write(fd: int, data: bytes) -> None:
    with open(fd, "wb", closefd=False) as file:
        file.write(data)


def encode_flac(pcm: bytes | memoryview, sample_rate: int) -> bytes:
    """PCM bytes (mono, 16 bits) -> a FLAC file."""
    stream = io.BytesIO()
    soundfile.write(stream, np.frombuffer(pcm, "<i2"), sample_rate, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def decode_flac(data: bytes | memoryview, start: int, count: int, out: np.ndarray) -> None:
    """Decodes `count` samples from `start` of a FLAC file in memory into out[:count] (int16). Raises ShardError."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            file.seek(start)
            found = len(file.read(count, dtype="int16", out=out[:count]))
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ShardError(f"not readable as FLAC ({error})") from None
    if found != count:
        raise ShardError(f"found {found} samples at {start}, expected {count}")
