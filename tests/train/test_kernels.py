"""What a run sets in torch for its device, and what it measures of a step."""

import time
from types import SimpleNamespace

import pytest
import torch

from spknet.checkpoints.resume import load_optimizer
from spknet.config import OptimConfig, TrainConfig
from spknet.parallel import gather
from spknet.train import kernels, sidelines
from spknet.train.meter import Meter
from spknet.train.metrics_log import read_metrics
from spknet.train.optim import build_optimizer, total_norm
from tests.ranks import run_ranks, train

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def switches(monkeypatch):
    """torch's switches as they were before the test."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    kernels.choose(TrainConfig(), CPU)
    torch.backends.cudnn.allow_tf32 = True


def test_tf32_is_taken_on_a_gpu_and_only_where_it_is_asked_for(switches):
    found = {}
    for precision, device in (("tf32", CUDA), ("tf32", CPU), ("float32", CUDA), ("bf16", CUDA)):
        kernels.choose(TrainConfig(precision=precision), device)
        found[precision, device.type] = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert found.pop(("tf32", "cuda")) == ("high", True)
    assert set(found.values()) == {("highest", False)}


def test_deterministic_on_a_gpu_sets_what_cublas_and_cudnn_need(switches, monkeypatch):
    import os

    kernels.choose(TrainConfig(deterministic=True), CUDA)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own word stands
    kernels.choose(TrainConfig(deterministic=True), CUDA)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_cudnn_searches_for_the_fastest_while_shapes_stay_the_same(switches):
    kernels.choose(TrainConfig(), CUDA)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
    with kernels.of_varying_shapes():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark


def stepped(optimizer, parameter):
    parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()


def test_an_optimizer_keeps_its_own_kernels_when_it_takes_over_moments(tmp_path):
    theirs, ours = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    fused = torch.optim.Adam([theirs], lr=0.1, fused=True)
    stepped(fused, theirs)
    optimizer = build_optimizer(OptimConfig(lr=0.1), [ours])
    load_optimizer(optimizer, fused.state_dict(), tmp_path)
    assert optimizer.param_groups[0]["fused"] is None
    assert torch.equal(optimizer.state[ours]["exp_avg"], fused.state[theirs]["exp_avg"])
    back = torch.optim.Adam([theirs], lr=0.1, fused=True)
    load_optimizer(back, optimizer.state_dict(), tmp_path)
    assert back.param_groups[0]["fused"] is True


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_half_precision_takes_one_kernel_whose_steps_are_the_others_up_to_rounding(name):
    values = torch.linspace(-1, 1, 40)
    parameters = [torch.nn.Parameter(values.clone()) for _ in range(2)]
    config = OptimConfig(name=name, lr=0.01, weight_decay=0.1, momentum=0.9)
    plain, fused = (build_optimizer(config, [p], half=half) for p, half in zip(parameters, (False, True)))
    assert plain.param_groups[0]["fused"] is None and fused.param_groups[0]["fused"] is True
    for _ in range(5):
        stepped(plain, parameters[0]), stepped(fused, parameters[1])
    torch.testing.assert_close(*parameters, rtol=1e-6, atol=1e-7)
    assert (parameters[1] - values).abs().min() > 0.01


def test_the_norm_of_gradients_is_not_finite_where_one_of_them_is_not():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for parameter, values in zip(parameters, ([3.0, 0.0], [0.0, 4.0])):
        parameter.grad = torch.tensor(values)
    assert total_norm(parameters) == 5
    parameters[1].grad[0] = torch.inf
    assert not torch.isfinite(total_norm(parameters))


def test_the_parts_of_a_step_add_up_and_exchange_is_counted_once():
    meter = Meter(CPU)
    for part, seconds in (("data", 0.02), ("forward", 0.04), (None, 0.03)):
        meter.begins(part)
        time.sleep(seconds)
        if part == "forward":
            with gather.exchange:
                time.sleep(0.06)
    meter.begins("optimizer")
    meter.begins(None)
    seconds, parts = meter.read()
    assert parts["data"] >= 0.02 and parts["forward"] >= 0.04 and parts["exchange"] >= 0.06 and parts["backward"] == 0
    assert sum(parts.values()) <= seconds - 0.03
    assert set(meter.read()[1].values()) == {0.0}


def test_metrics_say_where_the_time_of_a_step_went(options, tmp_path):
    lines = train(2, [*options, "--train.max_steps", "4", "--log.every_steps", "2", "--run_dir", str(tmp_path)])
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        parts, step = line["step_seconds"], 16 / line["utterances_per_second"]
        assert set(parts) == {"data", "forward", "backward", "exchange", "optimizer"} and min(parts.values()) > 0
        assert sum(parts.values()) <= 1.001 * step


def test_a_run_that_waits_for_data_says_so_once_and_what_to_do(capfd):
    side = SimpleNamespace(measured=0, warned=False, config=SimpleNamespace(data=SimpleNamespace(workers=3)))
    for measured, waited in ((0, 0.9), (30, 0.05), (40, 0.35), (50, 0.6)):
        side.measured = measured
        sidelines.Sidelines._warn_of_data(side, waited)
    said = capfd.readouterr().err
    assert said.count("waits for its data") == 1
    assert "waits for its data 35% of the time" in said and "--data.workers (now 3)" in said


def _spoilt(rank, world, words, step):
    """spknet.train, in whose given step a gradient is infinite on the last rank."""
    from spknet.train import trainer
    from spknet.train.__main__ import main

    real, calls = trainer.step_at_once, []

    def spoil(task, *arguments):
        found = real(task, *arguments)
        calls.append(1)
        if len(calls) == step + 1 and rank == world - 1:
            next(task.parameters()).grad.view(-1)[3] = float("inf")
        return found

    trainer.step_at_once = spoil
    return main(words)


@pytest.mark.parametrize(("bad", "kept"), [(2, 0), (4, 4), (5, 4)])
def test_a_bad_step_that_is_read_later_is_named_and_never_saved(bad, kept, options, tmp_path, capfd):
    words = [*options, "--log.every_steps", "100", "--train.save_every_steps", "4", "--train.max_steps", "12"]
    assert run_ranks(2, _spoilt, [*words, "--run_dir", str(tmp_path)], bad, join=False) == [1, 1]
    said = capfd.readouterr().err
    assert f"the gradient of step {bad} is not finite, though its loss is" in said
    assert ("the checkpoint of step 4 is kept" if kept else "nothing was saved yet") in said
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    assert saved == ([f"step-{kept:08d}.pt"] if kept else [])
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        assert all(torch.isfinite(value).all() for value in torch.load(path, weights_only=True)["model"].values())
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_steps_that_are_logged_seldom_have_the_same_mean_as_those_that_are_logged_each(options, tmp_path):
    words = [*options, "--train.max_steps", "6", "--train.save_every_steps", "4"]
    each = train(1, [*words, "--run_dir", str(tmp_path / "each")])
    seldom = train(1, [*words, "--log.every_steps", "3", "--run_dir", str(tmp_path / "seldom")])
    means = [sum(line["loss"] for line in each[first : first + 3]) / 3 for first in (0, 3)]
    assert [line["loss"] for line in seldom] == pytest.approx(means, rel=1e-14)
