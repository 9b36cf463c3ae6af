"""Draws are functions of their key, uniform, and independent of what else is drawn."""

import numpy as np
import pytest
import torch
from torch import nn

from spknet import rng


def test_uniform_does_not_depend_on_what_is_drawn_beside_it():
    whole = rng.uniform(3, 1, "crop", np.arange(1000))
    assert np.array_equal(whole[400:500], rng.uniform(3, 1, "crop", np.arange(400, 500)))
    assert whole[7] == rng.uniform(3, 1, "crop", np.array([7]))[0]


def test_every_part_of_the_key_changes_the_draws():
    base = rng.uniform(3, 1, "crop", np.arange(100))
    for other in [(4, 1, "crop"), (3, 2, "crop"), (3, 1, "noise")]:
        assert np.abs(base - rng.uniform(*other, np.arange(100))).min() > 0


def test_draws_are_uniform_and_uncorrelated():
    x = rng.uniform(0, 0, "t", np.arange(200_000))
    assert x.min() >= 0 and x.max() < 1
    counts = np.histogram(x, bins=100, range=(0, 1))[0]
    chi2 = ((counts - 2000) ** 2 / 2000).sum()
    assert 50 < chi2 < 170  # 99 degrees of freedom
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.01
    y = rng.uniform(0, 1, "t", np.arange(200_000))
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.01


def test_bits_of_names_are_those_of_their_tags():
    names = ["id00012", "", "Ünïcode", "x" * 90]
    one_by_one = [rng.bits(3, 1, "dev " + name, np.zeros(1))[0] for name in names]
    assert rng.bits_of_names(3, 1, "dev ", names).tolist() == one_by_one


def test_streams_of_different_keys_differ_and_repeat():
    assert rng.stream(1, 0, "a").integers(1 << 60) == rng.stream(1, 0, "a").integers(1 << 60)
    seen = {
        rng.stream(s, e, t, i).integers(1 << 60) for s in (0, 1) for e in (0, 1) for t in ("a", "b") for i in (0, 1)
    }
    assert len(seen) == 16


def test_stream_refuses_a_key_that_seedsequence_would_split():
    with pytest.raises(ValueError, match="seed 4294967296"):
        rng.stream(2**32, 0, "a")


def test_initial_weights_depend_on_seed_and_name_only():
    class Net(nn.Module):
        def __init__(self, extra):
            super().__init__()
            if extra:
                self.before = nn.Linear(3, 3)
            self.layer = nn.Linear(4, 5)

    torch.manual_seed(11)
    plain, more = Net(False), Net(True)
    state = torch.get_rng_state()
    rng.initialize(plain, 7)
    rng.initialize(more, 7)
    assert torch.equal(plain.layer.weight, more.layer.weight)
    assert torch.equal(state, torch.get_rng_state())
    rng.initialize(more, 8)
    assert not torch.equal(plain.layer.weight, more.layer.weight)
