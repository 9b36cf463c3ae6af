"""From scores to log-likelihood ratios: logistic regression on development trials, with quality measures if asked for.

    LLR = w . [score, qualities] + b - log(targets / non-targets of the calibration trials)

so that a threshold follows from costs and priors alone (Bruemmer & du Preez 2006; quality measures as in Thienpondt et al.
2021). A quality is symmetric in the sides. LOGS give the smaller and the larger of both: `duration`, log seconds of speech;
`magnitude`, log length of the embedding before normalisation. MEASURES are WeSpeaker's and give four numbers each, smaller,
larger, difference and ratio: `capped_duration`, seconds, 20 at most; `norm`, length of the vector that is scored (after mean
subtraction); `cohort_mean`, mean of the highest cohort scores that AS-norm uses. With the score they make its 13 inputs.

    llr = fit(features(dev_scores, []), dev_labels)(features(scores, []))
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spknet.errors import UserError

LOGS = ("duration", "magnitude")
MEASURES = ("capped_duration", "norm", "cohort_mean")
QUALITIES = LOGS + MEASURES
LONGEST = 20.0  # seconds, of capped_duration


class CalibrationError(UserError):
    """The development trials cannot calibrate; the message says why."""


@dataclass(frozen=True)
class Calibration:
    """An affine map of features to natural log-likelihood ratios."""

    weights: np.ndarray  # (features,), the score's first
    bias: float

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """(n, features) -> (n,) log-likelihood ratios."""
        return rows @ self.weights + self.bias


def features(scores: np.ndarray, sides: list[tuple], measures: list[tuple] | None = None) -> np.ndarray:
    """Scores (n,), and values (left (n,), right (n,)) of each quality -> (n, 1 + 2 * sides + 4 * measures).

    sides: min and max of both. measures: min, max, max - min and max / min (0 where min is 0).
    """
    columns = [np.asarray(scores, dtype=np.float64)]
    for left, right in sides:
        columns += [np.minimum(left, right), np.maximum(left, right)]
    for left, right in measures or []:
        low, high = np.minimum(left, right).astype(np.float64), np.maximum(left, right).astype(np.float64)
        columns += [low, high, high - low, np.divide(high, low, out=np.zeros_like(high), where=low != 0)]
    return np.stack(columns, axis=1)


def fit(rows: np.ndarray, labels: np.ndarray) -> Calibration:
    """Calibration from development trials. rows: (n, features), labels: (n,). Raises CalibrationError.

    Maximum likelihood but for a vanishing penalty, which keeps separable trials finite.
    """
    from sklearn.linear_model import LogisticRegression

    labels = np.asarray(labels).astype(bool)
    if labels.all() or not labels.any():
        raise CalibrationError(
            f"{int(labels.sum())} targets among {len(labels)} trials: calibration needs both classes"
        )
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    if deviation[0] == 0:
        raise CalibrationError("all development scores are equal; there is nothing to calibrate")
    deviation[deviation == 0] = 1.0  # a quality that is the same everywhere, such as the duration of fixed crops
    regression = LogisticRegression(C=1e5, tol=1e-8, max_iter=1000).fit((rows - mean) / deviation, labels)
    weights = regression.coef_[0] / deviation
    if weights[0] <= 0:
        raise CalibrationError(
            f"higher scores do not mean the same speaker (weight {weights[0]:.3g}); is the list's label right?"
        )
    prior = np.log(labels.sum() / (~labels).sum())
    return Calibration(weights, float(regression.intercept_[0] - weights @ mean - prior))
