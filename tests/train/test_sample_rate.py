"""A corpus of telephone speech, 8 kHz: trained, evaluated, embedded and scored at its rate."""

import json

import numpy as np
import pytest
import soundfile
import torch

from shards.pack import pack
from spknet.checkpoints import file as checkpoint
from spknet.checkpoints.network import load_network
from spknet.errors import UserError
from spknet.errors import run as run_command
from spknet.evaluate import __main__ as evaluation
from spknet.evaluate import embed, embeddings
from spknet.train.__main__ import main
from spknet.use import export
from tests.conftest import voice
from tests.ranks import train


@pytest.fixture(scope="module")
def telephone(tmp_path_factory):
    """8 speakers x 3 utterances at 8 kHz: WAVs, lists, and `shards`, the same packed."""
    folder, lines = tmp_path_factory.mktemp("telephone"), []
    for speaker in range(8):
        for utterance in range(3):
            name = f"id{speaker:05d}/{utterance}.wav"
            (folder / name).parent.mkdir(exist_ok=True)
            soundfile.write(folder / name, voice(speaker, utterance, 1.0)[::2], 8000, subtype="PCM_16")
            lines.append(f"id{speaker:05d} {name}")
    (folder / "train_list.txt").write_text("\n".join(lines) + "\n")
    pairs = [f"{int(a == b)} id{a:05d}/0.wav id{b:05d}/1.wav" for a in range(8) for b in range(8)]
    (folder / "test_list.txt").write_text("\n".join(pairs) + "\n")
    rows = [line.split() for line in lines]
    entries = [(speaker, name.removesuffix(".wav"), folder / name) for speaker, name in rows]
    pack(entries, folder / "shards", sample_rate=8000, progress=False)
    return folder


def words(folder, run, *more):
    return [
        *f"--run_dir {run} --data.speakers_per_batch 8 --data.crop_seconds 0.5 --data.workers 0 --train.threads 1".split(),
        *[
            "--train.max_steps",
            "2",
            "--log.every_steps",
            "1",
            "--log.tensorboard",
            "false",
            "--model.embedding_size",
            "16",
        ],
        *f"--eval.trials {folder}/test_list.txt --eval.root {folder} --eval.crop_seconds 0.4".split(),
        *more,
    ]


@pytest.mark.parametrize(
    "network",
    ["--model.width 0.25", "--model.name ResNet18 --model.width 0.25", "--model.name ReDimNet2-B0 --model.width 0.34"],
)
def test_8_khz_is_trained_and_evaluated_at_8_khz(network, telephone, tmp_path):
    run = tmp_path / "run"
    packed = words(telephone, run, *network.split(), "--data.train_shards", f"{telephone}/shards")
    losses = [line["loss"] for line in train(1, packed) if "loss" in line]
    assert len(losses) == 2
    during = json.loads(next((run / "eval").glob("*/report.json")).read_text())

    model, _, meta = load_network(run)
    assert model.sample_rate == meta["sample_rate"] == 8000 and model.features.hop == 80
    with torch.no_grad():  # the crops of the evaluation: 0.4 s, the whole 25 ms window of 200 samples
        assert model.features(torch.randn(1, 3200)).shape[2] in (38, 39, 41)

    out = tmp_path / "out"
    assert evaluation.main(["--checkpoint", str(run), "--out", str(out), "--keep_embeddings", "--threads", "1"]) == 0
    after = json.loads((out / "report.json").read_text())
    assert after["lists"][0]["systems"] == during["lists"][0]["systems"]
    kept, _, _ = embeddings.load(out)
    assert kept.sample_rate == 8000 and (kept.samples == 8000).all()

    told = ["--list", f"{telephone}/train_list.txt", "--root", str(telephone), "--out", str(tmp_path / "vectors")]
    assert embed.main(["--checkpoint", str(run), *told, "--threads", "1"]) == 0
    vectors, _, _ = embeddings.load(tmp_path / "vectors")
    wave, _ = soundfile.read(telephone / "id00000/0.wav", dtype="float32")
    with torch.no_grad():
        own = model(torch.from_numpy(wave)[None])
    np.testing.assert_allclose(vectors.embeddings[vectors.rows["id00000/0.wav"], 0], own[0], rtol=1e-3, atol=1e-4)


