"""Going on from where a training of voxceleb_trainer stood, and in what a run here differs from one there."""

import copy
from types import SimpleNamespace

import pytest
import torch

from spknet.checkpoints import file as checkpoint
from spknet.checkpoints import voxceleb_trainer as legacy_state
from spknet.checkpoints import voxceleb_trainer_state as legacy_progress
from spknet.config import ConfigError, LossConfig
from spknet.losses import build_loss
from spknet.models import build_model
from spknet.train import voxceleb_trainer as legacy
from spknet.train.step import SpeakerTask
from tests.checkpoints.test_voxceleb_trainer import small


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_moments_go_on_as_in_the_optimizer_they_come_from(kind, tmp_path):
    def task_of(seed: int) -> SimpleNamespace:
        torch.manual_seed(seed)
        return SimpleNamespace(model=small(), loss=build_loss(LossConfig(name="amsoftmax"), 16, 7, 1))

    def parameters(task) -> dict[str, torch.nn.Parameter]:
        parts = (("__S__.", task.model), ("__L__.", task.loss))
        return {p + legacy_state.their_name(m, n): w for p, m in parts for n, w in m.named_parameters()}

    def step(task, optimizer) -> None:
        for number, parameter in enumerate(parameters(task).values()):
            draws = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=draws)
        optimizer.step()

    make = {"adam": torch.optim.Adam, "sgd": lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9)}[kind]
    old, new = task_of(0), task_of(1)
    theirs = legacy_state.to_legacy(old.model, old.loss)
    order = [key for key in theirs if key.startswith("__S__.")][::-1] + ["__L__.W"]  # theirs need not be ours
    by_name = parameters(old)
    optimizer = make([by_name[key] for key in order if key in by_name])
    for _ in range(3):
        step(old, optimizer)
    weights = legacy_state.to_legacy(old.model, old.loss)
    state = copy.deepcopy(optimizer.state_dict())
    head = state["state"][len(state["state"]) - 1]  # their W is our weight, transposed
    for name in head.keys() - {"step"}:
        head[name] = head[name].T.contiguous()
    content = {"model_state_dict": {key: weights[key] for key in order}, "optimizer_state_dict": state, "epoch": 12}
    path = tmp_path / "model" / "model000000010.model"
    path.parent.mkdir()
    torch.save(content, path)
    legacy_state.load_into(new.model, new.loss, checkpoint.read(path))
    ours = make(list(parameters(new).values()))
    assert legacy_progress.is_of_run(path, tmp_path) and not legacy_progress.is_of_run(path, tmp_path / "model")
    assert legacy_progress.continue_from(path, new, ours) == (12, [f"going on after epoch 12 of {path}"])
    step(old, optimizer)
    step(new, ours)
    for (name, a), b in zip(parameters(old).items(), parameters(new).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    other = (
        torch.optim.SGD(parameters(new).values(), momentum=0.9)
        if kind == "adam"
        else torch.optim.Adam(parameters(new).values())
    )
    assert "its optimizer is another one" in legacy_progress.continue_from(path, new, other)[1][0]
    torch.save(weights, path)
    assert legacy_progress.continue_from(path, new, ours)[0] == 10  # by its name
    torch.save(
        content | {"optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}}},
        path,
    )
    assert "no moments of the optimizer that fit" in legacy_progress.continue_from(path, new, ours)[1][0]


@pytest.mark.parametrize("m", ["", "--nPerSpeaker 2"])
def test_an_unknown_loss_or_network_is_named_whatever_the_utterances_per_speaker(m):
    config = legacy.translate(f"--model ResNetSE35L --trainfunc softmx {m}".split()).config
    with pytest.raises(ConfigError, match="loss.name softmx: no such loss; did you mean softmax"):
        build_loss(config.loss, 16, 4, config.data.utterances_per_speaker)
    with pytest.raises(ConfigError, match="ResNetSE35L.*did you mean ResNetSE3"):
        build_model(config.model)


def test_the_batch_is_one_pass_and_not_a_pass_for_each_utterance_slot():
    waves = torch.randn(6, 2, 4000, generator=torch.Generator().manual_seed(0))
    model, loss = small().train(), build_loss(LossConfig(), 16, 6, 2)
    slots = torch.stack([model(waves[:, slot]) for slot in (0, 1)], dim=1)  # as the version of mid 2020 does
    whole = model(waves.flatten(0, 1)).unflatten(0, (6, 2))
    labels, draws = torch.arange(6), torch.zeros(6, 2, dtype=torch.float64)
    value = SpeakerTask(model, loss, 2, "float32")(waves.flatten(0, 1), None, labels, draws)[0]
    torch.testing.assert_close(value, loss(whole, labels, draws)[0])
    assert (value - loss(slots, labels, draws)[0]).abs() > 1e-3
