"""The gradient through gather_rows is that of one rank with the whole batch."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from spknet.parallel import gather, wires
from spknet.parallel.gather import all_reduce_sum, gather_rows
from spknet.parallel.ranks import peer_lost
from spknet.parallel.wires import LIMIT
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


def both_ways(rank, world):
    put_up, found = gather.wires, []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        for size in (1, 7, LIMIT // dtype.itemsize, LIMIT // dtype.itemsize + 1):  # the last goes to the process group
            rows = (torch.randn(size) * 100 + rank).to(dtype)
            gather.wires = put_up
            one = gather.gather_detached(rows)
            gather.wires = None
            found.append(torch.equal(one, gather.gather_detached(rows)))
    gather.wires = put_up
    return put_up is not None, found


@pytest.mark.parametrize("world", [2, 4])
def test_wires_and_process_group_gather_the_same(world):
    for has_wires, equal in run_ranks(world, both_ways):
        assert has_wires and len(equal) == 16 and all(equal)


def many_at_once(rank, world):
    # More ranks than cores, so that some are always late and messages pile up: none is lost, mixed up or waited for in vain.
    rows = torch.full((LIMIT // 4,), float(rank))
    return [bool((gather_rows(rows + i) == gather_rows(rows) + i).all()) for i in range(50)]


def test_messages_of_the_largest_size_do_not_block():
    assert run_ranks(4, many_at_once) == [[True] * 50] * 4


def one_leaves(rank, world):
    gather_rows(torch.ones(3))
    if rank == 1:
        child = os.fork()
        if child == 0:  # as a loader's worker does, it holds copies of the sockets and outlives them
            time.sleep(60)
            os._exit(0)
        gather.wires.close()
        dist.barrier()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None
    try:
        for _ in range(3):
            gather_rows(torch.ones(3))
    except RuntimeError as error:
        dist.barrier()
        return str(error), peer_lost(error)


def test_a_rank_that_is_gone_is_named():
    first, _ = run_ranks(2, one_leaves, timeout=30)
    assert first == ("rank 1 is gone: Connection closed by peer", True)


def without_wires(rank, world):
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wires, "_machine", lambda: f"machine {rank}")
        found.append(wires.put_up(rank, world, 10))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(wires.tempfile, "TemporaryDirectory", full_disk)
        found.append(wires.put_up(rank, world, 10))
    gather.wires = None
    return found, gather_rows(torch.tensor([rank])).tolist()


def full_disk(**_):
    raise OSError(28, "No space left on device")


def test_ranks_on_several_machines_or_without_sockets_use_the_process_group():
    assert run_ranks(3, without_wires) == [([None, None], [0, 1, 2])] * 3
