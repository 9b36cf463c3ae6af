"""The head in pieces: equal bits on any number of ranks, and a plain dense cross entropy's numbers."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spknet.config import ConfigError, LossConfig, OptimConfig
from spknet.losses import build_loss
from spknet.losses.sharded import Sharded
from spknet.parallel.tree import Tree, owned, subtrees, tree_sum
from spknet.train.optim import build_optimizer, clip_gradients
from tests.ranks import run_ranks

SPEAKERS, DIMENSIONS, STEPS = 12, 24, 20
KINDS = [
    ("softmax", {}),
    ("amsoftmax", {}),
    ("aamsoftmax", {"beyond_pi": "continuous"}),
    ("aamsoftmax", {"sub_centers": 3}),
    ("aamsoftmax", {"sub_centers": 2, "top_k": 4}),
    ("sphereface2", {}),
    ("sphereface2", {"margin_type": "A"}),
]
CASES = [LossConfig(name=name, margin=0.2, sharded=True, shards=8, **more) for name, more in KINDS]
SIZES = (21, 5)  # classes: neither is a multiple of the 8 pieces, and with 5 some pieces are empty
ADAM = OptimConfig(lr=0.01, weight_decay=0.1)


def batch(step: int, classes: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (speakers, M, D) and labels of the global batch; every third step all labels lie in the last piece."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SPEAKERS, 2, DIMENSIONS, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, classes, (SPEAKERS,), generator=generator)
    return x, torch.full_like(labels, classes - 1) if step % 3 == 2 else labels


def fresh(config: LossConfig, classes: int, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(1)
    return build_loss(config, DIMENSIONS, classes, 2).to(dtype)


def trained(rank: int, world: int, dtype: torch.dtype) -> list:
    """For each case 20 steps of Adam: what they told, the gradients of own embeddings, and the rows in the end."""
    results = []
    for classes in SIZES:
        for config in CASES:
            loss = fresh(config, classes, dtype)
            parameters = [*loss.parameters(), *loss.shards()]
            optimizer = build_optimizer(ADAM, parameters) if parameters else None
            told, gradients = [], []  # every rank says: loss, accuracy, squared norm
            for step in range(STEPS):
                x, labels = batch(step, classes, dtype)
                own = x.chunk(world)[rank].clone().requires_grad_()
                loss.zero_grad()
                for p in loss.shards():
                    p.grad = None
                value, accuracy = loss(own, labels.chunk(world)[rank], None)
                value.backward()
                told.append((value.item(), accuracy.item(), loss.squared_gradient().item()))
                gradients.append((own.grad / world).numpy())
                if optimizer:
                    optimizer.step()
            rows = [(piece.first, [p.detach().numpy() for p in piece.parameters()]) for piece in loss.pieces]
            shared = [p.detach().numpy() for p in loss.parameters()]
            results.append({"told": told, "gradients": gradients, "rows": rows, "shared": shared})
    return results


def same(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) and all((a == b).all() for a, b in zip(ours, theirs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ranks_have_the_bits_of_one(dtype):
    one = trained(0, 1, dtype)
    for world in (2, 3, 4):
        every = run_ranks(world, trained, dtype)
        for k, alone in enumerate(one):
            assert all(found[k]["told"] == alone["told"] for found in every)
            for step in range(STEPS):
                parts = torch.cat([torch.from_numpy(found[k]["gradients"][step]) for found in every])
                if world != 3:  # dividing by 3 rounds
                    assert torch.equal(parts, torch.from_numpy(alone["gradients"][step]))
            rows = sum((found[k]["rows"] for found in every), [])
            assert [first for first, _ in rows] == [first for first, _ in alone["rows"]]
            assert all(same(ours, theirs) for (_, ours), (_, theirs) in zip(rows, alone["rows"]))
            assert all(same(found[k]["shared"], alone["shared"]) for found in every)


def dense_of(head: Sharded, config: LossConfig, classes: int) -> torch.nn.Module:
    """The whole head with the same weights."""
    dense = build_loss(dataclasses.replace(config, sharded=False), DIMENSIONS, classes, 2).double()
    with torch.no_grad():
        dense.weight.copy_(torch.cat([piece.weight for piece in head.pieces]))
        if dense.bias is not None:
            dense.bias.copy_(torch.cat([piece.bias for piece in head.pieces]))
    return dense


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.name}-{c.sub_centers}-{c.top_k}-{c.margin_type}")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_pieces_have_the_numbers_of_a_dense_head_in_float64(config, dtype, tolerance):
    for classes in SIZES:
        head = fresh(config, classes, dtype)
        dense = dense_of(head, config, classes)
        if config.name == "sphereface2":
            with torch.no_grad():
                dense.offset.fill_(-0.3)
                head.rule.offset.fill_(-0.3)
        x, labels = batch(0, classes, dtype)
        ours, theirs = x.requires_grad_(), x.detach().double().requires_grad_()
        value, accuracy = head(ours, labels, None)
        expected, right = dense(theirs, labels, None)
        value.backward()
        expected.backward()
        assert value.item() == pytest.approx(expected.item(), rel=tolerance)
        assert accuracy.item() == pytest.approx(right.item(), abs=1e-9)
        assert (ours.grad - theirs.grad).norm() < 3 * tolerance * theirs.grad.norm()
        rows = torch.cat([piece.weight.grad for piece in head.pieces])
        assert (rows - dense.weight.grad).norm() < 3 * tolerance * dense.weight.grad.norm()
        if config.name == "sphereface2":
            assert head.rule.offset.grad.item() == pytest.approx(dense.offset.grad.item(), rel=tolerance)
        if config.name == "softmax":
            biases = torch.cat([piece.bias.grad for piece in head.pieces])
            assert (biases - dense.bias.grad).abs().max() < tolerance


def test_no_cosine_is_too_low_for_float32():
    # All cosines are -1, s = 64: exp(64 (-1 - 1)) is 0 in float32, which a constant shift by s would meet.
    head = fresh(LossConfig(name="amsoftmax", margin=0.0, scale=64, sharded=True, shards=4), 6, torch.float32)
    with torch.no_grad():
        for piece in head.pieces:
            piece.weight.zero_()[:, 0] = -1
    x = torch.zeros(2, 1, DIMENSIONS)
    x[..., 0] = 1
    value, _ = head(x.requires_grad_(), torch.tensor([0, 5]), None)
    value.backward()
    assert value.item() == pytest.approx(math.log(6), rel=1e-6) and x.grad.isfinite().all()


def test_no_tensor_of_batch_times_classes_exists():
    head = fresh(LossConfig(name="aamsoftmax", sharded=True, shards=64), 6400, torch.float32)
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                largest[0] = max(largest[0], value.numel() if isinstance(value, torch.Tensor) else 0)
            return result

    x = torch.randn(32, 2, DIMENSIONS, requires_grad=True)
    with Watch():
        value, _ = head(x, torch.arange(32), None)
        value.backward()
    assert largest[0] == 64 * 4 * 64  # the (P, 4, B) numbers of the pieces; (B, N / P) is 64 * 100, (B, N) 64 * 6400


def test_initial_weights_belong_to_the_class_and_not_to_ranks_or_pieces():
    rows = []
    for pieces in (1, 4, 64):
        head = fresh(LossConfig(name="aamsoftmax", sub_centers=2, sharded=True, shards=pieces), 50, torch.float32)
        rows.append(torch.cat([piece.weight.detach() for piece in head.pieces]))
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert rows[0].std().item() == pytest.approx(math.sqrt(2 / (100 + DIMENSIONS)), rel=0.05)
    assert abs(rows[0].mean().item()) < 0.02 and len(rows[0].unique()) > 0.99 * rows[0].numel()


def test_the_tree_adds_in_one_order_however_the_pieces_are_cut():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(16, 3, generator=generator) * 10 ** torch.arange(-8, 8).float()[:, None]
    expected = tree_sum(values)
    for cuts in ((0, 16), (0, 5, 11, 16), (0, 1, 2, 3, 16), (0, 0, 8, 16)):
        whole = Tree()
        for a, b in zip(cuts, cuts[1:]):
            part = Tree()
            for piece in range(a, b):
                part.add(piece, 1, values[piece].clone())
            assert [(first, size) for first, size, _ in part.nodes] == subtrees(range(a, b))
            for node in part.nodes:
                whole.add(*node)
        assert torch.equal(whole.nodes[0][2], expected) and len(whole.nodes) == 1
    assert list(owned(64)) == list(range(64))


def clipped(rank: int, world: int) -> tuple[float, float, float]:
    """Norm of the gradient before, and of one weight's gradient after clipping to 1."""
    network = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    head = fresh(CASES[0], 21, torch.float64)
    network.grad = torch.full((4,), 3.0, dtype=torch.float64)
    for piece in head.pieces:
        piece.weight.grad, piece.bias.grad = torch.ones_like(piece.weight), torch.full_like(piece.bias, 2)
    norm = clip_gradients([network], head.shards(), head.squared_gradient(), 1.0)
    own = head.pieces[0].bias.grad[0].item() if head.pieces else 2 / norm.item()
    return norm.item(), network.grad[0].item(), own


