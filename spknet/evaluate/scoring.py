"""Scores of trials from embeddings, block by block: memory does not grow with the number of trials.

    cosine          e.t / |e||t| of utterance vectors: the mean of an utterance's length-normalised crops; of a model, the
                    mean of its utterances' vectors; optionally minus the cohort's mean
    mean_distance   minus the mean Euclidean distance over all pairs of crops (voxceleb_trainer)
    AS-norm         1/2 [(s - mu_e)/sd_e + (s - mu_t)/sd_t], mean and deviation of each side's K highest cohort scores
                    (Matejka et al. 2017)

Each trial's score is computed from its own two rows alone, and swapping the sides gives the same bits.

    scores = cosine(unit(vectors), left, right)
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from spknet.errors import UserError
from spknet.evaluate.trials import TrialError, Trials

BLOCK = 4096  # trials of one block of cosines
PAIRS = 256  # trials of one block of crop distances
COHORT_BLOCK = 512  # utterances that meet the cohort at a time


class ScoringError(UserError):
    """Scores cannot be computed as asked; the message says what would work."""


def unit(rows: np.ndarray) -> np.ndarray:
    """Length-normalised along the last axis; rows of zeros stay zero. (..., D) -> (..., D)."""
    return torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(rows)), dim=-1).numpy()


def vectors(embeddings: np.ndarray) -> np.ndarray:
    """One vector an utterance: the mean of its length-normalised crops. (N, crops, D) -> (N, D)."""
    return unit(embeddings).mean(axis=1)


def enrol(trials: Trials, names: dict[str, int], rows: np.ndarray) -> np.ndarray:
    """The left sides' vectors: a model's is the mean of its utterances'. names: row of each utterance -> (models, D)."""
    out = np.empty((len(trials.models), rows.shape[1]), rows.dtype)
    for i, model in enumerate(trials.models):
        own = [names[u] for u in trials.utterances_of(model)]
        out[i] = rows[own[0]] if len(own) == 1 else rows[own].mean(axis=0)
    return out


def cosine(left_rows: np.ndarray, right_rows: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Inner products of unit rows. left, right: (n,) indices into left_rows (A, D) and right_rows (B, D) -> (n,)."""
    a, b = torch.from_numpy(left_rows), torch.from_numpy(right_rows)
    i, j = (torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64)) for index in (left, right))
    out = torch.empty(len(i), dtype=a.dtype)
    for start in range(0, len(i), BLOCK):
        block = slice(start, start + BLOCK)
        torch.sum(a.index_select(0, i[block]).mul_(b.index_select(0, j[block])), dim=1, out=out[block])
    return out.numpy()


def mean_distance(
    left_crops: np.ndarray, right_crops: np.ndarray, left: np.ndarray, right: np.ndarray, normalize: bool = False
) -> np.ndarray:
    """Minus the mean distance between all pairs of crops. left_crops: (A, crops, D); right_crops: (B, crops, D); left, right:
    (n,) -> (n,). normalize: crops are given length 1 first.

    ||a - b||^2 = |a|^2 + |b|^2 - 2 a.b, so the trials of one left side are one matrix product.
    """
    scores = np.empty(len(left), right_crops.dtype)
    order = np.argsort(left, kind="stable")
    lengths_a, factors_a = _lengths(left_crops, normalize)
    lengths_b, factors_b = (lengths_a, factors_a) if left_crops is right_crops else _lengths(right_crops, normalize)

    def score(part: np.ndarray) -> None:
        # A block's crops stay in the processor's cache between gathering and multiplying; no copy of all crops is made.
        gathered = np.empty((min(PAIRS, len(part)), *right_crops.shape[1:]), right_crops.dtype)
        for start in range(0, len(part), PAIRS):
            trials = part[start : start + PAIRS]
            a, b = left[trials], right[trials]
            squared = _products(left_crops, right_crops, a, b, gathered[: len(trials)])
            squared *= (-2 * factors_a[a])[:, None, :]
            squared *= factors_b[b][:, :, None]
            squared += lengths_a[a][:, None, :]
            squared += lengths_b[b][:, :, None]
            np.maximum(squared, 0, out=squared)
            scores[trials] = -np.sqrt(squared, out=squared).reshape(len(trials), -1).mean(axis=1)

    # numpy lets go of the interpreter inside a call. Products this small gain nothing from threads of their own, which would
    # only wait for each other's.
    threads = torch.get_num_threads()
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(score, np.array_split(order, threads)))
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


def check_top(top: int, cohort: int) -> None:
    """Raises ScoringError where the top K of AS-norm does not fit a cohort of so many speakers."""
    if not 2 <= top <= cohort:
        raise ScoringError(
            f"AS-norm over the top {top} of a cohort of {cohort} speakers; give a number from 2 to {cohort}"
        )


def cohort_statistics(rows: np.ndarray, cohort: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each row's `top` highest cosines with the cohort. rows (N, D), cohort (C, D), both unit
    -> two (N,) float64. Raises ScoringError where top does not fit the cohort or a deviation is zero."""
    check_top(top, len(cohort))
    mean, deviation = np.empty(len(rows)), np.empty(len(rows))
    others = torch.from_numpy(cohort).T.contiguous()
    for start in range(0, len(rows), COHORT_BLOCK):
        scores = torch.from_numpy(rows[start : start + COHORT_BLOCK]) @ others
        best = scores.topk(top, dim=1, sorted=False).values.double().numpy()
        mean[start : start + COHORT_BLOCK] = best.mean(axis=1)
        deviation[start : start + COHORT_BLOCK] = best.std(axis=1)
    if not (deviation > 0).all():
        raise ScoringError(
            f"utterance {int(np.argmin(deviation))}: all {top} cohort scores are equal; is the cohort of one speaker?"
        )
    return mean, deviation


def as_norm(scores, left_statistics, right_statistics, left, right) -> np.ndarray:
    """Adaptive symmetric normalisation of (n,) scores, given each side's (mean, deviation) from cohort_statistics."""
    (mean_e, deviation_e), (mean_t, deviation_t) = left_statistics, right_statistics
    out = np.array(scores, dtype=np.float64)
    for start in range(0, len(out), BLOCK):
        s, e, t = (values[start : start + BLOCK] for values in (out, left, right))
        s[:] = 0.5 * ((s - mean_e[e]) / deviation_e[e] + (s - mean_t[t]) / deviation_t[t])
    return out


def check_finite(scores: np.ndarray, trials: Trials) -> None:
    """Raises TrialError naming the first trial whose score is not a finite number."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise TrialError(
            f"{trials.describe(bad[0])}: the score is {scores[bad[0]]} (and {len(bad) - 1} more); expected a finite number:"
            " did training diverge, or is an utterance silent?"
        )
