"""What training asks of its audio, whether it lies in shards or in loose files.

The readers (shards.reader, shards.loose) are built on this module and know nothing of each other.

Usage: def plan(utterances: Utterances): utterances.read_batch(rows, starts, out)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np


class Utterances(Protocol):
    """N utterances of S speakers; the rows of a speaker are contiguous.

    sample_rate: Hz; speakers: S names; labels: (S,) u32; speaker_rows: (S + 1,) u64, rows of speaker s are [p[s], p[s + 1]);
    samples: (N,) lengths in PCM samples; fingerprint: hex, of names, lengths and labels (for shards also of the content), not of paths.
    Picklable, and usable in forked processes and in threads.
    """

    sample_rate: int
    speakers: Sequence[str]
    labels: np.ndarray
    speaker_rows: np.ndarray
    samples: np.ndarray
    fingerprint: str
    remarks: list[str]  # what a user should know of how they were found

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """The key of a row, as it was packed."""

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """(n,) int64 rows of keys, -1 where there is none."""

    def read_utterance(self, row: int) -> np.ndarray:
        """(samples,) int16, the whole utterance. Raises ShardError."""

    def read_batch(self, rows: np.ndarray, starts: np.ndarray, out: np.ndarray) -> None:
        """Fills out[i] with the samples of utterance rows[i] from starts[i] on.

        rows, starts: (n,) integers; out: (n, samples) int16, C-contiguous. An utterance shorter than the crop is
        repeated, from `start` taken modulo its length. Raises ShardError for damage, ValueError for a crop out of bounds.
        """


class Names(Sequence):
    """Byte strings of an array as text, decoded when asked for. array: (n,) S."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name in self.array.tolist())  # one by one they take ten times as long

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [name.decode() for name in self.array[i].tolist()]
        return bytes(self.array[i]).decode()


def as_batch(rows: np.ndarray, starts: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """rows and starts as int64. Raises ValueError where `out` cannot take the crops."""
    rows, starts = np.asarray(rows, np.int64), np.asarray(starts, np.int64)
    if out.dtype != np.int16 or out.ndim != 2 or len(out) != len(rows) or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} {out.shape}, expected contiguous int16 ({len(rows)}, samples)")
    return rows, starts


def check_rows(rows: np.ndarray, n: int) -> None:
    """Raises IndexError where a row is not one of n."""
    if len(rows) and not (rows.min() >= 0 and rows.max() < n):
        raise IndexError(f"rows from {rows.min()} to {rows.max()}, there are {n}")


def check_bounds(rows: np.ndarray, starts: np.ndarray, samples: np.ndarray, length: int) -> None:
    """Raises ValueError naming the first crop that its utterance does not hold; shorter utterances hold any crop."""
    outside = (starts < 0) | ((samples >= length) & (starts + length > samples))
    if outside.any():
        i = int(outside.argmax())
        raise ValueError(f"row {rows[i]} has {samples[i]} samples; no crop of {length} from {starts[i]}")


def repeated(whole: np.ndarray, start: int, length: int) -> np.ndarray:
    """(length,) samples of an utterance that is shorter than the crop: repeated, from `start` modulo its length."""
    return np.resize(np.roll(whole, -(start % len(whole))), length)


def search_sorted(keys: np.ndarray, names: list[bytes]) -> np.ndarray:
    """(n,) int64 positions of names in sorted keys, -1 where there is none."""
    # A name that is wider than the keys would make numpy copy all keys to its width.
    width = keys.dtype.itemsize
    fits = np.array([len(name) <= width and b"\0" not in name for name in names], bool)
    wanted = np.array([name if ok else b"" for name, ok in zip(names, fits)], keys.dtype)
    rows = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(fits & (keys[rows] == wanted), rows, -1)
