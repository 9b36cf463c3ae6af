"""Scores against one trial at a time in float64, AS-norm against plain numpy, calibration against its optimum."""

import json
from pathlib import Path

import numpy as np
import pytest

from spknet.evaluate import calibration, scoring
from spknet.evaluate import groups as breakdown
from spknet.evaluate.calibration import CalibrationError
from spknet.evaluate.cohort import speaker_means, spread, statistics
from spknet.evaluate.scoring import Embedded, ScoringError
from spknet.evaluate.systems import System
from spknet.evaluate.thresholds import threshold_card
from spknet.evaluate.trials import read_trials
from tests.conftest import needed

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "losses.json"


def embedded(names, crops=3, dimensions=16, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((len(names), crops, dimensions)).astype(dtype)
    return Embedded(rows, {name: i for i, name in enumerate(names)}, rng.integers(16000, 90000, len(names)))


def make_list(tmp_path, lines, name="list.txt", enrolment=None):
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    return read_trials(tmp_path / name, enrolment)


NAMES = [f"id{s}/v{v}/0.wav" for s in range(6) for v in range(3)]


def random_lines(n=400, seed=0):
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, len(NAMES), (n, 2))
    return [f"{int(NAMES[a][:3] == NAMES[b][:3])} {NAMES[a]} {NAMES[b]}" for a, b in pairs]


