"""Any audio that a user has -> pieces of int16 at the network's rate, and what should be known before a score is believed.

A recording of at most WHOLE_SECONDS is one piece, as in evaluation. A longer one is cut into windows of WINDOW_SECONDS from
its beginning, the last of which ends where the recording ends; memory does not grow with its length.

    recording = open_audio("a.m4a", None, 16000)
    for piece in pieces(recording): ...             # (n,) int16
    recording.rate, recording.samples, recording.notes
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.audio import BLOCK, HIGHEST_RATE, LOWEST_RATE, Levels, Mono
from shards.recording import Recording
from spknet.errors import UserError

WHOLE_SECONDS, WINDOW_SECONDS = 60.0, 30.0
SHORT_SECONDS = 1.0  # what is shorter tells a network little about a voice
LOOKED_AT, LOOKED_AT_ONCE = 1 << 16, 1 << 11  # samples at its beginning, for its band; in one transform
NARROW_POWER = 1e-6  # of the power lies above half the band: 399 of 400 recordings of speech had 6e-5 or more


class AudioError(UserError):
    """What was given is no audio; the message says what it is and what was expected."""


class Samples:
    """Audio in memory: an array or tensor (samples,), or two-dimensional, where the shorter side is the channels.

    Floats are in [-1, 1]; integers are scaled by their type. rate: Hz. The same samples as a file give the same pieces.
    """

    def __init__(self, values: Any, rate: int | None, sample_rate: int, name: str):
        if rate is None:
            raise AudioError(f"{name}: an array does not say its sample rate; give it, for example rate={sample_rate}")
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise AudioError(f"{name}: rate={rate}, expected {LOWEST_RATE} to {HIGHEST_RATE} Hz")
        array = values.detach().cpu().float().numpy() if _is_tensor(values, floating=True) else np.asarray(values)
        if array.ndim not in (1, 2) or array.dtype.kind not in "iuf":
            raise AudioError(
                f"{name}: {array.dtype} of shape {array.shape}; expected numbers of shape (samples,) or (samples, channels)"
            )
        array = array[:, None] if array.ndim == 1 else array.T if array.shape[0] < array.shape[1] else array
        self._array = array  # (samples, channels)
        self.name, self.rate, self.sample_rate = name, int(rate), sample_rate
        self.notes, self._levels = {}, Levels()

    @property
    def samples(self) -> int:
        return self._levels.samples

    def blocks(self) -> Iterator[np.ndarray]:
        """(n,) int16, mono, at sample_rate. Raises ShardError for values that are no audio."""
        mono = Mono(self.rate, self.sample_rate, self.name)
        for start in range(0, len(self._array), BLOCK):
            yield self._levels.add(mono.add(_scaled(self._array[start : start + BLOCK])))
        yield self._levels.add(mono.rest())
        mono.note(self.notes, self._array.shape[1])
        self._levels.note(self.notes, self.name)


def _is_tensor(values: Any, floating: bool = False) -> bool:
    # Without importing torch: only its own tensors have both.
    found = hasattr(values, "detach") and hasattr(values, "is_floating_point")
    return found and (not floating or values.is_floating_point())


def _scaled(block: np.ndarray) -> np.ndarray:
    """float64 in [-1, 1]."""
    kind = block.dtype
    if kind.kind == "f":
        return block.astype(np.float64)
    half = 2.0 ** (8 * kind.itemsize - 1)
    return (block.astype(np.float64) - (half if kind.kind == "u" else 0)) / half


def open_audio(source: Any, rate: int | None, sample_rate: int, number: int = 0) -> Recording | Samples:
    """A path (str or PathLike; `a.zip::b.wav` too) or samples. number: its place in the list, for errors."""
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        if isinstance(name, str) and re.match(r"[A-Za-z][\w+.-]*://", name):
            raise AudioError(f"{name}: an address, expected a file; download it first, nothing is fetched from here")
        return Recording(os.fsdecode(name), sample_rate)
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return Samples(source, rate, sample_rate, f"array {number}")
    raise AudioError(
        f"{type(source).__name__} given for audio {number}; expected a path, a numpy array or a torch tensor, or a list of them"
    )


def pieces(recording: Recording | Samples) -> Iterator[np.ndarray]:
    """What is embedded of a recording, (n,) int16: all of it, or windows."""
    whole, size = (int(seconds * recording.sample_rate) for seconds in (WHOLE_SECONDS, WINDOW_SECONDS))
    held, windowed = np.empty(0, np.int16), False
    for block in recording.blocks():
        held = np.concatenate([held, block])
        while len(held) >= 2 * size and (windowed or len(held) > whole):
            windowed = True
            yield held[:size]
            held = held[size:]
    if windowed:  # between one and two windows are left
        yield held[:size]
        held = held[-size:] if len(held) > size else held[:0]
    if len(held):
        yield held


@dataclass(frozen=True)
class Heard:
    """What is known of a recording that was embedded."""

    name: str
    rate: int  # Hz, as it came
    seconds: float
    notes: dict[str, str]  # of shards.audio.NOTES, and `narrow`

    def doubts(self, sample_rate: int) -> list[str]:
        """Why a score of it should not be trusted. sample_rate: the network's, Hz."""
        said = []
        if self.seconds < SHORT_SECONDS:
            said.append(f"{self.name} is too short: {self.seconds:.2f} s, expected {SHORT_SECONDS:g} s or more")
        for word in ("silent", "clipped", "cancelled"):
            if word in self.notes:
                said.append(f"{self.name} is {word}: {self.notes[word]}")
        if self.rate < sample_rate:
            said.append(f"{self.name} is band-limited: {self.rate} Hz, the network was trained on {sample_rate} Hz")
        elif "narrow" in self.notes:
            said.append(f"{self.name} is band-limited: {self.notes['narrow']}")
        return said


def narrow(piece: np.ndarray, sample_rate: int) -> str | None:
    """Says so where a piece has no power above half the band, as a telephone call that was resampled; None else."""
    piece = piece[:LOOKED_AT].astype(np.float64)
    size = min(LOOKED_AT_ONCE, len(piece))
    frames = (piece - piece.mean())[: len(piece) // size * size].reshape(-1, size)
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(size)))).sum(axis=0)
    above = power[len(power) // 2 + len(power) // 16 :].sum()  # above the slope of the resampler's filter
    total = power.sum()
    return f"nothing above {sample_rate / 4:.0f} Hz" if total and above < NARROW_POWER * total else None
