"""Global BatchNorm on W ranks against torch's own BatchNorm on the whole batch."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from spknet.config import ConfigError
from spknet.parallel import batchnorm
from spknet.parallel.batchnorm import GlobalBatchNorm, check_groups, globalize
from spknet.parallel.gradients import AveragedGradients
from tests.ranks import run_ranks


def data(channels_last):
    generator = torch.Generator().manual_seed(3)
    x = 5 + 2 * torch.randn(8, 6, 5, 4, dtype=torch.float64, generator=generator)
    dy = torch.randn(8, 6, 5, 4, dtype=torch.float64, generator=generator)
    layer = nn.BatchNorm2d(6, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(6, generator=generator) + 0.5)
        layer.bias.copy_(torch.randn(6, generator=generator))
    return (x.to(memory_format=torch.channels_last) if channels_last else x), dy, layer


def run(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean.clone(), layer.running_var.clone()


def of_rank(rank, world, channels_last):
    x, dy, layer = data(channels_last)
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    layer = globalize(nn.Sequential(copy.deepcopy(layer)))[0]
    assert isinstance(layer, GlobalBatchNorm)
    return [t.numpy() for t in run(layer, x[rows], dy[rows])]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_output_gradients_and_statistics_equal_those_of_the_whole_batch(world, channels_last):
    x, dy, layer = data(channels_last)
    expected = run(layer, x, dy)
    every = [list(map(torch.from_numpy, r)) for r in run_ranks(world, of_rank, channels_last)]
    for i in (0, 1):  # outputs and input gradients: rank after rank
        torch.testing.assert_close(torch.cat([r[i] for r in every]), expected[i], rtol=1e-12, atol=1e-12)
    for i in (2, 3):  # parameter gradients: DDP's mean times W
        torch.testing.assert_close(sum(r[i] for r in every), expected[i], rtol=1e-12, atol=1e-12)
    for i in (4, 5):
        for r in every:
            torch.testing.assert_close(r[i], expected[i], rtol=1e-12, atol=1e-12)


def one_row(rank, world):
    x = torch.arange(12, dtype=torch.float64).reshape(4, 3).square()[rank::world]
    return [t.numpy() for t in run(globalize(nn.Sequential(nn.BatchNorm1d(3, dtype=torch.float64)))[0], x, x.cos())]


def test_one_value_a_channel_on_each_rank_is_enough():
    x = torch.arange(12, dtype=torch.float64).reshape(4, 3).square()
    expected = run(nn.BatchNorm1d(3, dtype=torch.float64), x, x.cos())
    every = [list(map(torch.from_numpy, r)) for r in run_ranks(4, one_row)]
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([r[i] for r in every]), expected[i], rtol=1e-12, atol=1e-12)
    for i in (4, 5):
        torch.testing.assert_close(every[0][i], expected[i], rtol=1e-12, atol=1e-12)


def test_evaluation_is_untouched_and_names_stay():
    plain = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3))
    ours = globalize(copy.deepcopy(plain)).eval()
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 2, 9)
    assert torch.equal(ours(x), plain.eval()(x))


def test_gradient_by_finite_differences():
    layer = GlobalBatchNorm(3).double()
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_input_without_channels_is_an_error():
    with pytest.raises(ValueError, match=r"found shape \(4,\)"):
        GlobalBatchNorm(4)(torch.zeros(4))


LAYOUTS = {"3-D": (4, 6, 10), "NCHW": (4, 6, 5, 7), "channels last": (4, 6, 5, 7)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_keep_what_they_declare_to_torch(layout, dtype):
    """Types, shapes, strides and gradients under fake tensors and the compiler's tracing are those of a call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(LAYOUTS[layout], generator=generator).to(dtype)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.rand(6, generator=generator).to(torch.float64 if dtype == torch.float64 else torch.float32)
    for learns in (False, True):
        arguments = [
            value.clone(memory_format=torch.preserve_format).requires_grad_(learns) for value in (x, weight, weight)
        ]
        torch.library.opcheck(torch.ops.spknet.batch_norm_global.default, (*arguments, 1e-5))
    y, mean, variance = torch.ops.spknet.batch_norm_global(x, weight, weight, 1e-5)
    assert y.stride() == x.stride()
    given = (torch.randn_like(y), x, weight, mean, variance, 1e-5)
    torch.library.opcheck(torch.ops.spknet.batch_norm_global_backward.default, given)
    assert torch.ops.spknet.batch_norm_global_backward(*given)[0].stride() == x.stride()


