"""The file to hand on: what goes along, what does not, and what damage does."""

import json

import numpy as np
import pytest
import safetensors
import torch

import spknet
from spknet import cli
from spknet import config as configuration
from spknet.checkpoints import card as cards
from spknet.checkpoints import file as checkpoint
from spknet.checkpoints import portable
from spknet.checkpoints.file import CheckpointError
from spknet.checkpoints.network import load_network
from spknet.config import Config, ModelConfig, from_dict
from spknet.models import build_model
from tests.conftest import voice

SMALL = ModelConfig(name="ResNet34", width=0.125, embedding_size=16)
SECRETS = {
    "run_dir": "/home/ann/secret",
    "data": {"train_shards": "/home/ann/secret/a", "cache_dir": "/home/ann/secret/b", "dev_speakers": "/home/ann/secret/c"},
    "augment": {"noise_shards": "/home/ann/secret/d", "rir_shards": "/home/ann/secret/e"},
    "train": {"initial_model": "/home/ann/secret/f", "resume": "/home/ann/secret/g", "seed": 7},
    "eval": {"trials": "/home/ann/secret/h", "dev_trials": "/home/ann/secret/i", "root": "/home/ann/secret/j"},
}  # fmt: skip
CARD = {
    "calibration": {"weight": 20.0, "bias": -8.0},
    "target_prior": 0.5,
    "threshold": 0.4,
    "histogram": None,
    "false_alarm_thresholds": [],
    "lists": [],
    "network": {},
    "provenance": {},
}


def run_of(folder, sample_rate: int = 16000) -> None:
    """A run folder with one checkpoint, whose averages are not its trained weights."""
    torch.manual_seed(0)
    model = build_model(SMALL, sample_rate)
    config = from_dict(
        SECRETS | {"model": configuration.to_dict(Config(model=SMALL))["model"], "features": {"name": "kaldi"}}
    )
    means = {
        f"model.{name}": 1.01 * value if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    state = {
        "step": 30, "epoch": 1.5, "config": configuration.to_dict(config), "sample_rate": sample_rate,
        "model": model.state_dict(), "loss": {"weight": torch.zeros(2, 16)}, "speakers": ["ann secret", "bob"], "labels": [0, 1],
        "averaging": {"kind": "ema", "steps": [30], "weights": means}, "data_fingerprint": "abc",
    }  # fmt: skip
    checkpoint.save(folder, state, keep=1)


def convert(*words: str) -> None:
    assert cli.main(["convert", *map(str, words)]) == 0


def test_weights_options_rate_and_provenance_go_along_and_nothing_private(tmp_path, capsys):
    run_of(tmp_path / "run", sample_rate=8000)
    convert(tmp_path / "run", tmp_path / "a.safetensors")
    assert "a.safetensors: ResNet34, 16 dimensions, 8000 Hz, " in (said := capsys.readouterr().out)
    assert "was never calibrated" in said
    content = (tmp_path / "a.safetensors").read_bytes()
    assert b"secret" not in content and b"bob" not in content
    before, _, _ = load_network(tmp_path / "run")
    after, config, meta = load_network(tmp_path / "a.safetensors")
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    assert after.sample_rate == meta["sample_rate"] == 8000 and not after.training
    assert (config.model, config.features.name, config.train.seed) == (SMALL, "kaldi", 7)
    assert (meta["step"], meta["epoch"]) == (30, 1.5) and "speakers" not in meta
    source = meta["provenance"]
    assert source["file"] == "step-00000030.pt" and len(source["sha256"]) == 64 and source["data_fingerprint"] == "abc"
    convert(tmp_path / "run", tmp_path / "trained.safetensors", "--weights", "trained")
    trained, _, _ = load_network(tmp_path / "trained.safetensors")
    torch.testing.assert_close(1.01 * trained.seg_1.bias, after.seg_1.bias)


def test_any_program_that_knows_safetensors_reads_it(tmp_path):
    run_of(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "a.safetensors")
    network, _, _ = load_network(tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        said = json.loads(file.metadata()["spknet"])
        np.testing.assert_array_equal(file.get_tensor("seg_1.weight"), network.seg_1.weight.detach())
        assert set(file.keys()) == set(network.state_dict())
    assert said["format"] == "spknet network 1" and said["config"]["model"]["name"] == "ResNet34"


def test_the_card_of_these_weights_goes_along_and_another_s_does_not(tmp_path, capsys):
    run_of(tmp_path / "run")
    digest = cards.weights_digest(load_network(tmp_path / "run")[0].state_dict())
    for provenance, known in (({"weights_sha256": digest}, True), ({"weights_sha256": "0" * 64, "step": 1}, False)):
        histogram = {"edges": [-1.0, 1.0], "targets": [1], "nontargets": [1]}
        values = CARD | {"provenance": provenance, "histogram": histogram}
        cards.write(tmp_path / "run" / "card.json", cards.from_dict(values))
        convert(tmp_path / "run", tmp_path / "a.safetensors")
        assert ("with its card" in capsys.readouterr().out) is known
        card = spknet.load(tmp_path / "a.safetensors", "cpu").card
        assert (card is not None) is known and (card is None or card.threshold == 0.4)


def test_a_file_converted_again_keeps_where_it_came_from(tmp_path):
    run_of(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "new" / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "new" / "b.safetensors").read_bytes()


def test_it_embeds_as_what_it_was_made_of(tmp_path):
    run_of(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "a.safetensors")
    wave = voice(1, 1, 1.0)
    one, other = (spknet.load(tmp_path / name, "cpu").embed(wave, rate=16000) for name in ("run", "a.safetensors"))
    np.testing.assert_array_equal(one, other)


def test_damage_anywhere_is_seen(tmp_path):
    run_of(tmp_path / "run")
    path = tmp_path / "a.safetensors"
    convert(tmp_path / "run", path)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    length = 8 + int.from_bytes(whole[:8], "little")
    places = [*generator.integers(0, length, 30), *generator.integers(length, len(whole), 20)]
    for place in map(int, places):
        if whole[place : place + 1] == b" ":  # what fills the header up
            continue
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(generator.integers(8))]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="a.safetensors"):
            load_network(path)
    for end in (5, length - 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="a.safetensors"):
            load_network(path)