def test_clipping_sees_the_norm_over_all_ranks():
    norm = math.sqrt(4 * 9 + 21 * DIMENSIONS + 21 * 4)
    for world in (1, 2):
        for found in run_ranks(world, clipped) if world > 1 else [clipped(0, 1)]:
            assert found == pytest.approx((norm, 3 / norm, 2 / norm), rel=1e-6)


def test_a_head_is_cut_by_itself_from_a_size_on_or_as_told():
    assert not isinstance(build_loss(LossConfig(name="aamsoftmax"), 192, 5994, 2), Sharded)
    assert isinstance(build_loss(LossConfig(name="aamsoftmax"), 512, 2**15, 2), Sharded)
    assert not isinstance(build_loss(LossConfig(name="aamsoftmax", sharded=False), 512, 2**15, 2), Sharded)
    assert not isinstance(build_loss(LossConfig(name="softmaxproto"), 512, 2**15, 2), Sharded)
    with pytest.raises(
        ConfigError, match="loss.sharded true: angleproto has no head that can be cut; these have: softmax"
    ):
        build_loss(LossConfig(sharded=True), 8, 10, 2)


def sampled(rank: int, world: int) -> list:
    """Steps with a tenth of 200 classes: what they told, the rows, moments and last steps in the end."""
    results = []
    for name, centers in (("softmax", 1), ("aamsoftmax", 2), ("sphereface2", 1)):
        config = LossConfig(name=name, margin=0.2, sharded=True, shards=8, sample=0.1, sub_centers=centers)
        loss, told = fresh(config, 200, torch.float64), []
        optimizer = build_optimizer(ADAM, [], loss.parameters(), loss.shards())
        for loss.step in range(8):
            x, labels = batch(loss.step, 200, torch.float64)
            loss.zero_grad()
            value, accuracy = loss(x.chunk(world)[rank].clone().requires_grad_(), labels.chunk(world)[rank], None)
            value.backward()
            with loss.updating(optimizer) as shards:
                norm = clip_gradients(loss.parameters(), shards, loss.squared_gradient(), 0.5)
                optimizer.step()
            told.append((value.item(), accuracy.item(), norm.item()))
        rows = [(p.first, p.weight.detach().numpy(), p.seen.numpy()) for p in loss.pieces]
        results.append((told, rows, [optimizer.state[p.weight]["exp_avg"].numpy() for p in loss.pieces]))
    return results


