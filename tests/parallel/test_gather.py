"""The gradient through gather_rows is that of one rank with the whole batch."""

import pytest
import torch

from spknet.parallel.gather import all_reduce_sum, gather_rows
from tests.ranks import run_ranks


def problem():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, dtype=torch.float64, generator=generator), torch.randn(
        5, 3, dtype=torch.float64, generator=generator
    )


def loss_of_rows(own, every, first):
    # Each row against all rows: every row matters to the loss of every rank.
    scores = torch.tanh(own @ every.T)
    return torch.nn.functional.cross_entropy(scores, torch.arange(first, first + len(own)))


def of_rank(rank, world):
    x, weight = problem()
    weight.requires_grad_()
    n = 8 // world
    own = x[rank * n : (rank + 1) * n] @ weight
    loss = loss_of_rows(own, gather_rows(own), rank * n)
    loss.backward()
    mean = all_reduce_sum(weight.grad) / world  # what DDP does
    return float(all_reduce_sum(loss)) / world, mean.numpy()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_and_ddp_mean_gradient_equal_one_rank(world):
    x, weight = problem()
    weight.requires_grad_()
    rows = x @ weight
    expected = loss_of_rows(rows, rows, 0)
    expected.backward()
    for loss, gradient in run_ranks(world, of_rank):
        assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
        torch.testing.assert_close(torch.from_numpy(gradient), weight.grad, rtol=1e-11, atol=1e-13)


def rows_in_order(rank, world):
    return gather_rows(torch.full((2, 1), float(rank))).flatten().tolist()


def test_rows_come_in_rank_order():
    assert run_ranks(3, rows_in_order) == [[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]] * 3
