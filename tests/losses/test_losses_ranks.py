"""Every loss over several gloo ranks has the value and the gradient it has on one rank with the whole batch."""

import pytest
import torch

from spknet.config import LossConfig
from spknet.losses import LOSSES, build_loss
from tests.ranks import run_ranks

SPEAKERS, DIMENSIONS, CLASSES = 8, 6, 20
CASES = [LossConfig(name=name, margin=0.3, hard_rank=2) for name in LOSSES]
CASES += [
    LossConfig(name="aamsoftmax", beyond_pi="continuous", sub_centers=3),
    LossConfig(name="aamsoftmax", sub_centers=2, top_k=4),
    LossConfig(name="amsoftmax", top_k=2),
    LossConfig(name="sphereface2", margin_type="A"),
    LossConfig(name="angleproto", normalize_embeddings=True),
    LossConfig(name="ge2e", cosine_floor=1e-6),
    LossConfig(name="triplet", margin=0.3, hard_rank=0, hard_prob=1.0),
    LossConfig(name="triplet", margin=0.1, hard_rank=-1),
    LossConfig(name="triplet", margin=0.1, hard_rank=-1, semi_hard_fallback="skip"),  # the count depends on the data
    LossConfig(name="contrastive", margin=0.1, hard_rank=-1, semi_hard_fallback="skip"),
]


def utterances(config: LossConfig) -> int:
    return 2 if LOSSES[config.name].most == 2 else 3


def batch(config: LossConfig):
    """Inputs (speakers, M, features), labels and draws of the global batch; two slots hold one speaker."""
    torch.manual_seed(3)
    x = torch.randn(SPEAKERS, utterances(config), 5, dtype=torch.float64)
    labels = torch.tensor([3, 11, 0, 7, 7, 2, 19, 5])
    return x, labels, torch.rand(SPEAKERS, 2, dtype=torch.float64)


def network_and_loss(config: LossConfig):
    torch.manual_seed(4)
    network = torch.nn.Linear(5, DIMENSIONS).double()
    return network, build_loss(config, DIMENSIONS, CLASSES, utterances(config)).double()


def values_and_gradients(rank: int, world_size: int) -> list:
    """For each case the mean over ranks of L_r, of the accuracy and of each parameter's gradient, as DDP takes it."""
    results = []
    for config in CASES:
        x, labels, draws = (t.chunk(world_size)[rank] for t in batch(config))
        network, loss = network_and_loss(config)
        value, accuracy = loss(network(x), labels, draws)
        value.backward()
        parameters = [*network.parameters(), *loss.parameters()]
        told = [value.detach().reshape(1), accuracy.reshape(1), *(p.grad.flatten() for p in parameters)]
        total = torch.cat(told)
        if world_size > 1:
            torch.distributed.all_reduce(total)
        results.append((total / world_size).tolist())
    return results


@pytest.fixture(scope="module")
def one_rank():
    return values_and_gradients(0, 1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_have_the_value_and_gradient_of_one(one_rank, world_size):
    every = run_ranks(world_size, values_and_gradients)
    for found in every:
        for config, expected, got in zip(CASES, one_rank, found):
            expected, got = (torch.tensor(v, dtype=torch.float64) for v in (expected, got))
            scale = expected[2:].norm() + 1  # parameters whose gradient is zero have rounding instead
            assert abs(got[0] - expected[0]) <= 1e-9 * abs(expected[0]), config
            assert abs(got[1] - expected[1]) <= 1e-9, config
            assert (got[2:] - expected[2:]).norm() <= 1e-9 * scale, config


def test_some_anchors_have_no_semi_hard_negative():
    """What the cases above with a data-dependent count stand on."""
    for config in CASES[-2:]:
        x, labels, draws = batch(config)
        network, loss = network_and_loss(config)
        found = loss.pairs(network(x), labels, draws)[2]
        counts = [int(part.sum()) for part in found.chunk(4)]
        assert 0 < sum(counts) < SPEAKERS and len(set(counts)) > 1
