"""What a run may go on from: whole checkpoints of ours, the same options, data and length; weights that fit as they are."""

from pathlib import Path

import pytest
import torch
from torch import nn

from spknet.checkpoints.file import CheckpointError, load_weights, read, save
from spknet.checkpoints.network import load_network
from spknet.checkpoints.resume import NEEDED, check_resume, load_optimizer
from spknet.checkpoints.voxceleb_trainer import fit
from spknet.config import from_dict, to_dict

BEFORE = Path(__file__).parents[1] / "reference/before/run/checkpoints/step-00000003.pt"


@pytest.fixture
def state():
    return read(BEFORE)


def options(state, **changes):
    """The run's options with `group__key=value` changed."""
    values = to_dict(from_dict(state["config"]))
    for name, value in changes.items():
        group, key = name.split("__")
        values[group][key] = value
    return from_dict(values)


def resume(state, facts=None, fingerprint=None, **changes):
    return check_resume(state, BEFORE, options(state, **changes), fingerprint or state["data_fingerprint"], facts)


def test_the_same_settings_and_harmless_changes_go_on_without_a_word(state):
    assert resume(state) == []
    assert resume(state, data__workers=4, log__every_steps=7, train__threads=9, data__train_shards="elsewhere") == []
    # 6 epochs of one step; another way to say so
    assert resume(state, train__epochs=100, train__max_steps=6) == []


@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_that_lacks_something_is_named(name, state):
    config = options(state)
    del state[name]
    with pytest.raises(CheckpointError, match=rf"cannot be continued: .*{name}"):
        check_resume(state, BEFORE, config, "x")


@pytest.mark.parametrize("value", ["spknet checkpoint 9", None, 3])
def test_another_format_is_not_continued(value, state):
    with pytest.raises(
        CheckpointError, match="no checkpoint that this version can continue: found .*, expected 'spknet"
    ):
        resume(state | {"format": value})
    for content in ([1, 2], {"conv1.weight": torch.zeros(1)}, torch.zeros(1)):
        with pytest.raises(CheckpointError, match="give it as --train.initial_model"):
            check_resume(content, BEFORE, from_dict({}), "x")


def test_a_longer_cosine_is_refused_and_a_longer_run_of_steps_is_not(state):
    with pytest.raises(
        CheckpointError, match=r"steps of the run: 6 -> 12 \(optim.schedule cosine falls to the last step\)"
    ):
        resume(state, train__epochs=12, train__max_steps=None)
    assert resume(state, train__epochs=12, train__max_steps=None, train__resume_override=True) == []
    state["config"]["optim"]["schedule"] = "step"
    assert resume(state, train__epochs=12, train__max_steps=None) == []


def test_noise_that_is_dropped_added_or_exchanged_is_refused(state):
    audio = state["data_fingerprint"]
    state["config"]["augment"]["noise_shards"] = "noise"
    with pytest.raises(CheckpointError, match="augment.noise_shards: noise -> None"):
        resume(state, augment__noise_shards=None)
    assert (
        resume(state, fingerprint=f"{audio}-a", augment__noise_shards="moved") == []
    )  # an old file does not tell which
    state["data_fingerprint"] = f"{audio}-a"
    assert resume(state, augment__noise_shards="moved") == []
    with pytest.raises(CheckpointError, match="the noise data or impulse responses"):
        resume(state, fingerprint=f"{audio}-b")
    state["config"]["augment"]["noise_shards"] = None
    with pytest.raises(CheckpointError, match="augment.rir_shards: None -> rooms"):
        resume(state, augment__rir_shards="rooms")


def test_options_that_were_left_to_a_preset_are_compared_by_what_they_mean(state):
    assert state["config"]["augment"]["probability"] == 0.6
    assert resume(state, augment__probability=None) == []  # the preset's 0.6
    with pytest.raises(CheckpointError, match="augment.probability: 0.6 -> 0.5"):
        resume(state, augment__probability=0.5)


def test_facts_that_move_the_last_bits_are_told(state):
    assert resume(state, {"CPU threads": 2}) == []  # a checkpoint without facts
    state["facts"] = {"CPU threads": 1, "torch": "2.11.0"}
    assert resume(state, {"CPU threads": 1, "torch": "2.11.0"}) == []
    (note,) = resume(state, {"CPU threads": 2, "torch": "2.11.0"})
    assert note.startswith("CPU threads: 1 -> 2") and "up to rounding only" in note


def test_weights_are_loaded_as_they_are_or_not_at_all():
    module, good = nn.Linear(2, 3), nn.Linear(2, 3).state_dict()
    load_weights(module, good, "a.pt")
    for name, value, expected in (
        ("weight", good["weight"].half(), "weight is float16, not float32"),
        ("weight", good["weight"].double(), "weight is float64, not float32"),
        ("weight", good["weight"].long(), "weight is int64, not float32"),
        ("weight", good["weight"].to(torch.complex64), "weight is complex64, not float32"),
        ("weight", good["weight"].T, r"weight has shape \(2, 3\), not \(3, 2\)"),
        ("weight", [1.0], "weight is list, not a tensor"),
        ("more", good["bias"], "more is unknown"),
    ):
        with pytest.raises(CheckpointError, match=f"a.pt does not fit Linear: {expected}"):
            load_weights(module, good | {name: value}, "a.pt")
    with pytest.raises(CheckpointError, match="bias is missing"):
        load_weights(module, {"weight": good["weight"]}, "a.pt")
    with pytest.raises(CheckpointError, match="a.pt holds list where weights by name are expected"):
        load_weights(module, [1], "a.pt")
    assert all(torch.equal(value, good[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("part", ["model", "config", "state of the network"])
def test_a_network_without_its_parts_is_a_sentence(part, state, tmp_path):
    if part == "state of the network":
        state["model"].popitem()
    else:
        del state[part]
    path = save(tmp_path, state, keep=0)
    with pytest.raises(CheckpointError, match="step-00000003.pt"):
        load_network(path)


def test_an_optimizer_that_does_not_fit_is_a_sentence():
    module = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    good = optimizer.state_dict()
    load_optimizer(optimizer, good, BEFORE)
    moments = good["state"]
    for bad in (
        {},
        [],
        good | {"param_groups": []},
        good | {"state": {0: {**moments[0], "exp_avg": torch.zeros(5)}, 1: moments[1]}},
        good | {"state": {7: moments[0]}},
    ):
        with pytest.raises(CheckpointError, match="its optimizer does not fit"):
            load_optimizer(optimizer, bad, BEFORE)


def test_the_network_of_a_float64_run_keeps_every_bit(state, tmp_path):
    state["config"]["train"]["precision"] = "float64"
    state["model"] = {k: v.double() + 1e-12 if v.is_floating_point() else v for k, v in state["model"].items()}
    network, _, _ = load_network(save(tmp_path, state, keep=0))
    assert all(torch.equal(value, state["model"][name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "value", [torch.zeros(3, 2, dtype=torch.complex64), torch.zeros(3, 2, dtype=torch.int64), [1.0]]
)
def test_another_programs_weights_that_are_no_real_numbers_do_not_fit(value):
    module = nn.Linear(2, 3)
    found, misfit = fit(module, {"weight": value, "bias": torch.zeros(3)})
    assert list(found) == ["bias"] and "1 misshapen: weight" in str(misfit)
    found, misfit = fit(module, {"weight": torch.zeros(3, 2).half(), "bias": torch.zeros(3)})
    assert list(found) == ["weight", "bias"] and not misfit  # weights are often published in half precision
