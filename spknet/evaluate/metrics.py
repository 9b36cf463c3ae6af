"""Error rates of verification scores, pinned to one definition each.

A trial is accepted where score >= threshold. The operating points are the distinct scores t_1 < ... < t_K and +inf, so
that tied trials always move together:

    FNR(t) = targets below t / targets              FPR(t) = non-targets at or above t / non-targets
    EER    = where the straight lines between neighbouring points cross FNR = FPR, in percent
    minDCF = min over t of [Cm P FNR(t) + Cf (1-P) FPR(t)] / min(Cm P, Cf (1-P))        (NIST SRE plan)
    actDCF = the same at the Bayes threshold log(Cf (1-P) / (Cm P)) of log-likelihood-ratio scores
    Cllr   = 1/2 [mean log2(1 + e^-s) over targets + mean log2(1 + e^s) over non-targets]   (Bruemmer & du Preez 2006)
    minCllr = Cllr after the best monotone map of the scores (isotonic regression)

`voxceleb_trainer` gives that program's figures instead, which depend on the list's order where scores tie.

    figures(scores, labels)["eer"]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spknet.errors import UserError

PRIORS = {"p01": 0.01, "p05": 0.05}  # target priors of the reported detection costs
UNRELIABLE = 10  # fewer false alarms than this at a minimum: the figure rests on a handful of trials


class MetricError(UserError):
    """Scores or labels that error rates cannot be computed from; the message says why."""


@dataclass(frozen=True)
class Rates:
    """Operating points in order of rising thresholds. All arrays (K + 1,), the last threshold is +inf."""

    thresholds: np.ndarray
    misses: np.ndarray  # targets below the threshold
    false_alarms: np.ndarray  # non-targets at or above it
    targets: int
    nontargets: int

    @property
    def fnr(self) -> np.ndarray:
        return self.misses / self.targets

    @property
    def fpr(self) -> np.ndarray:
        return self.false_alarms / self.nontargets


@dataclass(frozen=True)
class Cost:
    """A normalised detection cost with the threshold and the numbers of errors behind it."""

    value: float
    threshold: float
    misses: int
    false_alarms: int

    @property
    def unreliable(self) -> bool:
        return self.false_alarms < UNRELIABLE


def rates(scores: np.ndarray, labels: np.ndarray) -> Rates:
    """Operating points of scores (n,) with labels (n,), 1 target, 0 non-target. Raises MetricError for NaN or one class."""
    scores, labels = np.asarray(scores), np.asarray(labels).astype(bool)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise MetricError(
            f"scores of shape {scores.shape} and labels of shape {labels.shape}: expected one label a score"
        )
    if np.isnan(scores).any():
        raise MetricError(f"score {int(np.flatnonzero(np.isnan(scores))[0])} (counted from 0) is NaN; expected numbers")
    targets = int(labels.sum())
    if targets == 0 or targets == len(labels):
        raise MetricError(f"{targets} targets among {len(labels)} trials: error rates need targets and non-targets")
    order = np.argsort(scores)
    ordered = scores[order]
    last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)  # last trial of each distinct score
    below = np.append(0, np.cumsum(labels[order])[last])
    passed = np.append(0, last + 1) - below
    return Rates(
        np.append(ordered[last], np.inf), below, len(labels) - targets - passed, targets, len(labels) - targets
    )


def eer(r: Rates) -> float:
    """Equal error rate in percent."""
    gap = r.fnr - r.fpr  # rises from -1 to 1
    i = int(np.searchsorted(gap, 0.0))
    if gap[i] == 0:
        return 100.0 * float(r.fnr[i])
    share = gap[i - 1] / (gap[i - 1] - gap[i])
    return 100.0 * float(r.fnr[i - 1] + share * (r.fnr[i] - r.fnr[i - 1]))


def eer_threshold(r: Rates) -> float:
    """The score at which FNR and FPR are nearest."""
    return float(r.thresholds[np.argmin(np.abs(r.fnr - r.fpr))])


def detection_cost(r: Rates, index: int, prior: float, miss: float = 1.0, false_alarm: float = 1.0) -> Cost:
    """Normalised detection cost at one operating point."""
    at = (miss * prior * r.fnr[index], false_alarm * (1 - prior) * r.fpr[index])
    value = sum(at) / min(miss * prior, false_alarm * (1 - prior))
    return Cost(float(value), float(r.thresholds[index]), int(r.misses[index]), int(r.false_alarms[index]))


def min_dcf(r: Rates, prior: float, miss: float = 1.0, false_alarm: float = 1.0) -> Cost:
    """Smallest normalised detection cost over all thresholds."""
    costs = miss * prior * r.fnr + false_alarm * (1 - prior) * r.fpr
    return detection_cost(r, int(np.argmin(costs)), prior, miss, false_alarm)


def act_dcf(r: Rates, prior: float, miss: float = 1.0, false_alarm: float = 1.0) -> Cost:
    """Normalised detection cost at the Bayes threshold; scores must be natural log-likelihood ratios."""
    threshold = np.log(false_alarm * (1 - prior) / (miss * prior))
    return detection_cost(r, at_threshold(r, threshold), prior, miss, false_alarm)


def at_threshold(r: Rates, threshold: float) -> int:
    """Index of the operating point that accepts exactly the scores at or above a threshold."""
    return int(np.searchsorted(r.thresholds, threshold))


def cllr(scores: np.ndarray, labels: np.ndarray) -> float:
    """Cost of log-likelihood ratios in bits; 1 is what saying nothing (all zeros) costs."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    targets, nontargets = scores[labels], scores[~labels]
    return float((np.logaddexp(0, -targets).mean() + np.logaddexp(0, nontargets).mean()) / (2 * np.log(2)))


