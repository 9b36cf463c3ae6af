"""The presets of published figures against WeSpeaker's own numbers, ten embeddings and a cohort of twelve."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from spknet.evaluate import metrics
from spknet.evaluate.calibration import MEASURES
from spknet.evaluate.scoring import Embedded, ScoringError
from spknet.evaluate.systems import PRESETS, System
from spknet.evaluate.trials import read_trials

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "wespeaker_scores.json").read_text())
RUNS = pytest.mark.parametrize("run", REFERENCE["runs"], ids=["mean removed", "mean kept"])


@pytest.fixture
def embedded():
    names = list(REFERENCE["embeddings"])
    rows = np.array([REFERENCE["embeddings"][name] for name in names])[:, None]  # (10, 1, 16) float64
    samples = np.array([round(16000 * REFERENCE["durations"][name]) for name in names])
    return Embedded(rows, {name: i for i, name in enumerate(names)}, samples)


def prepared(tmp_path, run, **options):
    """The preset with the reference's cohort and top 3, with or without the mean; the list it was tried on."""
    (tmp_path / "trials").write_text("".join(" ".join(trial) + "\n" for trial in run["trials"]))
    cohort = np.array(list(REFERENCE["cohort"].values()))
    own = {"cohort": cohort, "top": run["top"], "subtract_mean": run["mean_of_cohort_removed"], "calibration": False}
    return dataclasses.replace(PRESETS["wespeaker-qmf"], **own, **options), read_trials(tmp_path / "trials")


@RUNS
def test_cosine_and_as_norm_equal_wespeakers_files(tmp_path, embedded, run):
    system, trials = prepared(tmp_path, run, qualities=())
    found = system.scores(trials, embedded)
    cosine = found["mean-subtracted" if run["mean_of_cohort_removed"] else "cosine"]
    np.testing.assert_allclose(cosine, run["cosine"], atol=5.1e-6)  # written with 5 decimals
    np.testing.assert_allclose(
        found["AS-norm"], run["as_norm"], rtol=3e-6, atol=5.1e-6
    )  # its cohort scores are float32
    exact = dataclasses.replace(system, decimals=None).scores(trials, embedded)["AS-norm"]
    assert np.abs(exact - run["as_norm"]).max() > 2.5e-5  # the rounding of its cosines is part of its figures


@RUNS
def test_quality_measures_equal_wespeakers(tmp_path, embedded, run):
    system, trials = prepared(tmp_path, run)
    rows = dataclasses.replace(system, calibration=True).inputs(trials, embedded)
    assert rows.shape == (20, 13) and system.qualities == MEASURES
    expected = np.array(run["qmf"])
    # Its files hold norms and cohort means with 4 decimals, and ratios are made of these.
    np.testing.assert_allclose(rows[:, [0, 1, 2, 3, 4]], expected[:, [0, 1, 2, 3, 4]], atol=6e-5)
    np.testing.assert_allclose(rows[:, 5:], expected[:, 5:], rtol=2e-3, atol=1.1e-4)
    norms = np.array(run["norms_and_cohort_means"])
    np.testing.assert_allclose(rows[:, 5], norms[:, :2].min(axis=1), atol=5.1e-5)
    np.testing.assert_allclose(rows[:, 10], norms[:, 2:].max(axis=1), atol=5.1e-5)


@RUNS
def test_cllr_of_the_untrained_model_equals_wespeakers(tmp_path, embedded, run):
    system, trials = prepared(tmp_path, run)
    rows = dataclasses.replace(system, calibration=True).inputs(trials, embedded)
    assert metrics.cllr(rows.mean(axis=1), trials.labels) == pytest.approx(run["cllr_of_untrained_model"], rel=2e-4)


def test_float32_as_norm_stays_near_float64(tmp_path, embedded):
    system, trials = prepared(tmp_path, REFERENCE["runs"][0], qualities=())
    single = dataclasses.replace(embedded, embeddings=embedded.embeddings.astype(np.float32))
    cohort = system.cohort.astype(np.float32)
    found = dataclasses.replace(system, cohort=cohort, decimals=None).scores(trials, single)["AS-norm"]
    exact = dataclasses.replace(system, decimals=None).scores(trials, embedded)["AS-norm"]
    np.testing.assert_allclose(found, exact, rtol=2e-5, atol=2e-5)


def test_scores_do_not_depend_on_the_threads(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"id{i % 40}/{i}" for i in range(400)]
    pairs = rng.integers(0, 400, (3000, 2))
    lines = [f"{int(a % 40 == b % 40)} {names[a]} {names[b]}" for a, b in pairs]
    (tmp_path / "trials").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    trials = read_trials(tmp_path / "trials")
    rows = rng.standard_normal((400, 2, 24)).astype(np.float32)
    embedded = Embedded(rows, {name: i for i, name in enumerate(names)}, np.full(400, 16000))
    cohort = rng.standard_normal((300, 24)).astype(np.float32)
    for system in (System(top=20, subtract_mean=True, cohort=cohort), System("mean_distance")):
        results = [dataclasses.replace(system, threads=n).scores(trials, embedded) for n in (1, 2, 3)]
        for name, scores in results[0].items():
            assert all(np.array_equal(scores, other[name]) for other in results[1:])


def test_impossible_systems_are_refused():
    for system, said in (
        (System(qualities=("duration",)), "quality measures are inputs of calibration; give --calibrate"),
        (System(qualities=("cohort_mean",), calibration=True), "comes from AS-norm's cohort scores; give --as_norm K"),
        (System("mean_distance", qualities=("norm",), calibration=True), "give --score cosine"),
        (System("plda"), "score 'plda': expected cosine or mean_distance"),
    ):
        with pytest.raises(ScoringError, match=said):
            system.check()
