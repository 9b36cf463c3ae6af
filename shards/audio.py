"""Audio files -> int16 samples, mono, at one rate. Nothing is converted unless it is asked for, and what is converted is told.

What a file is, its content says, not its ending. PCM WAV is cut out of the file as it is (an order faster than a decoder); FLAC, Ogg,
MP3, AIFF and other WAV go through libsndfile; MP4, AAC, WebM, WMA and AMR through ffmpeg, from memory to memory. Everything is
decoded to the end and compared with what the container promises (shards.containers, shards.wav): a decoder's own idea of a length is
an estimate. With convert=True channels are averaged, wider samples rounded, other rates resampled by soxr (very high quality).

Usage: samples = read_audio("vox2.zip::dev/aac/id00012/21Uxsk56VDQ/00001.m4a", 16000)  # (n,) int16
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import soundfile

from shards import containers, flac, headers, mpeg, wav
from shards.archive import read_source
from shards.ffmpeg import AHEAD, LONGEST, ffmpeg_to_wavs
from shards.format import MAX_SAMPLES, ShardError

EXACT_SUBTYPES = {"PCM_16", "PCM_S8", "PCM_U8", "VORBIS", "OPUS", "MPEG_LAYER_III", "MPEG_LAYER_II", "MPEG_LAYER_I"}
FFMPEG_ENDINGS = (".m4a", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".wma", ".3gp", ".amr")  # a hint what to read ahead
LOWEST_RATE, HIGHEST_RATE = 1000, 768000  # Hz
BLOCK = 1 << 20  # frames decoded at a time
INTEGER_PEAK = 128.0  # float samples from here on are no loud recording (42 dB over full scale) but integers
CLIPPED_SHARE = 0.001  # of the samples at full scale: a recording that was clipped before it came here
CANCELLED_POWER = 1e-3  # of the channels' power that their mean keeps: 30 dB lost
LENGTHENED = {"MP3": mpeg.with_length, "FLAC": flac.with_length}  # libsndfile stops at the length that the header tells
NOTES = ("converted", "trimmed", "clipped", "silent", "cancelled")


class Decoded(NamedTuple):
    """pcm: little endian, mono, 16 bits; notes: what should be known of it, by a word of NOTES."""

    pcm: bytes | memoryview
    notes: dict[str, str]


def read_audio(source: str | os.PathLike, sample_rate: int, convert: bool = False) -> np.ndarray:
    """(samples,) int16 of a file, or of `ARCHIVE.zip::member` or `ARCHIVE.tar::member`.

    Raises ShardError naming the source: no such file, unreadable, no samples, not mono 16-bit audio at sample_rate (Hz).
    """
    source = os.fspath(source)
    return np.frombuffer(decode(read_source(source), source, sample_rate, convert).pcm, "<i2").astype(
        np.int16, copy=False
    )


def decode(data: bytes, name: str, sample_rate: int, convert: bool = False) -> Decoded:
    """The bytes of an audio file -> PCM. name is for the errors. Raises ShardError, whatever the decoder raises."""
    try:
        kind = _checked_kind(data, name)
        if kind in containers.BY_FFMPEG:
            [data], kind = ffmpeg_to_wavs([data], [name]), "WAV"
        return _decode(data, kind, name, sample_rate, convert)
    except ShardError:
        raise
    except MemoryError:
        raise ShardError(f"{name}: too long for this machine's memory; cut it") from None
    except Exception as error:  # decoders raise whatever they like: ValueError, RuntimeError, struct.error, ...
        raise ShardError(f"{name}: not readable as audio ({type(error).__name__}: {error})") from None


def _checked_kind(data: bytes, name: str) -> str:
    """The container, walked over to its end. Raises ShardError where it is none, or not whole."""
    head = bytes(data[:64])
    if wav.is_wave(head):
        return "WAV"
    kind = containers.kind_of(head)
    if kind is None:
        raise headers.unknown(head, name)
    containers.CHECKS[kind](data, name)
    return kind


def _decode(data: bytes, kind: str, name: str, sample_rate: int, convert: bool) -> Decoded:
    notes: dict[str, str] = {}
    if kind == "WAV":
        found = wav.parse(lambda offset, n: data[offset : offset + n], len(data), name)
        if found.stray:
            notes["trimmed"] = f"{found.stray} bytes at its end that are no whole sample"
        if found.is_pcm16 and (found.rate, found.channels) == (sample_rate, 1):
            return _noted(memoryview(data)[found.offset : found.offset + found.nbytes], notes, name)
        data = found.canonical(data)
    if kind in LENGTHENED:
        data = LENGTHENED[kind](data, name)
    pcm = _by_soundfile(data, kind, name, sample_rate, convert, notes)
    return _noted(pcm, notes, name)


def _noted(pcm: bytes | memoryview, notes: dict[str, str], name: str) -> Decoded:
    """Looks at the samples: none, silent, clipped."""
    if len(pcm) == 0:
        raise ShardError(f"{name}: no audio in it (0 samples)")
    if len(pcm) > 2 * MAX_SAMPLES:
        raise ShardError(f"{name}: {len(pcm) // 2} samples, at most {MAX_SAMPLES} fit an utterance; cut it")
    samples = np.frombuffer(pcm, "<i2")
    low, high = int(samples.min()), int(samples.max())
    if high - low <= 2:
        notes["silent"] = f"all {len(samples)} samples from {low} to {high}"
    elif "clipped" not in notes and (low == -32768 or high == 32767):
        railed = int(np.count_nonzero((samples == 32767) | (samples == -32768)))
        if railed > CLIPPED_SHARE * len(samples):
            notes["clipped"] = f"{railed} of {len(samples)} samples at full scale"
    return Decoded(pcm, notes)


@dataclass
class _Mono:
    """The mean of the channels, block by block, and what gets lost in it."""

    blocks: list[np.ndarray] = field(default_factory=list)
    frames: int = 0
    peak: float = 0.0
    power: float = 0.0  # sum of squares, mean of the channels
    kept: float = 0.0  # of their mean

    def add(self, block: np.ndarray, name: str) -> None:
        if not np.isfinite(block).all():
            first = self.frames + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            count = int(np.count_nonzero(~np.isfinite(block)))
            raise ShardError(f"{name}: {count} samples are NaN or infinite, the first at {first}; make the file again")
        mono = block.mean(axis=1)
        self.peak = max(self.peak, float(np.abs(block).max(initial=0)))
        self.power += float(np.square(block).mean(axis=1).sum())
        self.kept += float(np.square(mono).sum())
        self.blocks.append(mono)
        self.frames += len(block)


def _by_soundfile(data: bytes, kind: str, name: str, sample_rate: int, convert: bool, notes: dict[str, str]) -> bytes:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        rate, channels, subtype = file.samplerate, file.channels, file.subtype
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise ShardError(f"{name}: {rate} Hz, expected {LOWEST_RATE} to {HIGHEST_RATE} Hz: damaged?")
        problem = mismatch((rate, channels, subtype), sample_rate)
        if problem and not convert:
            raise ShardError(f"{name}: {problem}; convert it, or pack with --convert")
        frames = file.frames if file.frames < 2**62 else None
        if not problem:
            pieces = list(_blocks(file, "int16", kind, data, name))
            _check_count(sum(map(len, pieces)), frames, kind, name)
            return b"".join(np.ascontiguousarray(piece, "<i2").tobytes() for piece in pieces)
        mono = _Mono()
        for block in _blocks(file, "float64", kind, data, name):
            mono.add(block, name)
        _check_count(mono.frames, frames, kind, name)
    return _rounded(mono, (rate, channels, subtype), sample_rate, notes, name)


def _blocks(file: soundfile.SoundFile, dtype: str, kind: str, data: bytes, name: str) -> Iterator[np.ndarray]:
    """(frames, channels) blocks to the end of the file, whatever length it claims; FLAC is compared with the MD5 in its header."""
    # libsndfile gives 16-bit and wider integers as they are; floats read as integers would not be scaled.
    wide = {"PCM_16": "int16", "PCM_24": "int32"}.get(file.subtype) if kind == "FLAC" else None
    digest, total, expected = hashlib.md5(), 0, bytes(data[26:42])
    while len(block := file.read(BLOCK, dtype=wide or dtype, always_2d=True)):
        total += len(block)
        if total > LONGEST * file.samplerate:
            raise ShardError(f"{name}: longer than {LONGEST // 3600} hours; cut it")
        if wide == "int16":
            digest.update(block.tobytes())
        elif wide:
            digest.update((block >> 8).astype("<i4").reshape(-1, 1).view(np.uint8)[:, :3].tobytes())
        if wide and wide != dtype:
            block = block / float(2**15 if wide == "int16" else 2**31)
        yield block
        if len(block) < BLOCK:
            break  # to seek at the end of a FLAC of unknown length is an error
    if wide and any(expected) and digest.digest() != expected:
        raise ShardError(f"{name}: damaged: the MD5 of its samples is not the one in its header; get the file again")


def _check_count(found: int, promised: int | None, kind: str, name: str) -> None:
    if promised is not None and found != promised:
        raise ShardError(f"{name}: cut or damaged: its header promises {promised} samples, {found} are there")


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


def _rounded(mono: _Mono, found: tuple[int, int, str], sample_rate: int, notes: dict[str, str], name: str) -> bytes:
    """The mean of the channels at sample_rate in 16 bits, and what that took."""
    import soxr  # needed by few: 30 ms of imports

    rate, channels, subtype = found
    if mono.peak >= INTEGER_PEAK:
        raise ShardError(
            f"{name}: samples reach {mono.peak:g}, expected -1 to 1: integers stored as floats? Divide them by 32768"
        )
    done = []
    if channels != 1:
        done.append(f"mean of {channels} channels")
        if mono.power and mono.kept < CANCELLED_POWER * mono.power:
            left = 10 * np.log10(max(mono.kept / mono.power, 1e-12))
            notes["cancelled"] = f"the mean of its {channels} channels keeps {left:.0f} dB of their power"
    samples = np.concatenate(mono.blocks) if mono.blocks else np.empty(0)
    if rate != sample_rate and len(samples):
        done.append(f"{rate} Hz to {sample_rate} Hz")
        samples = soxr.resample(samples, rate, sample_rate, quality="VHQ")
    if subtype not in EXACT_SUBTYPES:
        done.append(f"{subtype} to 16 bits")
    samples = np.rint(samples * 32768)
    over = int(np.count_nonzero((samples > 32767) | (samples < -32768)))
    if over:
        notes["clipped"] = f"{over} of {len(samples)} samples over full scale, the highest {mono.peak:.3g}"
    notes["converted"] = ", ".join(done)
    return np.clip(samples, -32768, 32767).astype("<i2").tobytes()


def decode_ahead(sources: list[str], read: Callable[[int], bytes], sample_rate: int, convert: bool = False) -> Iterator:
    """Decoded of each source in turn, or the ShardError that it is. read(i): the bytes of sources[i].

    Files for ffmpeg are read AHEAD at a time and decoded by one process: starting it costs ten times as much as decoding 8 s of AAC.
    """
    for first in range(0, len(sources), AHEAD):
        chosen = range(first, min(first + AHEAD, len(sources)))
        wavs = _ahead([i for i in chosen if sources[i].lower().endswith(FFMPEG_ENDINGS)], sources, read)
        for i in chosen:
            try:
                if i in wavs:
                    yield _decode(wavs.pop(i), "WAV", sources[i], sample_rate, convert)
                else:
                    yield decode(read(i), sources[i], sample_rate, convert)
            except ShardError as error:
                yield error


def _ahead(wanted: list[int], sources: list[str], read: Callable[[int], bytes]) -> dict[int, bytes]:
    """WAVs of those that ffmpeg reads; none where one of them is bad: each is then decoded on its own, and says what is wrong."""
    files: dict[int, bytes] = {}
    for i in wanted:
        with contextlib.suppress(ShardError):
            data = read(i)
            if _checked_kind(data, sources[i]) in containers.BY_FFMPEG:
                files[i] = data
    with contextlib.suppress(ShardError):
        return dict(zip(files, ffmpeg_to_wavs(list(files.values()), [sources[i] for i in files]))) if files else {}
    return {}


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
    except (soundfile.SoundFileError, RuntimeError, ValueError, OSError) as error:
        raise ShardError(f"not readable as FLAC ({error})") from None
    if found != count:
        raise ShardError(f"found {found} samples at {start}, expected {count}")
