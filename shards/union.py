"""Several packed data sets as one: rows laid end to end, speakers told apart by data set or united by name.

Usage: joined = join([open_index("data/shards/vox1"), open_index("data/shards/vox2")], unite_speakers=False)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from shards.format import ShardError
from shards.index import Index


@dataclass
class Joined:
    """speakers (S,) S; labels (S,) u32; speaker_rows (S + 1,) u64; samples (N,) u32; first_row (sets + 1,) i64.

    order: None, or (N,) i64: where row i lies in the sets laid end to end; only united speakers need it.
    """

    speakers: np.ndarray
    labels: np.ndarray
    speaker_rows: np.ndarray
    samples: np.ndarray
    first_row: np.ndarray
    order: np.ndarray | None
    fingerprint: str


def join(indexes: list[Index], unite_speakers: bool) -> Joined:
    """Raises ShardError where rates differ, or where two folders have the same name and speakers are told apart by it."""
    first_row = np.cumsum([0] + [len(i.rows) for i in indexes])
    if len(indexes) == 1:
        one = indexes[0]
        samples = one.rows["samples"]
        return Joined(one.speakers, one.labels, one.speaker_rows, samples, first_row, None, one.meta["fingerprint"])
    for opened in indexes[1:]:
        if opened.sample_rate != indexes[0].sample_rate:
            raise ShardError(
                f"{opened.folder} has {opened.sample_rate} Hz, {indexes[0].folder} has {indexes[0].sample_rate} Hz; "
                "pack one of them again at the other's rate"
            )
    samples = np.concatenate([i.rows["samples"] for i in indexes])
    speaker_rows = np.concatenate([[0]] + [i.speaker_rows[1:] + first for i, first in zip(indexes, first_row)])
    first_label = np.cumsum([0] + [len(i.speakers) for i in indexes])
    labels = np.concatenate([i.labels + np.uint32(first) for i, first in zip(indexes, first_label)])
    prints = "".join(i.meta["fingerprint"] for i in indexes) + str(unite_speakers)
    fingerprint = hashlib.sha256(prints.encode()).hexdigest()
    if not unite_speakers:
        speakers = np.concatenate(
            [np.char.add(f"{name}/".encode(), i.speakers) for name, i in zip(_names(indexes), indexes)]
        )
        return Joined(speakers, labels, speaker_rows.astype(np.uint64), samples, first_row, None, fingerprint)
    names = np.concatenate([i.speakers for i in indexes])
    return _united(names, labels, speaker_rows.astype(np.int64), samples, first_row, fingerprint)


def _names(indexes: list[Index]) -> list[str]:
    names = [i.folder.resolve().name for i in indexes]
    if len(set(names)) != len(names):
        raise ShardError(
            f"two of the data sets have the same folder name ({', '.join(names)}); rename one, or unite speakers"
        )
    return names


def _united(names, labels, speaker_rows, samples, first_row, fingerprint) -> Joined:
    # A speaker has the label of the first set that has the speaker; the numbers are then closed up.
    speakers, first, which = np.unique(names, return_index=True, return_inverse=True)
    rank = np.empty(len(speakers), np.uint32)
    rank[np.argsort(labels[first])] = np.arange(len(speakers))
    counts = np.diff(speaker_rows)
    speaker_of_row = np.repeat(which, counts)
    order = np.argsort(speaker_of_row, kind="stable")
    bounds = np.zeros(len(speakers) + 1, np.uint64)
    np.cumsum(np.bincount(speaker_of_row, minlength=len(speakers)), out=bounds[1:])
    return Joined(speakers, rank, bounds, samples[order], first_row, order, fingerprint)