def test_a_sample_is_the_same_on_any_number_of_ranks():
    one = sampled(0, 1)
    every = run_ranks(2, sampled)
    for k, (told, rows, moments) in enumerate(one):
        assert all(found[k][0] == told for found in every)
        theirs = sum((found[k][1] for found in every), [])
        assert all(a[0] == b[0] and same(a[1:], b[1:]) for a, b in zip(rows, theirs))
        assert same(moments, sum((found[k][2] for found in every), []))


def test_only_the_sample_moves_and_it_holds_every_right_class():
    loss = fresh(LossConfig(name="amsoftmax", sharded=True, shards=4, sample=0.2), 500, torch.float64)
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=0.1, weight_decay=0.5), [], [], loss.shards())
    counts = np.zeros(500)
    for loss.step in range(60):
        before = torch.cat([p.weight.detach().clone() for p in loss.pieces])
        x, _ = batch(loss.step, 10, torch.float64)
        labels = torch.arange(SPEAKERS) * 40 + loss.step % 40
        value, _ = loss(x.requires_grad_(), labels, None)
        value.backward()
        chosen = torch.cat([view.sample for view in loss.active])
        assert set(labels.tolist()) <= set(chosen.tolist())
        with loss.updating(optimizer):
            optimizer.step()
        after = torch.cat([p.weight.detach() for p in loss.pieces])
        assert (before != after).any(dim=1).nonzero()[:, 0].tolist() == sorted(chosen.tolist())
        counts[chosen.numpy()] += 1
    # 60 draws of 0.2 with 12 of 500 besides: 12.2 of 60, standard deviation 3.1
    assert counts.mean() == pytest.approx(60 * (0.2 + 0.8 * 12 / 500), rel=0.03) and counts.max() < 12 + 6 * 3.1


def test_decay_is_made_up_for_when_a_row_is_sampled_again():
    loss = fresh(LossConfig(name="softmax", sharded=True, shards=1, sample=1e-9), 3, torch.float64)
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=0.1, weight_decay=0.5, momentum=0.0), [], [], loss.shards())
    start, x = loss.pieces[0].weight.detach().clone(), torch.zeros(1, 1, DIMENSIONS, dtype=torch.float64)
    for loss.step, label in enumerate((0, 1, 1, 0)):  # a sample of one class has no gradient: decay alone
        loss(x.clone().requires_grad_(), torch.tensor([label]), None)[0].backward()
        with loss.updating(optimizer):
            optimizer.step()
    factors = loss.pieces[0].weight.detach()[:, 0] / start[:, 0]
    # 1 - 0.1 x 0.5 for each of the steps: 4 for class 0 (two of them made up), 3 for class 1, none yet for class 2
    assert factors.tolist() == pytest.approx([0.95**4, 0.95**3, 1])


def test_a_full_sample_is_the_whole_head():
    config = LossConfig(name="aamsoftmax", sharded=True, shards=4, margin=0.2)
    whole = fresh(config, 21, torch.float64)
    nearly = fresh(dataclasses.replace(config, sample=1 - 1e-9), 21, torch.float64)
    x, labels = batch(0, 21, torch.float64)
    assert whole(x, labels, None)[0].item() == nearly(x, labels, None)[0].item()
    assert len(torch.cat([view.sample for view in nearly.active])) == 21