@torch.library.custom_op("spknet_tests::pure", mutates_args=())
def pure(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    batchnorm.world_size()
    return x.clone()


pure.register_fake(lambda x, weight, bias, eps: torch.empty_like(x))
pure.register_autograd(lambda ctx, dy: (dy, None, None, None))


def test_a_compiler_keeps_every_meeting_of_the_ranks(monkeypatch):
    """Two equal calls, one of whose results nobody uses: of an operator that is declared pure one is left."""
    meetings = []
    monkeypatch.setattr(batchnorm, "world_size", lambda: meetings.append(1) or 1)
    for operator, kept in ((torch.ops.spknet.batch_norm_global, 2), (pure, 1)):

        def twice(x, weight, operator=operator):
            operator(x, weight, weight, 1e-5)
            return operator(x, weight, weight, 1e-5)

        meetings.clear()
        torch.compiler.reset()
        torch.compile(twice, backend="aot_eager")(torch.randn(4, 6, 5, requires_grad=True), torch.ones(6))
        assert len(meetings) == kept


GROUPS = 4


def grouped(rank, world, groups):
    """A network of two BatchNorms, two steps: gradients (mean over ranks), statistics, loss."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(), nn.Linear(40, 6), nn.BatchNorm1d(6)]
    model = globalize(nn.Sequential(*layers).double(), groups)
    generator = torch.Generator().manual_seed(1)
    gradients = AveragedGradients(model.parameters())
    for _ in range(2):
        gradients.clear()
        x, y = (torch.randn(16, *shape, generator=generator, dtype=torch.float64) for shape in ((3, 10), (6,)))
        rows = slice(rank * 16 // world, (rank + 1) * 16 // world)
        (model(x[rows]) * y[rows]).sum(1).square().mean().backward()
        gradients.average()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    return state | {f"{name}.grad": p.grad.numpy() for name, p in model.named_parameters()}


def by_hand():
    """The same by torch's BatchNorm on each group, one after the other."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Flatten(), nn.Linear(40, 6), nn.BatchNorm1d(6)]
    model = nn.Sequential(*layers).double()
    norms = [part for part in model if isinstance(part, nn.BatchNorm1d)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        model.zero_grad()
        x, y = (torch.randn(16, *shape, generator=generator, dtype=torch.float64) for shape in ((3, 10), (6,)))
        before, after = [copy.deepcopy(norm.state_dict()) for norm in norms], []
        for rows in torch.arange(16).chunk(GROUPS):
            for norm, state in zip(norms, before):
                norm.load_state_dict(state)
            ((model(x[rows]) * y[rows]).sum(1).square().sum() / 16).backward()
            after.append([copy.deepcopy(norm.state_dict()) for norm in norms])
        for i, norm in enumerate(norms):
            for name in ("running_mean", "running_var"):
                getattr(norm, name).copy_(sum(states[i][name] for states in after) / GROUPS)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    return state | {f"{name}.grad": p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_groups_of_the_batch_are_normalised_alike_on_any_number_of_ranks(world):
    expected = by_hand()
    for found in run_ranks(world, grouped, GROUPS):
        assert found.keys() == expected.keys()
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-13, err_msg=name)


def test_frozen_statistics_stay_and_normalise_in_training():
    layer = globalize(nn.Sequential(nn.BatchNorm1d(2)), 0)[0].train()
    layer.running_mean.copy_(torch.tensor([1.0, 2.0]))
    x = torch.tensor([[3.0, 2.0], [1.0, 4.0]])
    torch.testing.assert_close(layer(x), (x - torch.tensor([1.0, 2.0])) / (1 + 1e-5) ** 0.5)
    assert layer.running_mean.tolist() == [1.0, 2.0] and layer.weight.requires_grad


def test_groups_that_cannot_be_cut_are_refused():
    check_groups(1, 7), check_groups(0, 7), check_groups(4, 8)
    with pytest.raises(ConfigError, match="train.batchnorm_groups 3: with 8 speakers in a batch and 1 ranks expected"):
        check_groups(3, 8)
