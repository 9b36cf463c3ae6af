"""Schedules as functions of the step, worked by hand."""

import pytest

from spknet.config import LossConfig, OptimConfig
from spknet.train.optim import learning_rate, margin


def rates(config, steps, per_epoch=5, total=11):
    return [learning_rate(config, step, per_epoch, total) for step in steps]


def test_step_schedule_decays_every_so_many_epochs():
    config = OptimConfig(lr=8.0, schedule="step", lr_decay=0.5, lr_decay_epochs=2)
    assert rates(config, [0, 9, 10, 19, 20]) == [8, 8, 4, 4, 2]


def test_warmup_grows_to_the_peak_and_cosine_falls_to_its_end():
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=4, final_lr_fraction=0.2)
    assert rates(config, [0, 1, 2, 3]) == [0.25, 0.5, 0.75, 1.0]
    # after 4 warm-up steps: from 1 at step 4 to 0.2 at step 10, halfway (0.6) at step 7
    assert rates(config, [4, 7, 10, 50]) == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_constant_is_constant():
    assert set(rates(OptimConfig(lr=0.3, schedule="constant"), range(50))) == {0.3}


def test_margin_grows_over_its_warmup():
    config = LossConfig(margin=0.2, margin_warmup_steps=10)
    assert [margin(config, step) for step in (0, 5, 10, 99)] == pytest.approx([0, 0.1, 0.2, 0.2])
    assert margin(LossConfig(margin=0.3), 0) == 0.3