def one_cosine(a, b):
    """Cosine of two utterances' mean unit crops, in float64."""
    a, b = ((x / np.linalg.norm(x, axis=1, keepdims=True)).mean(axis=0) for x in (np.float64(a), np.float64(b)))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def one_distance(a, b):
    """voxceleb_trainer's score of one trial as it is meant: minus the mean distance over pairs of crops."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.float64(a), np.float64(b)))
    return -np.mean([np.linalg.norm(x - y) for x in a for y in b])


@pytest.mark.parametrize("score, one", [("cosine", one_cosine), ("mean_distance", one_distance)])
def test_blocked_scores_equal_one_trial_at_a_time(tmp_path, score, one):
    e = embedded(NAMES)
    trials = make_list(tmp_path, random_lines())
    found = System(score).scores(trials, e)[score]
    a, b = (e.embeddings[[e.rows[n] for n in names]] for names in (trials.models, trials.tests))
    expected = [one(a[i], b[j]) for i, j in zip(trials.left, trials.right)]
    # A file against itself: the closed form of a distance near zero keeps half the digits of float32.
    assert np.abs(found - expected).max() < 3e-4
    different = np.array([trials.models[i] != trials.tests[j] for i, j in zip(trials.left, trials.right)])
    assert np.abs(found - expected)[different].max() < 2e-6


def test_crop_score_of_voxceleb_trainer_is_reproduced():
    values = json.loads(needed(REFERENCE).read_text())["crop_score"]
    for dtype in (np.float32, np.float64):
        a, b = (scoring.unit(np.array(values[side], dtype=dtype))[None] for side in "ab")
        zero = np.zeros(1, np.int64)
        assert scoring.mean_distance(a, b, zero, zero)[0] == pytest.approx(values["score"], rel=2e-7)


def test_proto_is_scored_without_length_normalisation(tmp_path):
    e = embedded(NAMES[:2], crops=1)
    trials = make_list(tmp_path, [f"{NAMES[0]} {NAMES[1]}"])
    found = System("mean_distance", normalize=False).scores(trials, e)["mean_distance"]
    assert found[0] == pytest.approx(-np.linalg.norm(e.embeddings[0, 0] - e.embeddings[1, 0]), rel=1e-5)


@pytest.mark.parametrize("score", ["cosine", "mean_distance"])
def test_shuffled_swapped_and_duplicated_trials_change_no_score(tmp_path, score):
    lines = random_lines(300)
    e = embedded(NAMES)
    before = dict(zip(lines, System(score).scores(make_list(tmp_path, lines), e)[score]))
    order = np.random.default_rng(3).permutation(300)
    shuffled = [lines[i] for i in order] + lines[:50]
    after = System(score).scores(make_list(tmp_path, shuffled, "b.txt"), e)[score]
    exact = {"rtol": 0, "atol": 0} if score == "cosine" else {"rtol": 0, "atol": 2e-6}
    np.testing.assert_allclose(after, [before[line] for line in shuffled], **exact)
    swapped = [" ".join([t, b, a]) for t, a, b in map(str.split, lines)]
    after = System(score).scores(make_list(tmp_path, swapped, "c.txt"), e)[score]
    different = [a != b for _, a, b in map(str.split, lines)]
    np.testing.assert_allclose(after[different], np.array([before[line] for line in lines])[different], **exact)


def test_a_model_of_several_utterances_is_their_mean(tmp_path):
    e = embedded(NAMES)
    trials = make_list(tmp_path, [f"target-free {NAMES[9]}"], enrolment={"target-free": NAMES[:3]})
    rows = [(x / np.linalg.norm(x, axis=1, keepdims=True)).mean(axis=0) for x in np.float64(e.embeddings)]
    model, test = np.mean(rows[:3], axis=0), rows[9]
    expected = model @ test / np.linalg.norm(model) / np.linalg.norm(test)
    assert System().scores(trials, e)["cosine"][0] == pytest.approx(expected, abs=1e-6)
    by_pairs = np.mean([one_distance(e.embeddings[i], e.embeddings[9]) for i in range(3)])
    assert System("mean_distance").scores(trials, e)["mean_distance"][0] == pytest.approx(by_pairs, abs=1e-6)


def test_mean_subtraction_and_as_norm_equal_plain_numpy(tmp_path):
    e, rng = embedded(NAMES, crops=1), np.random.default_rng(8)
    cohort = rng.standard_normal((40, 16)).astype(np.float32) * 0.3 + 0.1
    trials = make_list(tmp_path, random_lines(100))
    found = System(subtract_mean=True, top=7, cohort=cohort).scores(trials, e)
    assert list(found) == ["cosine", "mean-subtracted", "AS-norm"]
    others = np.float64(cohort) - np.float64(cohort).mean(axis=0)

    def direction(name):
        x = np.float64(e.embeddings[e.rows[name], 0])
        return x / np.linalg.norm(x) - np.float64(cohort).mean(axis=0)

    def cosine(x, y):
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    for i, (a, b) in enumerate(zip(trials.left, trials.right)):
        x, y = direction(trials.models[a]), direction(trials.tests[b])
        sides = [sorted((cosine(side, o) for o in others), reverse=True)[:7] for side in (x, y)]
        s = cosine(x, y)
        assert found["mean-subtracted"][i] == pytest.approx(s, abs=1e-5)
        assert found["AS-norm"][i] == pytest.approx(
            sum((s - np.mean(side)) / np.std(side) for side in sides) / 2, rel=1e-3, abs=1e-3
        )


def test_as_norm_refuses_a_k_that_does_not_fit_the_cohort():
    rows = scoring.unit(np.random.default_rng(0).standard_normal((5, 4)))
    for top in (1, 6):
        with pytest.raises(ScoringError, match=f"top {top} of a cohort of 5 speakers; give a number from 2 to 5"):
            statistics(rows, rows, top)
    with pytest.raises(ScoringError, match="all 3 cohort scores are equal"):
        statistics(rows, np.tile(rows[:1], (5, 1)), 3)
    with pytest.raises(ScoringError, match="work on cosine scores"):
        System("mean_distance", top=300).check()


def test_a_score_that_is_nan_names_its_trial(tmp_path):
    e = embedded(NAMES)
    e.embeddings[4] = np.nan
    trials = make_list(tmp_path, [f"1 {NAMES[0]} {NAMES[1]}", f"0 {NAMES[0]} {NAMES[4]}"])
    with pytest.raises(ScoringError, match=rf"line 2 \({NAMES[0]} {NAMES[4]}\): the score is nan"):
        System().scores(trials, e)


def test_speaker_means_average_the_utterances_of_a_speaker():
    rows = np.random.default_rng(0).standard_normal((5, 2, 4))
    units = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    found = speaker_means(rows, np.array([1, 0, 1, 1, 0]))
    np.testing.assert_allclose(found[0], units[[1, 4]].mean(axis=(0, 1)))
    np.testing.assert_allclose(found[1], units[[0, 2, 3]].mean(axis=(0, 1)))
    assert spread(10, 3) == [0, 4, 9] and spread(2, 5) == [0, 1]


def test_calibration_recovers_known_log_likelihood_ratios():
    # Targets N(2, 1), non-targets N(0, 1): LLR = 2 s - 2, whatever the numbers of trials.
    rng = np.random.default_rng(0)
    labels = np.array([1] * 4000 + [0] * 40000)
    scores = rng.standard_normal(44000) + 2 * labels
    found = calibration.fit(calibration.features(scores, []), labels)
    assert found.weights[0] == pytest.approx(2, abs=0.06)
    assert found.bias == pytest.approx(-2, abs=0.1)


def test_quality_measures_are_symmetric_and_a_constant_one_is_harmless():
    rng = np.random.default_rng(0)
    labels = np.arange(1000) % 2
    scores, left, right = rng.standard_normal(1000) + labels, rng.random(1000), rng.random(1000)
    rows = calibration.features(scores, [(left, right), (np.ones(1000), np.ones(1000))])
    np.testing.assert_array_equal(rows, calibration.features(scores, [(right, left), (np.ones(1000), np.ones(1000))]))
    assert np.isfinite(calibration.fit(rows, labels)(rows)).all()


def test_trials_that_cannot_calibrate_are_refused():
    rows = calibration.features(np.arange(4.0), [])
    with pytest.raises(CalibrationError, match="4 targets among 4 trials"):
        calibration.fit(rows, np.ones(4))
    with pytest.raises(CalibrationError, match="all development scores are equal"):
        calibration.fit(rows * 0, np.array([0, 1, 0, 1]))
    with pytest.raises(CalibrationError, match="higher scores do not mean the same speaker"):
        calibration.fit(rows, np.array([1, 1, 0, 0]))


def test_threshold_card_claims_a_rate_only_with_enough_nontargets():
    rng = np.random.default_rng(0)
    dev = rng.standard_normal(31000), np.array([1] * 1000 + [0] * 30000)
    test = rng.standard_normal(4000), np.array([1] * 500 + [0] * 3500)
    card = threshold_card(test, dev)
    assert [(row["rate"], row["claimed"], row["chosen_on"]) for row in card] == [
        (0.01, True, "dev"),
        (0.001, False, "dev"),  # 3,500 non-targets on the test list, 30,000 needed
        (0.0001, False, "dev"),
    ]
    others = np.sort(dev[0][1000:])
    assert (others >= card[0]["threshold"]).sum() == 300 and (others >= card[1]["threshold"]).sum() == 30
    assert card[0]["far"] == (test[0][500:] >= card[0]["threshold"]).mean()
    assert card[0]["frr"] == (test[0][:500] < card[0]["threshold"]).mean()
    assert card[2]["threshold"] is None  # 30,000 of 300,000 non-targets
    assert {row["chosen_on"] for row in threshold_card(test, None)} == {"oracle"}


def test_threshold_of_tied_scores_does_not_exceed_its_rate():
    scores = np.array([1.0] * 2980 + [5.0] * 40 + [9.0])
    labels = np.array([0] * 3020 + [1])
    threshold = threshold_card((scores, labels), None)[0]["threshold"]
    assert (scores[:3020] >= threshold).mean() <= 0.01 and threshold > 5


def test_groups_split_trials_by_both_sides():
    scores = np.array([3.0, 2, 1, 0, 5])
    labels = np.array([1, 0, 0, 0, 1])
    left, right = ["f", "f", "m", "m", "m"], ["f", "f", "f", "m", "m"]
    found = {g["group"]: g for g in breakdown.by_group(scores, labels, left, right, threshold=2.0)}
    assert {name: (g["trials"], g["targets"]) for name, g in found.items()} == {
        "f": (2, 1),
        "f / m": (1, 0),
        "m": (2, 1),
    }
    assert (found["f"]["eer"], found["f"]["far"], found["f"]["frr"]) == (0.0, 1.0, 0.0)
    assert (found["f / m"]["eer"], found["f / m"]["far"], found["f / m"]["frr"]) == (None, 0.0, None)
    by_length = breakdown.by_duration(scores, labels, np.array([1.0, 2, 3, 4, 5]), 2.0, groups=2)
    assert [g["trials"] for g in by_length] == [2, 3]
