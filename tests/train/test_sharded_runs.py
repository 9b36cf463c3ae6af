"""Runs whose head is cut over the ranks: equal on any number of them, continued on another number, after kills."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from spknet.checkpoints.file import load_network
from spknet.train.metrics_log import read_metrics
from tests.ranks import run_ranks, train
from tests.train.test_kill import assert_same_run, start


@pytest.fixture
def sharded(options):
    """Words of a tiny run with 12 classes in 8 pieces, four of them with one class."""
    words = "--loss.name aamsoftmax --loss.sharded true --loss.shards 8 --optim.clip_norm 1 --optim.weight_decay 0.001"
    return [*options, *words.split()]


def rows_of(folder, step: int) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """Ranges, weights and first moments of a checkpoint's head, read without spknet."""
    base = folder / f"checkpoints/step-{step:08d}"
    index = json.loads((base / "index.json").read_text())
    files = [torch.load(base / entry["name"], weights_only=True) for entry in index["files"]]
    ranges = [(file["first"], file["last"]) for file in files]
    weights = torch.cat([file["values"]["weight"] for file in files])
    moments = torch.cat([file["moments"]["weight"]["exp_avg"] for file in files])
    return ranges, weights.numpy(), moments.numpy()


def losses(lines) -> list[float]:
    return [line["loss"] for line in lines]


def test_a_run_on_2_and_4_ranks_is_that_of_one_and_its_rows_lie_in_class_order(sharded, tmp_path):
    words = [*sharded, "--train.max_steps", "6", "--train.save_every_steps", "3"]
    one = train(1, [*words, "--run_dir", str(tmp_path / "1")])
    for world in (2, 4):
        lines = train(world, [*words, "--run_dir", str(tmp_path / str(world))])
        assert losses(lines) == pytest.approx(losses(one), rel=1e-8)
        assert [line["accuracy"] for line in lines] == [line["accuracy"] for line in one]
    ranges, weights, moments = rows_of(tmp_path / "1", 6)
    assert ranges == [(0, 1), (1, 3), (3, 4), (4, 6), (6, 7), (7, 9), (9, 10), (10, 12)]
    for world in (2, 4):
        their_ranges, their_weights, their_moments = rows_of(tmp_path / str(world), 6)
        assert their_ranges == ranges
        assert np.abs(their_weights - weights).max() < 1e-8 and np.abs(their_moments - moments).max() < 1e-8


def test_4_to_2_to_1_to_4_ranks_continue_as_one_run(sharded, tmp_path):
    words = [*sharded, "--run_dir", str(tmp_path / "elastic"), "--train.save_every_steps", "2"]
    for world, steps in ((4, 3), (2, 6), (1, 9), (4, 12)):
        train(world, [*words, "--train.max_steps", str(steps)])
    one = train(1, [*sharded, "--run_dir", str(tmp_path / "one"), "--train.max_steps", "12"])
    elastic = read_metrics(tmp_path / "elastic/metrics.jsonl")
    assert [line["step"] for line in elastic] == list(range(1, 13))
    assert losses(elastic) == pytest.approx(losses(one), rel=1e-8)
    kept = {path.stem for path in (tmp_path / "elastic/checkpoints").glob("*.pt")}
    assert {path.name for path in (tmp_path / "elastic/checkpoints").iterdir() if path.is_dir()} == kept