def optimal_llr(r: Rates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best monotone log-likelihood ratio at each distinct score, with its numbers of targets and non-targets.

    Isotonic regression of the labels gives the posterior at the list's own prior; its logit minus the prior's log odds is
    the LLR, which may be -inf or +inf at the ends. Three arrays (K,).
    """
    from sklearn.isotonic import isotonic_regression

    targets, nontargets = np.diff(r.misses), -np.diff(r.false_alarms)
    both = (targets + nontargets).astype(np.float64)
    posterior = isotonic_regression(targets / both, sample_weight=both, y_min=0.0, y_max=1.0)
    with np.errstate(divide="ignore"):
        llr = np.log(posterior) - np.log1p(-posterior) - np.log(r.targets / r.nontargets)
    return llr, targets, nontargets


def min_cllr(r: Rates) -> float:
    """Cllr after the best monotone map: what the scores' order alone can give."""
    llr, targets, nontargets = optimal_llr(r)
    has_target, has_nontarget = targets > 0, nontargets > 0
    miss = (targets[has_target] * np.logaddexp(0, -llr[has_target])).sum() / r.targets
    false_alarm = (nontargets[has_nontarget] * np.logaddexp(0, llr[has_nontarget])).sum() / r.nontargets
    return float((miss + false_alarm) / (2 * np.log(2)))


def voxceleb_trainer(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """EER and minDCF as voxceleb_trainer computes them, its dependence on ties and on the list's order included.

    EER: max(FPR, FNR) at the point of scikit-learn's ROC curve where they are nearest. minDCF: trials in stable order
    of their scores, one operating point behind each trial, also between trials that tie.
    """
    from sklearn.metrics import roc_curve

    scores, labels = np.asarray(scores), np.asarray(labels).astype(np.int64)
    rates(scores, labels)  # the same refusals
    fpr, tpr, _ = roc_curve(labels, scores, pos_label=1)
    nearest = np.nanargmin(np.abs(1 - tpr - fpr))
    found = {"eer": 100.0 * float(max(fpr[nearest], 1 - tpr[nearest]))}
    ordered = labels[np.argsort(scores, kind="stable")]
    fnr = np.cumsum(ordered) / float(ordered.sum())
    fpr = 1 - np.cumsum(1 - ordered) / float(len(ordered) - ordered.sum())
    for name, prior in PRIORS.items():
        found[f"min_dcf_{name}"] = float((fnr * prior + fpr * (1 - prior)).min() / min(prior, 1 - prior))
    return found


def figures(scores: np.ndarray, labels: np.ndarray, definition: str = "default") -> dict:
    """The figures of one list: EER in percent, minDCF with error counts, numbers of trials.

    definition: default, or voxceleb_trainer (its EER and minDCF replace ours; counts and thresholds stay ours).
    """
    r = rates(scores, labels)
    found: dict = {"eer": eer(r), "eer_threshold": eer_threshold(r)}
    for name, prior in PRIORS.items():
        cost = min_dcf(r, prior)
        found[f"min_dcf_{name}"] = cost.value
        found[f"min_dcf_{name}_at"] = {
            "threshold": cost.threshold,
            "misses": cost.misses,
            "false_alarms": cost.false_alarms,
            "unreliable": cost.unreliable,
        }
    found["min_cllr"] = min_cllr(r)
    found |= {"trials": r.targets + r.nontargets, "targets": r.targets, "nontargets": r.nontargets}
    if definition == "voxceleb_trainer":
        found |= voxceleb_trainer(scores, labels)
    return found


def llr_figures(scores: np.ndarray, labels: np.ndarray) -> dict:
    """Figures that only calibrated scores (log-likelihood ratios) have: actDCF with error counts, Cllr."""
    r = rates(scores, labels)
    found: dict = {"cllr": cllr(scores, labels)}
    for name, prior in PRIORS.items():
        cost = act_dcf(r, prior)
        found[f"act_dcf_{name}"] = cost.value
        found[f"act_dcf_{name}_at"] = {"misses": cost.misses, "false_alarms": cost.false_alarms}
    return found
