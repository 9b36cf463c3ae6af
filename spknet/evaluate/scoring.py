"""Scores of trials from embeddings, block by block: memory does not grow with the number of trials. numpy alone.

    cosine          e.t / |e||t| of utterance vectors: the mean of an utterance's crops; of a model, the mean of its utterances'
    mean_distance   minus the mean Euclidean distance over all pairs of crops (voxceleb_trainer)

Each trial's score is computed from its own two rows alone, and swapping the sides gives the same bits.

    scores = cosine(unit(rows), unit(rows), left, right)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from spknet.errors import UserError

BLOCK = 128  # trials of one block of cosines: both sides stay in the processor's cache
PAIRS = 256  # trials of one block of crop distances


class ScoringError(UserError):
    """Scores cannot be computed as asked; the message says what would work."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings (utterances, crops, D), the row of each name, and the utterances' lengths in samples at sample_rate (Hz)."""

    embeddings: np.ndarray
    rows: dict[str, int]
    samples: np.ndarray
    sample_rate: int = 16000

    @property
    def seconds(self) -> np.ndarray:
        return self.samples / self.sample_rate

    def sides(self, trials, values: np.ndarray, together=np.mean) -> tuple[np.ndarray, np.ndarray]:
        """A quantity of utterances for the left and the right of each trial; together: what makes a model's of several."""
        models = [together(values[[self.rows[u] for u in trials.utterances_of(m)]]) for m in trials.models]
        tests = [values[self.rows[t]] for t in trials.tests]
        return np.array(models)[trials.left], np.array(tests)[trials.right]

    def magnitudes(self) -> np.ndarray:
        """Mean length of each utterance's embeddings before normalisation."""
        return np.linalg.norm(self.embeddings, axis=-1).mean(axis=1)


def unit(rows: np.ndarray, threads: int = 0) -> np.ndarray:
    """Length-normalised along the last axis; rows of zeros stay zero. (..., D) -> (..., D)."""
    flat = rows.reshape(-1, rows.shape[-1])
    out = np.empty_like(flat)

    def normalize(blocks: list[slice]) -> None:
        for block in blocks:
            own = flat[block].astype(np.float64)
            out[block] = own / np.maximum(np.sqrt(np.einsum("nd,nd->n", own, own)), 1e-12)[:, None]

    if len(flat) <= BLOCK:  # threads would cost 100 times as much as the work
        normalize([slice(len(flat))])
    else:
        in_blocks(len(flat), BLOCK, threads, normalize)
    return out.reshape(rows.shape)


def vectors(embeddings: np.ndarray, normalize: bool = True) -> np.ndarray:
    """One vector an utterance: the mean of its crops, each given length 1 first unless not normalize. (N, crops, D) -> (N, D)."""
    return (unit(embeddings) if normalize else embeddings).mean(axis=1)


def enrol(trials, names: dict[str, int], rows: np.ndarray) -> np.ndarray:
    """The left sides' vectors: a model's is the mean of its utterances'. names: row of each utterance -> (models, D)."""
    out = np.empty((len(trials.models), rows.shape[1]), rows.dtype)
    for i, model in enumerate(trials.models):
        own = [names[u] for u in trials.utterances_of(model)]
        out[i] = rows[own[0]] if len(own) == 1 else rows[own].mean(axis=0)
    return out


def in_blocks(count: int, size: int, threads: int, work: Callable[[list[slice]], None]) -> None:
    """work(blocks of `size` of `count` items) on `threads` threads (0: as OMP_NUM_THREADS says, else one a core).

    numpy lets go of the interpreter inside a call. BLAS gets one thread: on blocks this small its own would only wait for
    each other. Blocks do not depend on the threads, so the bits do not either.
    """
    threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0").split(",")[0]) or len(os.sched_getaffinity(0))
    every = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    shares = [every[i * len(every) // threads : (i + 1) * len(every) // threads] for i in range(threads)]
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, shares))


def cosine(left_rows: np.ndarray, right_rows: np.ndarray, left, right, threads: int = 0) -> np.ndarray:
    """Inner products of unit rows, summed in float64. left, right: (n,) indices into left_rows (A, D) and right_rows (B, D)
    -> (n,)."""
    out = np.empty(len(left), np.result_type(left_rows, right_rows))

    def score(blocks: list[slice]) -> None:
        a, b = (np.empty((BLOCK, left_rows.shape[1])) for _ in range(2))
        for block in blocks:
            n = block.stop - block.start
            a[:n], b[:n] = left_rows[left[block]], right_rows[right[block]]
            out[block] = np.einsum("nd,nd->n", a[:n], b[:n])

    in_blocks(len(out), BLOCK, threads, score)
    return out


def mean_distance(
    left_crops: np.ndarray, right_crops: np.ndarray, left, right, normalize: bool = False, threads: int = 0
) -> np.ndarray:
    """Minus the mean distance between all pairs of crops. left_crops: (A, crops, D); right_crops: (B, crops, D); left, right:
    (n,) -> (n,). normalize: crops are given length 1 first.

    ||a - b||^2 = |a|^2 + |b|^2 - 2 a.b, so the trials of one left side are one matrix product.
    """
    scores = np.empty(len(left), right_crops.dtype)
    order = np.argsort(left, kind="stable")
    lengths_a, factors_a = _lengths(left_crops, normalize)
    lengths_b, factors_b = (lengths_a, factors_a) if left_crops is right_crops else _lengths(right_crops, normalize)

    def score(blocks: list[slice]) -> None:
        # A block's crops stay in the processor's cache between gathering and multiplying; no copy of all crops is made.
        gathered = np.empty((PAIRS, *right_crops.shape[1:]), right_crops.dtype)
        for trials in (order[block] for block in blocks):
            a, b = left[trials], right[trials]
            squared = _products(left_crops, right_crops, a, b, gathered[: len(trials)])
            squared *= (-2 * factors_a[a])[:, None, :]
            squared *= factors_b[b][:, :, None]
            squared += lengths_a[a][:, None, :]
            squared += lengths_b[b][:, :, None]
            np.maximum(squared, 0, out=squared)
            scores[trials] = -np.sqrt(squared, out=squared).reshape(len(trials), -1).mean(axis=1)

    in_blocks(len(order), PAIRS, threads, score)
    return scores


def _lengths(crops: np.ndarray, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Squared lengths of crops as they are compared, and what a crop is multiplied by before; crops of zeros stay zero."""
    squared = np.einsum("acd,acd->ac", crops, crops)
    if not normalize:
        return squared, np.ones_like(squared)
    return (squared > 0).astype(squared.dtype), 1 / np.sqrt(np.where(squared > 0, squared, 1))


def _products(left_crops, right_crops, left: np.ndarray, right: np.ndarray, gathered: np.ndarray) -> np.ndarray:
    """Inner products of all pairs of crops, (n, right crops, left crops), for trials in the order of their left sides.
    gathered: (n, right crops, D), overwritten."""
    right_crops.take(right, axis=0, out=gathered, mode="clip")
    out = np.empty((len(left), right_crops.shape[1], left_crops.shape[1]), right_crops.dtype)
    cuts = np.flatnonzero(np.diff(left, prepend=-1, append=-1))
    for start, stop in zip(cuts[:-1], cuts[1:]):
        others = gathered[start:stop].reshape(-1, gathered.shape[2])
        np.matmul(others, left_crops[left[start]].T, out=out[start:stop].reshape(-1, out.shape[2]))
    return out
