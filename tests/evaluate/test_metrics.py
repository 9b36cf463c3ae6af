"""Error rates against exhaustive computations, scikit-learn, hand-worked examples and voxceleb_trainer's own numbers."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from spknet.evaluate import bootstrap, metrics
from spknet.evaluate.metrics import MetricError, rates
from tests.conftest import needed

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "losses.json"


def small_sets():
    """Random small lists, half of them with ties, each with both classes."""
    rng = np.random.default_rng(5)
    for size, digits in itertools.product((3, 7, 30, 200), (0, 1, 8)):
        for _ in range(6):
            labels = rng.integers(0, 2, size)
            labels[:2] = 0, 1
            yield np.round(rng.standard_normal(size) + labels, digits), labels


def points(scores, labels):
    """(threshold, FNR, FPR) at every distinct score and above all, by counting."""
    targets = [s for s, t in zip(scores, labels) if t]
    others = [s for s, t in zip(scores, labels) if not t]
    for t in [*sorted(set(scores)), math.inf]:
        yield t, sum(s < t for s in targets) / len(targets), sum(s >= t for s in others) / len(others)


def counted_eer(scores, labels):
    before = None
    for _, fnr, fpr in points(scores, labels):
        if fnr == fpr:
            return 100 * fnr
        if fnr > fpr:  # the crossing of two straight lines: fnr0 + x (fnr - fnr0) = fpr0 + x (fpr - fpr0)
            x = (before[1] - before[0]) / ((fnr - before[0]) - (fpr - before[1]))
            return 100 * (before[0] + x * (fnr - before[0]))
        before = fnr, fpr


def test_eer_and_detection_cost_equal_counting_every_threshold():
    for scores, labels in small_sets():
        r = rates(scores, labels)
        assert metrics.eer(r) == pytest.approx(counted_eer(scores, labels), abs=1e-9)
        for prior in (0.01, 0.05, 0.5):
            costs = [
                (prior * fnr + (1 - prior) * fpr) / min(prior, 1 - prior) for _, fnr, fpr in points(scores, labels)
            ]
            found = metrics.min_dcf(r, prior)
            assert found.value == pytest.approx(min(costs), abs=1e-12)
            assert found.misses == sum(s < found.threshold for s, t in zip(scores, labels) if t)
            assert found.false_alarms == sum(s >= found.threshold for s, t in zip(scores, labels) if not t)


def test_eer_lies_on_scikit_learns_roc_curve():
    from sklearn.metrics import roc_curve

    for scores, labels in small_sets():
        fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
        found = metrics.eer(rates(scores, labels)) / 100
        # The polyline through the ROC points passes (EER, 1 - EER): some segment contains it.
        on = [
            abs((x1 - x0) * (1 - found - y0) - (y1 - y0) * (found - x0)) < 1e-9
            and x0 - 1e-9 <= found <= x1 + 1e-9
            and y0 - 1e-9 <= 1 - found <= y1 + 1e-9
            for x0, x1, y0, y1 in zip(fpr, fpr[1:], tpr, tpr[1:])
        ]
        assert any(on)


def test_hand_worked_example():
    # Sorted: 1n 2t 3n 4n 5t 6t. At threshold 4: targets below 1 of 3, non-targets at or above 1 of 3.
    scores, labels = np.array([5, 1, 4, 2, 3, 6]), np.array([1, 0, 0, 1, 0, 1])
    r = rates(scores, labels)
    assert metrics.eer(r) == pytest.approx(100 / 3)
    assert metrics.eer_threshold(r) == 4
    # P = 0.5: at 5 one miss, no false alarm: 0.5 * 1/3 / 0.5.
    assert metrics.min_dcf(r, 0.5) == metrics.Cost(pytest.approx(1 / 3), 5.0, 1, 0)
    # Log-likelihood ratios +-log 3: each right trial costs log2(4/3), each wrong one log2(4) = 2.
    llr = np.log(3) * np.array([1, -1, 1, -1, -1, 1])
    right, wrong = math.log2(4 / 3), 2.0
    assert metrics.cllr(llr, labels) == pytest.approx(((2 * right + wrong) / 3 + (2 * right + wrong) / 3) / 2)
    assert metrics.act_dcf(rates(llr, labels), 0.5).value == pytest.approx(2 / 3)


def test_min_cllr_equals_the_min_max_formula_of_isotonic_regression():
    for scores, labels in small_sets():
        if len(scores) > 30:
            continue
        values = sorted(set(scores))
        t = [sum(1 for s, label in zip(scores, labels) if s == v and label) for v in values]
        n = [sum(1 for s, label in zip(scores, labels) if s == v and not label) for v in values]
        k = range(len(values))
        fit = [
            max(min(sum(t[a : b + 1]) / sum(t[a : b + 1] + n[a : b + 1]) for b in k if b >= i) for a in k if a <= i)
            for i in k
        ]
        odds = sum(t) / sum(n)
        cost = sum(t[i] * math.log2(1 + (1 - fit[i]) / fit[i] * odds) for i in k if t[i]) / sum(t)
        cost += sum(n[i] * math.log2(1 + fit[i] / (1 - fit[i]) / odds) for i in k if n[i]) / sum(n)
        assert metrics.min_cllr(rates(scores, labels)) == pytest.approx(cost / 2, abs=1e-9)


def test_min_cllr_equals_scikit_learns_isotonic_regression_on_single_trials():
    from sklearn.isotonic import IsotonicRegression

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 3000)
    scores = np.round(rng.standard_normal(3000) + labels, 2)
    p = IsotonicRegression().fit(scores, labels).predict(scores)
    odds = labels.sum() / (1 - labels).sum()
    with np.errstate(divide="ignore"):
        miss = np.log2(1 + (1 - p) / p * odds)[labels == 1].mean()
        false_alarm = np.log2(1 + p / (1 - p) / odds)[labels == 0].mean()
    assert metrics.min_cllr(rates(scores, labels)) == pytest.approx((miss + false_alarm) / 2, abs=1e-9)


def test_equal_scores_say_nothing():
    found = metrics.figures(np.zeros(10), np.array([1] * 3 + [0] * 7))
    assert (found["eer"], found["min_dcf_p01"], found["min_dcf_p05"]) == (50.0, 1.0, 1.0)
    assert found["min_cllr"] == pytest.approx(1.0)
    assert metrics.cllr(np.zeros(10), np.array([1] * 3 + [0] * 7)) == pytest.approx(1.0)


def test_perfect_separation_and_its_reverse():
    labels = np.array([0, 0, 1, 1])
    found = metrics.figures(np.array([1.0, 2, 3, 4]), labels)
    assert (found["eer"], found["min_dcf_p01"], found["min_cllr"]) == (0.0, 0.0, 0.0)
    assert metrics.figures(np.array([4.0, 3, 2, 1]), labels)["eer"] == 100.0


def test_one_target_among_many():
    # One of 99 non-targets is above the target: the FNR jumps from 0 to 1 where the FPR is 1/99.
    scores = np.arange(100.0)
    labels = (scores == 98).astype(int)
    found = metrics.figures(scores, labels)
    assert found["eer"] == pytest.approx(100 / 99)
    assert found["min_dcf_p01"] == pytest.approx(1.0)
    assert found["min_dcf_p01_at"]["unreliable"]


def test_fewer_than_ten_false_alarms_are_called_unreliable():
    nontargets, targets = np.arange(1000.0), np.full(50, 989.5)
    labels = np.array([0] * 1000 + [1] * 50)
    scores = np.concatenate([nontargets, targets])
    assert metrics.figures(scores, labels)["min_dcf_p05_at"] == {
        "threshold": 989.5,
        "misses": 0,
        "false_alarms": 10,
        "unreliable": False,
    }
    assert metrics.min_dcf(rates(np.concatenate([nontargets, targets + 1]), labels), 0.05).unreliable


def test_nan_and_single_classes_are_refused():
    with pytest.raises(MetricError, match="score 2 .* is NaN"):
        rates(np.array([0, 1, np.nan]), np.array([0, 1, 1]))
    with pytest.raises(MetricError, match="3 targets among 3 trials"):
        rates(np.zeros(3), np.ones(3))
    with pytest.raises(MetricError, match="one label a score"):
        rates(np.zeros(3), np.ones(2))


def test_order_of_trials_changes_nothing():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 500)
    scores = np.round(rng.standard_normal(500) + labels, 1)
    order = rng.permutation(500)
    assert metrics.figures(scores, labels) == metrics.figures(scores[order], labels[order])
    twice = metrics.figures(np.tile(scores, 2), np.tile(labels, 2))
    once = metrics.figures(scores, labels)
    assert all(twice[name] == pytest.approx(once[name]) for name in ("eer", "min_dcf_p01", "min_dcf_p05", "min_cllr"))


def test_voxceleb_trainers_arithmetic_is_reproduced_with_ties():
    for values in json.loads(needed(REFERENCE).read_text())["metrics"].values():
        found = metrics.figures(np.array(values["scores"]), np.array(values["labels"]), "voxceleb_trainer")
        assert found["eer"] == values["eer_percent"]
        assert found["min_dcf_p05"] == values["min_dcf_p05"]
        assert found["min_dcf_p01"] == values["min_dcf_p01"]


def test_a_replicate_equals_repeating_the_trials():
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.3
    left = rng.integers(0, 12, 300)
    right = np.where(labels, left, (left + rng.integers(1, 12, 300)) % 12)
    scores = np.round(rng.standard_normal(300) + 1.5 * labels, 1)
    resampled = bootstrap.Resampled(scores, labels, left, right)
    for counts in bootstrap.draw(12, 40, seed=1):
        assert counts.sum() == 12
        times = np.where(labels, counts[left], counts[left] * counts[right])
        expected = metrics.figures(np.repeat(scores, times), np.repeat(labels, times))
        assert resampled.figures(counts) == pytest.approx([expected[name] for name in bootstrap.NAMES])


def test_replicates_without_targets_are_left_out_of_intervals():
    figures = np.array([[10.0, 1, 1], [np.nan] * 3, [20.0, 1, 1]])
    assert bootstrap.intervals(figures)["eer"] == pytest.approx([10.25, 19.75])


def simulated(speakers: int, seed: int):
    """A list whose target scores have a mean of their own for each speaker, and non-targets one for each pair's two sides."""
    rng = np.random.default_rng(seed)
    a, b = np.triu_indices(speakers, 1)
    own = rng.standard_normal(speakers) * 0.7
    wolf = rng.standard_normal(speakers) * 0.4
    targets = np.repeat(np.arange(speakers), 10)
    left, right = np.concatenate([targets, a]), np.concatenate([targets, b])
    labels = np.concatenate([np.ones(len(targets)), np.zeros(len(a))])
    mean = np.concatenate([2.0 + own[targets], wolf[a] + wolf[b]])
    return mean + rng.standard_normal(len(mean)), labels, left, right


@pytest.mark.slow
def test_95_percent_intervals_cover_the_truth_90_to_99_times_in_100():
    truth = metrics.figures(*simulated(2000, 99)[:2])["eer"]
    trials, covered = 300, 0
    for seed in range(trials):
        scores, labels, left, right = simulated(50, seed)
        low, high = bootstrap.intervals(bootstrap.replicate(scores, labels, left, right, 300, seed))["eer"]
        covered += low <= truth <= high
    assert 0.90 <= covered / trials <= 0.99
