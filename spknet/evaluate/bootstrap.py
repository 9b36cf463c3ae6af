"""95 % intervals of error rates by bootstrap over speakers.

Trials of one speaker are not independent, so speakers are drawn, not trials: with c_s the number of times that speaker s
was drawn (S draws with replacement of S speakers), a target trial of s counts c_s times and a non-target trial of a and b
c_a * c_b times. Scores are sorted once; a replicate is two cumulative sums over them.

minDCF only needs thresholds at targets' scores: between two of them, raising the threshold only drops false alarms. EER is
found by bisection, since FNR - FPR rises with the threshold.

    low, high = intervals(replicate(scores, labels, speakers_left, speakers_right, 1000))["eer"]
"""

from __future__ import annotations

import numpy as np

from spknet import rng
from spknet.evaluate.metrics import PRIORS

REPLICATES = 1000  # of published intervals
NAMES = ("eer", *(f"min_dcf_{name}" for name in PRIORS))


class Resampled:
    """One list sorted once, to be weighted many times. left, right: (n,) speaker numbers below `speakers`."""

    def __init__(self, scores: np.ndarray, labels: np.ndarray, left: np.ndarray, right: np.ndarray):
        labels = np.asarray(labels).astype(bool)
        targets, nontargets = (np.flatnonzero(where) for where in (labels, ~labels))
        targets = targets[np.argsort(scores[targets])]
        nontargets = nontargets[np.argsort(scores[nontargets])]
        self.target, self.left, self.right = left[targets], left[nontargets], right[nontargets]
        target_scores, nontarget_scores = scores[targets], scores[nontargets]
        self.at = np.unique(np.concatenate([target_scores, nontarget_scores]))
        # Trials below each threshold, of all thresholds (EER) and of those at a target's score or above all (minDCF).
        self.targets_below = np.append(np.searchsorted(target_scores, self.at), len(targets))
        self.nontargets_below = np.append(np.searchsorted(nontarget_scores, self.at), len(nontargets))
        corners = np.append(np.searchsorted(self.at, np.unique(target_scores)), len(self.at))
        self.corner_targets, self.corner_nontargets = self.targets_below[corners], self.nontargets_below[corners]

    def figures(self, counts: np.ndarray) -> list[float]:
        """EER in percent and minDCFs with speakers counted `counts` (S,) times; NaN without targets or non-targets."""
        misses = np.concatenate([[0], np.cumsum(counts[self.target])])
        rejected = np.concatenate([[0], np.cumsum(counts[self.left] * counts[self.right])])
        targets, nontargets = misses[-1], rejected[-1]
        if targets == 0 or nontargets == 0:
            return [np.nan] * len(NAMES)
        fnr = misses[self.corner_targets] / targets
        fpr = (nontargets - rejected[self.corner_nontargets]) / nontargets
        found = [self._eer(misses, rejected)]
        return found + [float((p * fnr + (1 - p) * fpr).min() / min(p, 1 - p)) for p in PRIORS.values()]

    def _eer(self, misses: np.ndarray, rejected: np.ndarray) -> float:
        def point(i: int) -> tuple[float, float]:
            below, passed = misses[self.targets_below[i]], rejected[-1] - rejected[self.nontargets_below[i]]
            return below / misses[-1], passed / rejected[-1]

        low, high = 0, len(self.at)  # FNR - FPR is -1 at the first point and 1 at the last
        while high - low > 1:
            middle = (low + high) // 2
            fnr, fpr = point(middle)
            low, high = (low, middle) if fnr >= fpr else (middle, high)
        (fnr_0, fpr_0), (fnr_1, fpr_1) = point(low), point(high)
        share = (fpr_0 - fnr_0) / ((fpr_0 - fnr_0) + (fnr_1 - fpr_1))
        return 100.0 * float(fnr_0 + share * (fnr_1 - fnr_0))


def draw(speakers: int, replicates: int, seed: int) -> np.ndarray:
    """(replicates, speakers) int64: how often each speaker is drawn. The same for every system, hence paired."""
    chosen = rng.stream(seed, 0, "bootstrap").integers(speakers, size=(replicates, speakers))
    return np.stack([np.bincount(row, minlength=speakers) for row in chosen])


def replicate(scores, labels, left, right, replicates: int = REPLICATES, seed: int = 0) -> np.ndarray:
    """Figures of each replicate. left, right: (n,) speaker numbers of the trials' sides -> (replicates, len(NAMES))."""
    resampled = Resampled(np.asarray(scores), labels, left, right)
    speakers = int(max(left.max(), right.max())) + 1
    return np.array([resampled.figures(counts) for counts in draw(speakers, replicates, seed)])


def intervals(figures: np.ndarray, level: float = 0.95) -> dict[str, list[float]]:
    """{name: [low, high]} by percentiles. figures: (replicates, len(NAMES)); replicates without both classes are left out."""
    outside = 50 * (1 - level)
    bounds = np.nanpercentile(figures, [outside, 100 - outside], axis=0)
    return {name: [float(low), float(high)] for name, (low, high) in zip(NAMES, bounds.T)}