def test_loose_files_of_8_khz_train_like_packed_ones(telephone, tmp_path, capfd):
    loose = ["--data.train_list", f"{telephone}/train_list.txt", "--data.train_root", str(telephone)]
    small = ["--model.width", "0.25"]
    losses = [
        [line["loss"] for line in train(1, words(telephone, tmp_path / name, *small, *data)) if "loss" in line]
        for name, data in {
            "loose": [*loose, "--data.sample_rate", "8000"],
            "packed": ["--data.train_shards", f"{telephone}/shards"],
        }.items()
    ]
    assert losses[0] == losses[1]
    assert main(words(telephone, tmp_path / "refused", *small, *loose)) == 2
    assert "8000 Hz, expected 16000 Hz" in capfd.readouterr().err


def test_rates_that_do_not_fit_are_refused(telephone, corpus, tmp_path, capfd):
    packed = ["--model.width", "0.25", "--data.train_shards", f"{telephone}/shards"]
    assert main(words(telephone, tmp_path / "a", *packed, "--data.sample_rate", "16000")) == 2
    assert "data.sample_rate=16000, but" in capfd.readouterr().err
    assert main(words(telephone, tmp_path / "run", *packed)) == 0
    run = str(tmp_path / "run")
    trials = ["--trials", f"{corpus}/test_list.txt", "--out", str(tmp_path / "out")]
    assert run_command(evaluation.main, ["--checkpoint", run, *trials, "--root", str(corpus)]) == 0
    assert "files converted: 16000 Hz to 8000 Hz" in capfd.readouterr().out  # loose files of a higher rate are
    assert run_command(evaluation.main, ["--checkpoint", run, *trials, "--shards", f"{corpus}/shards"]) == 2
    assert "16000 Hz, expected 8000 Hz; pack it at that rate" in capfd.readouterr().err
    wide = ["--model.width", "0.25", "--data.train_shards", f"{corpus}/shards", "--train.initial_model", run]
    assert main(words(corpus, tmp_path / "b", *wide)) == 2
    assert "is of a network for 8000 Hz, the training data have 16000 Hz" in capfd.readouterr().err
    assert main([*words(corpus, tmp_path / "wide", *wide[:4]), "--eval.trials", "null"]) == 0
    lower = ["--trials", f"{telephone}/test_list.txt", "--root", str(telephone), "--out", str(tmp_path / "lower")]
    with pytest.raises(UserError, match="8000 Hz, expected 16000 Hz or more"):
        evaluation.main(["--checkpoint", str(tmp_path / "wide"), *lower])
    export_words = ["--checkpoint", run, "--to", "voxceleb_trainer", "--out", str(tmp_path / "x.model")]
    assert run_command(export.main, export_words) == 2
    assert "for 8000 Hz; voxceleb_trainer takes 16000 Hz only" in capfd.readouterr().err


def test_networks_that_voxceleb_trainer_lacks_are_not_exported_to_it(corpus, tmp_path, capfd):
    packed = ["--model.name", "ResNet18", "--model.width", "0.25", "--data.train_shards", f"{corpus}/shards"]
    assert main([*words(corpus, tmp_path / "run", *packed), "--eval.trials", "null"]) == 0
    out = ["--to", "voxceleb_trainer", "--out", str(tmp_path / "x.model")]
    assert run_command(export.main, ["--checkpoint", str(tmp_path / "run"), *out]) == 2
    assert "holds a ResNet18; voxceleb_trainer has ResNetSE34, " in capfd.readouterr().err


def test_checkpoints_that_do_not_say_their_rate_tell_it_by_their_window(telephone, tmp_path):
    packed = ["--model.width", "0.25", "--data.train_shards", f"{telephone}/shards"]
    assert main(words(telephone, tmp_path / "run", *packed)) == 0
    path, state = checkpoint.newest(tmp_path / "run", print)
    del state["sample_rate"], state["config"]["features"]
    torch.save(state, path)
    model, config, _ = load_network(tmp_path / "run")
    assert model.sample_rate == 8000 and config.features.name == "auto"
