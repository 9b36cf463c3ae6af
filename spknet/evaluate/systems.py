"""Every way of scoring a list from the same embeddings, each building on the one before. numpy alone.

    cosine | mean_distance  ->  mean-subtracted  ->  AS-norm  ->  calibrated

The cohort is one mean vector for each of some speakers (normally those of training); calibration is learned on development
trials. PRESETS are what published figures are made with.

    system = System(top=300, cohort=means).learned(dev_trials, embedded); system.scores(trials, embedded)["calibrated"]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from spknet.evaluate import cohort as cohorts
from spknet.evaluate import scoring
from spknet.evaluate.calibration import LOGS, LONGEST, MEASURES, Calibration, features, fit
from spknet.evaluate.scoring import Embedded, ScoringError

TOP = 300  # of AS-norm in published figures


@dataclass(frozen=True)
class System:
    """How trials are scored. Errors: `check` and `scores` raise ScoringError.

    cohort: (speakers, D) mean vectors of spknet.evaluate.cohort.speaker_means with the same `normalize`; where
    spknet.evaluate.evaluation.evaluate embeds, also a spknet.evaluate.lists.Cohort that says which utterances to take, or the
    path of a run, whose training data are then the cohort.
    """

    score: str = "cosine"  # cosine, or mean_distance (voxceleb_trainer)
    normalize: bool = True  # every crop's embedding is given length 1 before anything else
    cohort: np.ndarray | object | None = None
    top: int = 0  # AS-norm over so many of a side's highest cohort scores; 0: none
    subtract_mean: bool = False  # the cohort's mean is taken from every vector
    decimals: int | None = None  # AS-norm starts from cosines rounded to so many decimals
    qualities: tuple[str, ...] = ()  # of spknet.evaluate.calibration.QUALITIES
    calibration: Calibration | bool = False  # True: to be learned on development trials
    threads: int = 0  # of the processor; 0: as OMP_NUM_THREADS says, else one a core

    @property
    def wants_cohort(self) -> bool:
        return bool(self.top or self.subtract_mean)

    def check(self) -> None:
        """Raises ScoringError for a combination that cannot be."""
        if self.score not in ("cosine", "mean_distance"):
            raise ScoringError(f"score {self.score!r}: expected cosine or mean_distance")
        if self.score != "cosine" and self.wants_cohort:
            raise ScoringError("mean subtraction and AS-norm work on cosine scores; give --score cosine")
        if self.qualities and not self.calibration:
            raise ScoringError("quality measures are inputs of calibration; give --calibrate")
        if "cohort_mean" in self.qualities and not self.top:
            raise ScoringError("the quality cohort_mean comes from AS-norm's cohort scores; give --as_norm K")
        if "norm" in self.qualities and self.score != "cosine":
            raise ScoringError("the quality norm is that of a vector scored by cosine; give --score cosine")

    def plain(self) -> System:
        """The first step alone: cosine or mean distance."""
        return replace(self, subtract_mean=False, top=0, calibration=False, qualities=(), cohort=None)

    def scores(self, trials, embedded: Embedded) -> dict[str, np.ndarray]:
        """{name: (n,) scores} of one list (spknet.evaluate.trials.Trials), the last being the one that counts.

        Raises ScoringError for a score that is not finite, naming the trial.
        """
        scores, inputs = self._scores(trials, embedded)
        if isinstance(self.calibration, Calibration):
            scores["calibrated"] = self.calibration(inputs())
        return scores

    def learned(self, trials, embedded: Embedded) -> System:
        """This system with a calibration learned on a labelled development list. Raises CalibrationError."""
        _, inputs = self._scores(trials, embedded)
        return replace(self, calibration=fit(inputs(), trials.labels))

    def inputs(self, trials, embedded: Embedded) -> np.ndarray:
        """What calibration is given, (n, 1 + 2 * LOGS + 4 * MEASURES): the last score, then the qualities in their order."""
        return self._scores(trials, embedded)[1]()

    def _scores(self, trials, embedded: Embedded):
        """Uncalibrated scores by name, and a function that gives calibration's inputs."""
        right = np.array([embedded.rows[name] for name in trials.tests])[trials.right]
        values: dict = {}  # of the two sides, by quality
        if self.score == "mean_distance":
            found = {self.score: self._distances(trials, embedded, right)}
        else:
            found = self._cosines(trials, embedded, right, values)
        for scores in found.values():
            check_finite(scores, trials)
        return found, lambda: self._inputs(list(found.values())[-1], trials, embedded, values)

    def _cosines(self, trials, embedded: Embedded, right: np.ndarray, values: dict) -> dict[str, np.ndarray]:
        rows = scoring.vectors(embedded.embeddings, self.normalize)
        left = scoring.enrol(trials, embedded.rows, rows)
        units = scoring.unit(left), scoring.unit(rows)
        found = {"cosine": scoring.cosine(*units, trials.left, right, self.threads)}
        if self.subtract_mean:
            mean = self.cohort.mean(axis=0)
            left, rows = left - mean, rows - mean
            units = scoring.unit(left), scoring.unit(rows)
            found["mean-subtracted"] = scoring.cosine(*units, trials.left, right, self.threads)
        if "norm" in self.qualities:
            norms = np.linalg.norm(left, axis=1), np.linalg.norm(rows, axis=1)
            values["norm"] = norms[0][trials.left], norms[1][right]
        if self.top:
            base = list(found.values())[-1]
            base = base if self.decimals is None else np.round(base.astype(np.float64), self.decimals)
            found["AS-norm"] = self._as_norm(base, units, (trials.left, right), values)
        return found

    def _as_norm(self, scores: np.ndarray, units: tuple, sides: tuple, values: dict) -> np.ndarray:
        others = self.cohort - self.cohort.mean(axis=0) if self.subtract_mean else self.cohort
        others = scoring.unit(others)
        left, (used, right) = sides[0], np.unique(sides[1], return_inverse=True)
        both = [cohorts.statistics(rows, others, self.top, self.threads) for rows in (units[0], units[1][used])]
        values["cohort_mean"] = both[0][0][left], both[1][0][right]
        return cohorts.as_norm(scores, *both, left, right)

    def _distances(self, trials, embedded: Embedded, right: np.ndarray) -> np.ndarray:
        # All crops of a model's utterances against the test's: the mean over its utterances, each a pair of its own.
        models = [[embedded.rows[u] for u in trials.utterances_of(m)] for m in trials.models]
        sizes = np.array([len(own) for own in models])
        firsts, size = (np.cumsum(sizes) - sizes)[trials.left], sizes[trials.left]
        starts = np.cumsum(size) - size
        left = np.concatenate(models)[np.arange(size.sum()) + np.repeat(firsts - starts, size)]
        crops = embedded.embeddings
        pairs = scoring.mean_distance(crops, crops, left, np.repeat(right, size), self.normalize, self.threads)
        return (np.add.reduceat(pairs, starts) / size).astype(pairs.dtype)

    def _inputs(self, scores: np.ndarray, trials, embedded: Embedded, values: dict) -> np.ndarray:
        # A model has all its utterances' speech, but the mean of their magnitudes.
        known = {"duration": (embedded.seconds, np.sum), "magnitude": (embedded.magnitudes(), np.mean)}
        logs = [tuple(map(np.log, embedded.sides(trials, *known[q]))) for q in self.qualities if q in LOGS]
        if "capped_duration" in self.qualities:
            seconds = embedded.sides(trials, *known["duration"])
            values["capped_duration"] = tuple(np.minimum(side, LONGEST) for side in seconds)
        return features(scores, logs, [values[q] for q in self.qualities if q in MEASURES])


def check_finite(scores: np.ndarray, trials) -> None:
    """Raises ScoringError naming the first trial whose score is not a finite number."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise ScoringError(
            f"{trials.describe(bad[0])}: the score is {scores[bad[0]]} (and {len(bad) - 1} more); expected a finite number:"
            " did training diverge, or is an utterance silent?"
        )


_WESPEAKER = System(normalize=False, subtract_mean=True, top=TOP, decimals=5)
PRESETS = {
    "voxceleb_trainer": System(score="mean_distance"),
    "wespeaker": _WESPEAKER,  # cosine after mean subtraction, AS-norm over 300 speakers' means
    "wespeaker-qmf": replace(_WESPEAKER, qualities=MEASURES, calibration=True),  # and calibration with 13 inputs
}