def test_a_name_without_its_ending_and_an_input_that_is_nowhere_are_refused(tmp_path, capsys):
    run_of(tmp_path / "run")
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "a.pt")]) == 2
    assert "give a name that ends in .safetensors" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "a.safetensors")]) == 2
    assert "nowhere: no such checkpoint" in capsys.readouterr().err and not (tmp_path / "a.safetensors").exists()


def test_a_state_dict_of_another_project_in_safetensors_is_recognised(tmp_path):
    weights = build_model(ModelConfig("ECAPA-512")).state_dict()
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save({name: value.contiguous() for name, value in weights.items()}))
    _, _, meta = load_network(path)
    assert meta["kind"] == "WeSpeaker's ECAPA-512"


def test_an_imported_network_handed_on_says_whose_it_was(tmp_path, capsys):
    weights = build_model(ModelConfig("ECAPA-512")).state_dict()
    torch.save(weights, tmp_path / "avg_model.pt")
    convert(tmp_path / "avg_model.pt", tmp_path / "a.safetensors")
    assert "from WeSpeaker's ECAPA-512" in capsys.readouterr().out
    network, _, meta = load_network(tmp_path / "a.safetensors")
    assert meta["kind"] == "WeSpeaker's ECAPA-512" and meta["provenance"]["file"] == "avg_model.pt"
    assert torch.equal(network.linear.weight, weights["linear.weight"])
    assert portable.is_safetensors(tmp_path / "a.safetensors") and not portable.is_safetensors(
        tmp_path / "avg_model.pt"
    )
