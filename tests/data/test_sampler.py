"""The global sampler against its definition, on hand-made and on random skewed data."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from spknet.data.sampler import Sampler, SamplerError, steps_per_epoch


def make(counts, n, m, cap=500, seed=0, **options):
    rows = np.concatenate([[0], np.cumsum(counts)])
    return Sampler(rows, speakers_per_batch=n, utterances_per_speaker=m, cap=cap, seed=seed, **options)


def check_plan(sampler, epoch, balanced=False):
    """Every property the plan promises; returns the plan."""
    plan = sampler.plan(epoch)
    assert plan.shape == (sampler.steps, sampler.n_speakers, sampler.n_utterances)
    rows = np.concatenate([sampler.first, [sampler.first[-1] + sampler.counts[-1]]])
    speakers = np.searchsorted(rows, plan, side="right") - 1
    assert (speakers == speakers[:, :, :1]).all()  # a group is of one speaker
    for batch in speakers[:, :, 0]:
        assert len(set(batch)) == sampler.n_speakers  # no speaker twice in a batch
    for group in plan.reshape(-1, sampler.n_utterances):
        assert len(set(group)) == sampler.n_utterances
    if not balanced:
        assert len(np.unique(plan)) == plan.size  # no utterance twice in an epoch
    return plan


def best_steps_by_trying(groups, n):
    """The definition of B, by counting up."""
    b = 0
    while sum(min(k, b + 1) for k in groups) >= n * (b + 1):
        b += 1
        if b > sum(groups):
            break
    return b


@pytest.mark.parametrize(
    ("counts", "n", "m"),
    [
        ([6, 6, 6, 6], 4, 2),  # S = N: every speaker in every batch, k_s = B
        ([6, 6, 6, 6, 6], 4, 2),  # S = N + 1
        ([400, 4, 4, 4, 4, 4], 3, 2),  # one giant speaker: only once in each batch
        ([2] * 9, 9, 2),  # one batch
        ([2, 3, 4, 5, 6, 7, 8, 9], 2, 1),
    ],
)
def test_plan_keeps_its_promises_in_corner_cases(counts, n, m):
    check_plan(make(counts, n, m), epoch=0)


def test_plan_keeps_its_promises_on_300_random_skewed_corpora():
    generator = np.random.default_rng(1)
    cases = 0
    while cases < 300:
        counts = (generator.pareto(1.0, int(generator.integers(2, 60))) * 5).astype(int)
        m, cap = int(generator.integers(1, 4)), int(generator.integers(4, 60))
        groups = np.minimum(counts, cap) // m
        usable = int((groups > 0).sum())
        if usable < 2:
            continue
        n = int(generator.integers(1, usable + 1))
        sampler = make(counts, n, m, cap=cap, seed=cases)
        assert sampler.steps == best_steps_by_trying(groups[groups > 0].tolist(), n)
        plan = check_plan(sampler, epoch=cases % 3)
        assert sampler.groups.sum() - plan.shape[0] * n < n  # fewer than N groups left over
        check_plan(make(counts, n, m, cap=cap, seed=cases, balanced=True), epoch=0, balanced=True)
        cases += 1


def test_steps_per_epoch_of_a_worked_example():
    # 3 speakers of 5, 2 and 1 groups, 2 a batch: B = 3 gives min(5,3) + 2 + 1 = 6 = 2 * 3; B = 4 gives 7 < 8.
    assert steps_per_epoch(np.array([5, 2, 1]), 2) == 3


def test_epochs_differ_and_the_same_epoch_repeats():
    a, b = make([10] * 12, 4, 2, seed=5), make([10] * 12, 4, 2, seed=5)
    assert np.array_equal(a.plan(3), b.plan(3))
    assert not np.array_equal(a.plan(3), b.plan(4))
    assert not np.array_equal(a.plan(3), make([10] * 12, 4, 2, seed=6).plan(3))


def test_deal_is_fair_over_seeds():
    # Every pair of 6 speakers meets equally often: 3 batches of 4 out of 6 speakers hold 18 of 15 possible pairs a epoch.
    met = np.zeros((6, 6))
    for seed in range(400):
        sampler = make([4] * 6, 4, 2, seed=seed)
        for batch in sampler.plan(0)[:, :, 0] // 4:
            for a, b in itertools.combinations(sorted(batch), 2):
                met[a, b] += 1
    seen = met[np.triu_indices(6, 1)]
    expected = 400 * 3 * 6 / 15  # 480 a pair, standard deviation below 22
    assert np.abs(seen - expected).max() < 5 * np.sqrt(expected)


def test_balanced_epoch_gives_every_speaker_the_same_number_of_groups():
    sampler = make([2, 4, 8, 16, 32, 64], 3, 2, balanced=True)
    plan = check_plan(sampler, 0, balanced=True)
    counts = np.bincount(np.searchsorted(np.cumsum(sampler.counts), plan[:, :, 0].ravel(), side="right"), minlength=6)
    assert counts.max() - counts.min() <= 1 + sampler.n_speakers // 6 + 1
    assert plan.shape[0] == (6 * (63 // 6)) // 3  # 63 groups in all, 10 for each of 6 speakers, 3 a batch


def test_cap_limits_the_utterances_of_a_speaker():
    sampler = make([100, 100, 100], 3, 2, cap=11)
    assert sampler.steps == 5 and sampler.plan(0).size == 30


def test_fewer_usable_speakers_than_a_batch_is_an_error_that_counts_them():
    with pytest.raises(
        SamplerError, match=r"2 speakers have at least 3 utterances \(2 have fewer\).*speakers_per_batch=4"
    ):
        make([3, 2, 5, 1], 4, 3)


def test_speakers_with_fewer_than_m_utterances_are_left_out_and_counted():
    sampler = make([1, 4, 4, 1, 4], 2, 2)
    assert sampler.too_short == 2
    used = np.unique(np.searchsorted([1, 5, 9, 10, 14], sampler.plan(0).ravel(), side="right"))
    assert set(used) == {1, 2, 4}


def test_excluded_speakers_never_stand_in_a_batch():
    sampler = make([4] * 6, 3, 2, excluded=[False, True, False, False, True, False])
    assert set((np.concatenate([sampler.plan(e).ravel() for e in range(5)]) // 4).tolist()) == {0, 2, 3, 5}


def test_loss_to_the_one_place_rule_is_measured():
    # 100 groups of one speaker, 3 of each of two others, 2 a batch: B = 6, so the giant loses 94 of 106 groups.
    sampler = make([100, 3, 3], 2, 1)
    assert sampler.steps == 6 and sampler.lost_fraction == pytest.approx(94 / 106)


def test_a_formula_keeps_the_promises_of_the_table_on_random_skewed_corpora():
    generator = np.random.default_rng(2)
    cases = crossed = 0
    while cases < 50:
        counts = (generator.pareto(1.0, int(generator.integers(2, 40))) * 5).astype(int)
        m, cap = int(generator.integers(1, 4)), int(generator.integers(4, 40))
        groups = np.minimum(counts, cap) // m
        usable = int((groups > 0).sum())
        if usable < 2:
            continue
        n = int(generator.integers(1, usable + 1))
        sampler = make(counts, n, m, cap=cap, seed=cases, plan="formula")
        plan = check_plan(sampler, epoch=cases % 3)
        assert sampler.groups.sum() - plan.shape[0] * n < n  # fewer than N groups left over
        crossed += bool(sampler._of(cases % 3).changed)
        check_plan(make(counts, n, m, cap=cap, seed=cases, balanced=True, plan="formula"), epoch=0, balanced=True)
        cases += 1
    assert crossed > 12  # corpora in which a speaker would have met itself


def test_a_formula_gives_any_batch_alone_and_differs_between_epochs_and_seeds():
    sampler = make([10] * 12, 4, 2, seed=5, plan="formula")
    plan = sampler.plan(3)
    again = make([10] * 12, 4, 2, seed=5, plan="formula")
    assert all(np.array_equal(again.batch(3, step), plan[step]) for step in (7, 0, 14))
    assert not np.array_equal(plan, sampler.plan(4))
    assert not np.array_equal(plan, make([10] * 12, 4, 2, seed=6, plan="formula").plan(3))
    assert sampler.fingerprint() != make([10] * 12, 4, 2, seed=5).fingerprint()  # a run keeps the one it began with


def test_a_formula_is_fair_over_seeds():
    met = np.zeros((6, 6))
    for seed in range(200):
        for batch in make([4] * 6, 4, 2, seed=seed, plan="formula").plan(0)[:, :, 0] // 4:
            for a, b in itertools.combinations(sorted(batch), 2):
                met[a, b] += 1
    expected = 200 * 3 * 6 / 15
    assert np.abs(met[np.triu_indices(6, 1)] - expected).max() < 5 * np.sqrt(expected)


def test_small_data_have_a_table_and_large_ones_a_formula():
    assert not make([10] * 12, 4, 2).formula
    assert make([100] * 200_000, 512, 2).formula  # 20 million utterances
    assert not make([100] * 200_000, 512, 2, plan="table").formula
    assert not make([100_000] * 300, 256, 2, cap=100_000).formula  # as many, but every speaker crosses the end of a row


@pytest.mark.slow
def test_100_million_utterances_take_less_than_100_mb_a_worker_and_2_seconds_to_the_first_batch():
    code = """
import resource, time, numpy as np
from spknet.data.sampler import Sampler
counts = np.random.default_rng(0).integers(20, 181, 1_000_000)
rows = np.concatenate([[0], np.cumsum(counts)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sampler = Sampler(rows, speakers_per_batch=1024, utterances_per_speaker=2, cap=500, seed=0)
assert sampler.formula and 95e6 < rows[-1] < 105e6, rows[-1]
begun = time.process_time()
first = sampler.batch(1, 0)
print(time.process_time() - begun, end=" ")
begun = time.process_time()
for step in range(10):
    batch = sampler.batch(1, step)
print((time.process_time() - begun) / 10, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    first, later, mebibytes = map(float, told.split())
    print(f"first batch {first:.2f} s, later {1000 * later:.0f} ms, {mebibytes:.0f} MiB")
    assert first < 2 and mebibytes < 100
