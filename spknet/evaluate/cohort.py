"""A cohort: one mean vector for each of some speakers, and what trials' sides have to do with it. numpy alone.

AS-norm    1/2 [(s - mu_e)/sd_e + (s - mu_t)/sd_t], mean and (biased) deviation of each side's K highest cohort scores
           (Matejka et al. 2017)

mean, deviation = statistics(unit_rows, unit_cohort, 300)
"""

from __future__ import annotations

import numpy as np

from spknet.evaluate import scoring
from spknet.evaluate.scoring import ScoringError

ROWS = 128  # utterances that meet the cohort at a time
TRIALS = 4096  # trials normalised at a time


def speaker_means(embeddings: np.ndarray, speakers: np.ndarray, normalize: bool = True) -> np.ndarray:
    """(utterances, crops, D) and the speaker number of each -> (speakers, D), means of the utterances' vectors."""
    rows = scoring.vectors(embeddings, normalize)
    sums = np.zeros((speakers.max() + 1, rows.shape[1]), rows.dtype)
    np.add.at(sums, speakers, rows)
    return sums / np.bincount(speakers)[:, None].astype(rows.dtype)


def spread(there: int, wanted: int) -> list[int]:
    """At most `wanted` of `there` positions, evenly over them."""
    return [int(i) for i in np.linspace(0, there - 1, min(wanted, there)).round()]


def check_top(top: int, cohort: int) -> None:
    """Raises ScoringError where the top K of AS-norm does not fit a cohort of so many speakers."""
    if not 2 <= top <= cohort:
        raise ScoringError(
            f"AS-norm over the top {top} of a cohort of {cohort} speakers; give a number from 2 to {cohort}"
        )


def statistics(rows: np.ndarray, cohort: np.ndarray, top: int, threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each row's `top` highest cosines with the cohort. rows (N, D), cohort (C, D), both unit
    -> two (N,) float64. Raises ScoringError where top does not fit the cohort or a deviation is zero."""
    check_top(top, len(cohort))
    mean, deviation = np.empty(len(rows)), np.empty(len(rows))
    others = np.ascontiguousarray(cohort.T)

    def measure(blocks: list[slice]) -> None:
        scores = np.empty((ROWS, len(cohort)), np.result_type(rows, cohort))
        for block in blocks:
            own = np.matmul(rows[block], others, out=scores[: block.stop - block.start])
            own.partition(len(cohort) - top, axis=1)
            best = own[:, -top:].astype(np.float64)
            mean[block], deviation[block] = best.mean(axis=1), best.std(axis=1)

    scoring.in_blocks(len(rows), ROWS, threads, measure)
    if not (deviation > 0).all():
        raise ScoringError(
            f"utterance {int(np.argmin(deviation))}: all {top} cohort scores are equal; is the cohort of one speaker?"
        )
    return mean, deviation


def as_norm(scores, left_statistics, right_statistics, left, right) -> np.ndarray:
    """Adaptive symmetric normalisation of (n,) scores, given each side's (mean, deviation) from statistics()."""
    (mean_e, deviation_e), (mean_t, deviation_t) = left_statistics, right_statistics
    out = np.array(scores, dtype=np.float64)
    for start in range(0, len(out), TRIALS):
        s, e, t = (values[start : start + TRIALS] for values in (out, left, right))
        s[:] = 0.5 * ((s - mean_e[e]) / deviation_e[e] + (s - mean_t[t]) / deviation_t[t])
    return out
