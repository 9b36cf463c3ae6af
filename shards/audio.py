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
from typing import NamedTuple

import numpy as np
import soundfile

from shards import containers, flac, headers, mpeg, wav
from shards.archive import read_source
from shards.errors import UserError
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
    with telling(name):
        kind = checked_kind(data, name)
        if kind in containers.BY_FFMPEG:
            [data], kind = ffmpeg_to_wavs([data], [name]), "WAV"
        return _decode(data, kind, name, sample_rate, convert)


@contextlib.contextmanager
def telling(name: str) -> Iterator[None]:
    """Whatever a decoder raises becomes a ShardError that names the file."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise ShardError(f"{name}: too long for this machine's memory; cut it") from None
    except soundfile.LibsndfileError as error:  # its own text begins with a Python object
        raise ShardError(f"{name}: not readable as audio ({error.error_string.rstrip('.')}); get it again") from None
    except Exception as error:  # decoders raise whatever they like: ValueError, RuntimeError, struct.error, ...
        raise ShardError(f"{name}: not readable as audio ({type(error).__name__}: {error})") from None


def checked_kind(data: bytes, name: str) -> str:
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
        tell_stray(found, notes)
        if found.is_pcm16 and (found.rate, found.channels) == (sample_rate, 1):
            pcm = memoryview(data)[found.offset : found.offset + found.nbytes]
            return Decoded(pcm, _noted(iter([np.frombuffer(pcm, "<i2")]), notes, name))
        data = found.header + memoryview(data)[found.offset : found.offset + found.nbytes]
    if kind in LENGTHENED:
        data = LENGTHENED[kind](data, name)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        blocks = list(pcm_blocks(file, (kind, data[:42], name), sample_rate, convert, notes))
    return Decoded(b"".join(block.tobytes() for block in blocks), _noted(iter(blocks), notes, name))


def tell_stray(found: wav.Wave, notes: dict[str, str]) -> None:
    if found.stray:
        notes["trimmed"] = f"{found.stray} bytes at its end that are no whole sample"


class Levels:
    """Looks at samples as they pass: none, silent, clipped."""

    def __init__(self):
        self.samples, self.low, self.high, self.railed = 0, 32767, -32768, 0

    def add(self, block: np.ndarray) -> np.ndarray:
        """block: (n,) int16; returned as it is."""
        if len(block):
            low, high = int(block.min()), int(block.max())
            self.samples, self.low, self.high = self.samples + len(block), min(self.low, low), max(self.high, high)
            if low == -32768 or high == 32767:
                self.railed += int(np.count_nonzero((block == 32767) | (block == -32768)))
        return block

    def note(self, notes: dict[str, str], name: str) -> None:
        """Adds to the notes of a recording that is over. Raises ShardError where it has no samples, or too many."""
        if self.samples == 0:
            raise ShardError(f"{name}: no audio in it (0 samples)")
        if self.samples > MAX_SAMPLES:
            raise ShardError(f"{name}: {self.samples} samples, at most {MAX_SAMPLES} fit an utterance; cut it")
        if self.high - self.low <= 2:
            notes["silent"] = f"all {self.samples} samples from {self.low} to {self.high}"
        elif "clipped" not in notes and self.railed > CLIPPED_SHARE * self.samples:
            notes["clipped"] = f"{self.railed} of {self.samples} samples at full scale"


def _noted(blocks: Iterator[np.ndarray], notes: dict[str, str], name: str) -> dict[str, str]:
    levels = Levels()
    for block in blocks:
        levels.add(block)
    levels.note(notes, name)
    return notes


class Mono:
    """The mean of the channels at sample_rate in 16 bits, block by block, and what gets lost in it."""

    def __init__(self, rate: int, sample_rate: int, name: str):
        self.name, self.frames, self.samples, self.over, self.peak = name, 0, 0, 0, 0.0
        self.power, self.kept = 0.0, 0.0  # sums of squares: the channels' mean one, their mean's
        self.resampler = None
        if rate != sample_rate:
            import soxr  # needed by few: 30 ms of imports

            self.resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float64", quality="VHQ")

    def add(self, block: np.ndarray) -> np.ndarray:
        """(frames, channels) float64 -> the samples that are ready, int16. Raises ShardError for what is no audio."""
        if not np.isfinite(block).all():
            first = self.frames + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            count = int(np.count_nonzero(~np.isfinite(block)))
            raise ShardError(
                f"{self.name}: {count} samples are NaN or infinite, the first at {first}; make the file again"
            )
        self.peak = max(self.peak, float(np.abs(block).max(initial=0)))
        if self.peak >= INTEGER_PEAK:
            raise ShardError(
                f"{self.name}: samples reach {self.peak:g}, expected -1 to 1: integers stored as floats? Divide them by 32768"
            )
        mono = block.mean(axis=1)
        self.power += float(np.square(block).mean(axis=1).sum())
        self.kept += float(np.square(mono).sum())
        self.frames += len(block)
        return self._rounded(mono if self.resampler is None else self.resampler.resample_chunk(mono))

    def rest(self) -> np.ndarray:
        """What is left when all blocks are in."""
        if self.resampler is None or not self.frames:
            return np.empty(0, "<i2")
        return self._rounded(self.resampler.resample_chunk(np.empty(0), last=True))

    def _rounded(self, samples: np.ndarray) -> np.ndarray:
        samples = np.rint(samples * 32768)
        self.samples += len(samples)
        self.over += int(np.count_nonzero((samples > 32767) | (samples < -32768)))
        return np.clip(samples, -32768, 32767).astype("<i2")

    def note(self, notes: dict[str, str], channels: int) -> None:
        if channels != 1 and self.power and self.kept < CANCELLED_POWER * self.power:
            left = 10 * np.log10(max(self.kept / self.power, 1e-12))
            notes["cancelled"] = f"the mean of its {channels} channels keeps {left:.0f} dB of their power"
        if self.over:
            notes["clipped"] = f"{self.over} of {self.samples} samples over full scale, the highest {self.peak:.3g}"


def pcm_blocks(
    file: soundfile.SoundFile, what: tuple[str, bytes, str], sample_rate: int, convert: bool, notes: dict[str, str]
) -> Iterator[np.ndarray]:
    """int16 blocks of an open file, mono at sample_rate. what: container, first bytes, name. notes: complete at the end."""
    kind, head, name = what
    rate, channels, subtype = file.samplerate, file.channels, file.subtype
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise ShardError(f"{name}: {rate} Hz, expected {LOWEST_RATE} to {HIGHEST_RATE} Hz: damaged?")
    problem = mismatch((rate, channels, subtype), sample_rate)
    if problem and not convert:
        raise ShardError(f"{name}: {problem}; convert it, or pack with --convert")
    promised, frames = file.frames if file.frames < 2**62 else None, 0
    mono = Mono(rate, sample_rate, name) if problem else None
    for block in _blocks(file, "float64" if problem else "int16", kind, head, name):
        frames += len(block)
        yield mono.add(block) if mono else np.ascontiguousarray(block[:, 0], "<i2")
    _check_count(frames, promised, kind, name)
    if mono:
        yield mono.rest()
        mono.note(notes, channels)
        done = [f"mean of {channels} channels"] * (channels != 1)
        done += [f"{rate} Hz to {sample_rate} Hz"] * (rate != sample_rate and frames > 0)
        done += [f"{subtype} to 16 bits"] * (subtype not in EXACT_SUBTYPES)
        notes["converted"] = ", ".join(done)


def _blocks(file: soundfile.SoundFile, dtype: str, kind: str, head: bytes, name: str) -> Iterator[np.ndarray]:
    """(frames, channels) blocks to the end of the file, whatever length it claims; FLAC is compared with the MD5 in its header."""
    # libsndfile gives 16-bit and wider integers as they are; floats read as integers would not be scaled.
    wide = {"PCM_16": "int16", "PCM_24": "int32"}.get(file.subtype) if kind == "FLAC" else None
    digest, total, expected = hashlib.md5(), 0, bytes(head[26:42])
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
            if checked_kind(data, sources[i]) in containers.BY_FFMPEG:
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
