"""voxceleb_trainer's command lines and checkpoints: what they become, what is refused, what is said."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spknet import cli
from spknet import config as configuration
from spknet.checkpoints import file as checkpoint
from spknet.checkpoints import voxceleb_trainer as legacy_state
from spknet.checkpoints.file import CheckpointError
from spknet.checkpoints.initial import load_initial
from spknet.config import Config, ConfigError, LossConfig, ModelConfig
from spknet.losses import build_loss
from spknet.models import build_model
from spknet.options import parse
from spknet.train import voxceleb_trainer as legacy

FOUR = "--train_list l.txt --test_list t.txt --train_path wav --test_path test --save_path exp"
SMALL = {"width": 0.25}  # factor on the channels, for speed


def small(**options) -> torch.nn.Module:
    return build_model(ModelConfig(**{**SMALL, "embedding_size": 16, **options}))


def words(line: str) -> list[str]:
    return f"{line} {FOUR}".split()


def test_a_command_line_of_the_seed_with_its_defaults():
    done = legacy.translate(words("--model ResNetSE34L --encoder SAP --trainfunc angleproto --nPerSpeaker 2"))
    c = done.config
    assert not done.eval_only and c.run_dir == "exp"
    assert (c.data.train_list, c.data.train_root) == ("l.txt", "wav")
    assert (c.data.speakers_per_batch, c.data.utterances_per_speaker) == (200, 2)
    assert c.data.max_utterances_per_speaker == 100 and c.data.workers == 5
    assert c.data.crop_seconds == pytest.approx((200 * 160 + 240) / 16000)
    assert (c.model.window, c.model.input_scale, c.model.log_input) == ("hann", "int16", True)
    assert c.loss.normalize_embeddings and (c.loss.margin, c.loss.scale) == (1.0, 15.0)
    assert c.loss.n_classes is None  # angleproto has no classes
    assert (c.optim.lr, c.optim.schedule, c.optim.lr_decay, c.optim.lr_decay_epochs) == (0.001, "step", 0.95, 10)
    assert (c.train.epochs, c.eval.every_epochs) == (500, 10)
    assert (c.eval.crops, c.eval.score, c.eval.padding, c.eval.metrics) == (
        10,
        "mean_distance",
        "zeros",
        "voxceleb_trainer",
    )
    assert c.eval.crop_seconds == pytest.approx((300 * 160 + 240) / 16000)


def test_a_command_line_of_the_newer_version_with_its_defaults():
    c = legacy.translate(words("--model ResNetSE34L --trainfunc amsoftmax --nClasses 5994")).config
    assert c.data.max_utterances_per_speaker == 500
    assert (c.model.window, c.model.input_scale, c.model.log_input) == ("auto", "unit", False)
    assert (c.loss.margin, c.loss.scale, c.loss.n_classes) == (0.1, 30.0, 5994)
    assert not c.loss.normalize_embeddings
    assert c.eval.padding == "repeat" and c.train.seed == 10


def test_the_optimizers_of_both_versions():
    seed = legacy.translate(words("--model VGGVox40 --trainfunc softmax --optimizer sgd")).config
    assert (seed.optim.name, seed.optim.momentum, seed.optim.weight_decay) == ("sgd", 0.9, 5e-5)
    assert seed.loss.n_classes == 5994
    newer = legacy.translate(words("--model VGGVox --trainfunc softmax --optimizer sgd --n_mels 64")).config
    assert newer.optim.weight_decay == 0 and newer.model.n_mels == 40  # VGGVox always has 40


def test_the_equivalent_command_means_the_same():
    for line in ("--model ResNetSE34L --trainfunc amsoftmax --scale 30 --margin 0.3", "--model RawNet3 --encoder ECA "
                 "--nOut 256 --trainfunc aamsoftmax --weight_decay 5e-5 --mixedprec"):  # fmt: skip
        done = legacy.translate(words(line))
        command = next(note for note in done.notes if "python -m spknet.train" in note).split()
        assert parse(command[3:]) == done.config
        assert sum("python -m" in note for note in done.notes) == 1


def test_eval_never_trains_and_its_command_is_that_of_evaluate():
    done = legacy.translate(words("--eval --model ResNetSE34L --trainfunc angleproto --initial_model a.model"))
    assert done.eval_only and done.config.train.initial_model == "a.model"
    command = next(note for note in done.notes if "python -m" in note)
    assert "spknet.evaluate --checkpoint a.model" in command and "--metrics voxceleb_trainer" in command


def test_options_of_spknet_beside_the_flags_beat_them():
    line = words("--eval --model ResNetSE34L --lr 0.1 --optim.lr 0.2 --eval.scores out.txt --train.device cpu")
    c = legacy.translate(line).config
    assert (c.optim.lr, c.eval.scores, c.train.device) == (0.2, "out.txt", "cpu")
    assert c.data.speakers_per_batch == 200
    with pytest.raises(ConfigError, match="unknown option --optim.lrr; did you mean optim.lr"):
        legacy.translate(words("--model ResNetSE34L --trainfunc ge2e --optim.lrr 1"))
    with pytest.raises(ConfigError, match="--optim.lr: a value is missing"):
        legacy.translate(["--model", "ResNetSE34L", "--optim.lr"])


def test_augment_draws_as_voxceleb_trainer_does(tmp_path):
    for name in ("musan", "rir"):
        (tmp_path / name / "index").mkdir(parents=True)
        (tmp_path / name / "index" / "index.json").touch()
    paths = f"--musan_path {tmp_path}/musan --rir_path {tmp_path}/rir"
    done = legacy.translate(words(f"--model ResNetSE34L --trainfunc softmax --augment True {paths}"))
    assert done.config.augment.preset == "voxceleb_trainer"
    assert done.config.augment.noise_shards == f"{tmp_path}/musan"


def test_a_yaml_file_beats_the_command_line_and_its_unknown_keys_are_said(tmp_path):
    path = tmp_path / "ResNetSE34L_AM.yaml"
    path.write_text(
        "model: ResNetSE34L\nlog_input: True\nencoder_type: SAP\ntrainfunc: amsoftmax\nnLcasses: 5994\n"
        "batch_size: 200\nscale: 30\nmargin: 0.3\nweight_decay: 5e-05\n"
    )
    done = legacy.translate(words(f"--config {path} --margin 0.1 --batch_size 64"))
    assert done.config.loss.margin == 0.3 and done.config.data.speakers_per_batch == 200
    assert done.config.model.log_input and done.config.optim.weight_decay == 5e-5
    notes = "\n".join(done.notes)
    assert "nLcasses is no option of voxceleb_trainer and is ignored" in notes
    assert "margin 0.3 of" in notes and "beats 0.1 of the command line" in notes


def test_a_wrong_value_in_a_yaml_file_is_named_with_its_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: ResNetSE34L\ntrainfunc: softmax\ninitial_model:\nbatch_size: many\n")
    with pytest.raises(ConfigError, match="a.yaml: batch_size: 'many': expected int"):
        legacy.translate(["--config", str(path)])
    path.write_text("model: ResNetSE34L\ntrainfunc: softmax\ninitial_model:\n")
    assert legacy.translate(["--config", str(path)]).config.train.initial_model is None


def test_which_command_lines_are_voxceleb_trainers(tmp_path):
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text("model: ResNetSE34L\ntrainfunc: softmax\nbatch_size: 200\n")
    ours.write_text("run_dir: a\nmodel:\n  name: VGGVox\neval:\n")
    assert legacy.is_legacy(["--model", "ResNetSE34L", "--trainfunc=softmax", "--optim.lr", "1"])
    assert legacy.is_legacy(["--config", str(theirs)]) and legacy.is_legacy(["--config", str(theirs), "--augment"])
    assert legacy.is_legacy(["--eval", "--model", "ResNetSE34L", "--initial_model", "a.model"])
    for word in ("--lr", "--seed", "--margin", "--model"):  # one of their words does not make a line theirs
        assert not legacy.is_legacy([word, "1"])
    assert not legacy.is_legacy(["--model", "ResNetSE34L", "--trainfunc", "softmax", "--train_shards", "x"])
    assert not legacy.is_legacy(["--config", "fast_resnet34_angleproto", "--lr", "1"])
    assert not legacy.is_legacy(["--config", str(ours), "--optim.lr", "1"])
    assert not legacy.is_legacy(["--run_dir", "a", "--data.train_shards", "b"]) and not legacy.is_legacy(["--help"])


def test_switches_of_the_newest_version_and_its_folders():
    done = legacy.translate(["--model", "ResNetSE34V2", "--trainfunc", "softmax", "--log_input", "--seed", "3"])
    assert done.config.model.log_input and done.config.train.seed == 3
    assert done.config.data.train_root == "data/voxceleb2/dev/wav" and done.config.eval.trials == "data/veri_test.txt"
    assert done.config.eval.root == "data/voxceleb1/test/wav"


def test_distributed_says_what_the_batch_would_have_been(monkeypatch):
    line = words("--model ResNetSE34L --trainfunc angleproto --batch_size 100 --distributed")
    assert "--data.speakers_per_batch 100 times the number of GPUs" in "\n".join(legacy.translate(line).notes)
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = legacy.translate(line)
    assert "--data.speakers_per_batch 400 on these 4 ranks" in "\n".join(done.notes)
    assert done.config.data.speakers_per_batch == 100


@pytest.mark.parametrize(
    "line, message",
    [
        ("--trainfunc softmax", "--model is missing: ResNetSE34, ResNetSE34L"),
        ("--model ResNetSE34L", "--trainfunc is missing: the name of a loss"),
        ("--model ResNetSE34L --trainfunk softmax", "did you mean --trainfunc?"),
        (
            "--model ResNetSE34L --trainfunc softmax --optimizer lamb",
            "--optimizer lamb: voxceleb_trainer has adam and sgd",
        ),
        ("--model ResNetSE34L --trainfunc softmax --scheduler cos", "--scheduler cos: expected steplr"),
        ("--model ResNetSE34L --trainfunc softmax --batch_size many", "invalid int value: 'many'"),
        ("--model ResNetSE34L --trainfunc softmax --log_input maybe", "'maybe': expected True or False"),
        ("--model ResNetSE34L --trainfunc softmax --augment True", "data/musan_split holds no index/index.json. Pack"),
        ("--model ResNetSE34L --trainfunc softmax --config none.yaml", "--config none.yaml: no such file"),
        ("--model ResNetSE34L --trainfunc softmax --legacy.version 3", "--legacy.version 3: expected seed or newer"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_says_why(line, message):
    with pytest.raises(ConfigError) as error:
        legacy.translate(words(line))
    assert message in str(error.value)


def test_eval_without_a_list_is_an_error():
    with pytest.raises(ConfigError, match="--eval wants --test_list FILE"):
        legacy.translate(["--eval", "--model", "ResNetSE34L", "--initial_model", "a.model"])


def test_the_version_is_chosen_by_flag_option_or_the_window_of_the_checkpoint(tmp_path):
    line = f"--eval --model ResNetSE34L --initial_model {tmp_path / 'a.model'}"

    def version(extra: str = "") -> str:
        return "newer" if legacy.translate(words(f"{line} {extra}")).config.model.input_scale == "unit" else "seed"

    for window, expected in (("hann", "seed"), ("hamming", "newer")):
        torch.save(legacy_state.to_legacy(small(window=window), None), tmp_path / "a.model")
        assert version() == expected
    assert version("--legacy.version seed") == "seed"
    assert version("--log_input True") == "newer"


def test_which_weights_a_run_starts_from(tmp_path):
    (tmp_path / "model").mkdir()
    for epoch in (10, 20):
        (tmp_path / "model" / f"model{epoch:09d}.model").touch()
    line = f"--model VGGVox --trainfunc softmax --save_path {tmp_path} --initial_model first.model"
    seed, newer = (legacy.translate(f"{line} --legacy.version {v}".split()) for v in ("seed", "newer"))
    assert seed.config.train.initial_model.endswith("model000000020.model") and "with its next epoch" in "\n".join(
        seed.notes
    )
    assert newer.config.train.initial_model == "first.model"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.pt").touch()
    again = legacy.translate(f"{line} --legacy.version newer".split())
    assert again.config.train.resume == "never" and "beats the checkpoints in save_path" in "\n".join(again.notes)
    assert legacy.translate(f"{line} --legacy.version seed".split()).config.train.resume == "auto"


def wrappings(model: torch.nn.Module, loss: torch.nn.Module) -> dict[str, dict]:
    """A network's weights as voxceleb_trainer's versions save them."""
    old = legacy_state.to_legacy(model, loss)
    bare = {key.removeprefix("__S__."): value for key, value in old.items() if key.startswith("__S__.")}
    return {
        "2020": old,
        "several GPUs": {f"module.{key}": value for key, value in old.items()},
        "newer": {"model_state_dict": old, "optimizer_state_dict": {}, "scheduler_state_dict": {}, "epoch": 3},
        "newer, several GPUs": {"model_state_dict": {f"module.{k}": v for k, v in old.items()}, "epoch": 3},
        "RawNet3": {"model": bare},
        "with its training": {"model": bare, "optimizer": {"state": {}}, "scheduler": {"last_epoch": 3}, "epoch": 3},
    }


@pytest.mark.parametrize(
    "form", ["2020", "several GPUs", "newer", "newer, several GPUs", "RawNet3", "with its training"]
)
@pytest.mark.parametrize("name, encoder", [("ResNetSE34L", "ASP"), ("ResNetSE34V2", "SAP"), ("RawNet3", "ECA")])
def test_a_checkpoint_comes_back_from_each_wrapping(form, name, encoder, tmp_path):
    options = {"name": name, "encoder": encoder}
    model, loss = small(**options), build_loss(LossConfig(name="amsoftmax"), 16, 7, 1)
    zipped = form != "2020"  # torch's container changed late in 2020
    torch.save(wrappings(model, loss)[form], tmp_path / "a.model", _use_new_zipfile_serialization=zipped)
    state = checkpoint.read(tmp_path / "a.model")  # by weights_only
    assert legacy_state.is_legacy_checkpoint(state)
    other, other_loss = small(**options), build_loss(LossConfig(name="amsoftmax"), 16, 7, 1)
    bare = form in ("RawNet3", "with its training")  # without the loss
    assert legacy_state.load_into(other, None if bare else other_loss, state) == []
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert torch.equal(loss.weight, other_loss.weight) != bare


def test_names_and_shapes_are_voxceleb_trainers():
    state = legacy_state.to_legacy(
        build_model(ModelConfig(name="ResNetSE34V2", encoder="ASP", n_mels=64)),
        build_loss(LossConfig(name="softmaxproto"), 512, 5, 2),
    )
    shapes = {
        "__S__.torchfb.0.flipped_filter": (1, 1, 2),
        "__S__.torchfb.1.mel_scale.fb": (257, 64),
        "__S__.layer4.0.downsample.0.weight": (256, 128, 1, 1),
        "__S__.layer1.2.se.fc.2.bias": (32,),
        "__S__.attention.3.weight": (2048, 128, 1),
        "__L__.softmax.fc.weight": (5, 512),
        "__L__.angleproto.w": (),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert state["__S__.torchfb.0.flipped_filter"].flatten().tolist() == pytest.approx([-0.97, 1])


def test_a_window_in_the_file_is_honoured():
    old, model = small(window="hann"), small(window="hamming")
    legacy_state.load_into(model, None, legacy_state.to_legacy(old, None))
    waves = torch.randn(1, 8000) * 0.1
    assert torch.equal(model.eval()(waves), old.eval()(waves))


def test_missing_unexpected_and_misshapen_keys_are_each_named_and_refused():
    state = legacy_state.to_legacy(small(), None)
    del state["__S__.conv1.weight"]
    state["__S__.extra.weight"] = torch.zeros(2)
    state["__S__.fc.weight"] = torch.zeros(3, 4)
    model = small()
    before = model.head.fc.weight.clone()
    with pytest.raises(CheckpointError) as error:
        legacy_state.load_into(model, None, state)
    for part in (
        "1 missing: conv1.weight",
        "1 unexpected: extra.weight",
        "1 misshapen: fc.weight (3, 4) instead of (16, 32)",
    ):
        assert part in str(error.value)
    assert "--train.allow_partial true" in str(error.value)
    notes = legacy_state.load_into(model, None, state, allow_partial=True)
    assert "the network is loaded in part" in notes[0] and "1 missing: conv1.weight" in notes[0]
    assert torch.equal(model.head.fc.weight, before)


def test_another_loss_starts_anew_with_a_note():
    state = legacy_state.to_legacy(small(), build_loss(LossConfig(name="softmax"), 16, 7, 1))
    notes = legacy_state.load_into(small(), build_loss(LossConfig(name="angleproto"), 16, 7, 2), state)
    assert "the loss is loaded in part: 2 missing: w, b; 2 unexpected: fc.weight, fc.bias" in notes[0]


def test_what_is_no_checkpoint_is_said():
    with pytest.raises(
        CheckpointError, match="not a checkpoint of spknet or of a project that it reads: found keys a, b"
    ):
        legacy_state.load_into(small(), None, {"a": 1, "b": 2})


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(encoder="ASP", n_mels=64, embedding_size=24),
        ModelConfig(window="hann", input_scale="int16"),
        ModelConfig(name="ResNetSE34V2", encoder="ASP", n_mels=64),
        ModelConfig(name="VGGVox", encoder="SAP"),
        ModelConfig(name="VGGVox", encoder="TAP"),
        ModelConfig(name="RawNet3", encoder="ECA", embedding_size=256),
        ModelConfig(name="ResNetSE34", input_scale="int16"),
    ],
)
def test_options_are_guessed_from_a_checkpoint(config):
    guessed = legacy_state.guess_model(legacy_state.to_legacy(build_model(replace(config, **SMALL)), None))
    for name in ("name", "encoder", "embedding_size", "n_mels", "input_scale"):
        assert getattr(guessed, name) == getattr(config, name), name


def own_checkpoint(path: Path, model_config: ModelConfig, loss_config: LossConfig, speakers: list[str]):
    """A checkpoint of spknet as a file, its network and its loss."""
    model = build_model(model_config)
    loss = build_loss(loss_config, model_config.embedding_size, len(speakers), 2)
    state = {"format": checkpoint.FORMAT, "config": configuration.to_dict(Config(model=model_config, loss=loss_config))}
    state |= {"model": model.state_dict(), "loss": loss.state_dict(), "step": 1}
    torch.save(state | {"speakers": speakers, "labels": list(range(len(speakers)))}, path)
    return model, loss


def test_a_checkpoint_of_spknet_starts_a_run_and_its_head_finds_the_speakers(tmp_path):
    config = ModelConfig(**SMALL, embedding_size=16)
    old, old_loss = own_checkpoint(tmp_path / "a.pt", config, LossConfig(name="softmax"), ["ann", "bob", "cid"])
    task = SimpleNamespace(model=build_model(config), loss=build_loss(LossConfig(name="softmax"), 16, 2, 1))
    corpus = SimpleNamespace(utterances=SimpleNamespace(speakers=["cid", "dan"], labels=[0, 1]), classes_per_speaker=1)
    fresh = task.loss.weight[1].clone()
    notes = load_initial(task, str(tmp_path / "a.pt"), corpus)
    head = "head: rows of 1 speakers kept, those of 1 begin anew"
    assert notes == [f"starting from the weights of {tmp_path / 'a.pt'}", head]
    assert torch.equal(task.model.head.fc.weight, old.head.fc.weight)
    assert torch.equal(task.loss.weight[0], old_loss.weight[2]) and torch.equal(task.loss.weight[1], fresh)
    task.model = build_model(ModelConfig(**SMALL, embedding_size=8))
    with pytest.raises(CheckpointError, match="2 misshapen: head.fc.weight"):
        load_initial(task, str(tmp_path / "a.pt"), corpus)
    with pytest.raises(CheckpointError, match="holds no checkpoints/step"):
        load_initial(task, str(tmp_path), corpus)


@pytest.mark.parametrize("words", ["{a} {b}", "--checkpoint {a} --to voxceleb_trainer --out {b}"])  # and the former
def test_export_writes_what_voxceleb_trainer_reads(words, tmp_path, capsys):
    config = ModelConfig(embedding_size=16)
    model, loss = own_checkpoint(tmp_path / "a.pt", config, LossConfig(name="amsoftmax"), ["ann", "bob"])
    assert cli.main(["export", *words.format(a=tmp_path / "a.pt", b=tmp_path / "a.model").split()]) == 0
    assert "--model ResNetSE34L --encoder_type SAP --nOut 16" in capsys.readouterr().out
    state = torch.load(tmp_path / "a.model", weights_only=True)
    assert torch.equal(state["__S__.layer1.0.conv1.weight"], model.stages[0][0].conv1.weight)
    assert torch.equal(state["__L__.W"], loss.weight.T)
    back = build_model(config)
    assert legacy_state.load_into(back, None, state) == []
    assert torch.equal(back.head.encoder.vector, model.head.encoder.vector)


@pytest.mark.parametrize(
    "config, message",
    [
        (ModelConfig(width=0.5), "model.width 0.5: voxceleb_trainer's networks have a width of 1 only"),
        (ModelConfig(encoder="TAP"), "model.encoder TAP: voxceleb_trainer's ResNetSE34L takes SAP, ASP"),
    ],
)
def test_export_refuses_what_voxceleb_trainer_has_not(config, message, tmp_path, capsys):
    own_checkpoint(tmp_path / "a.pt", config, LossConfig(), ["ann"])
    assert cli.main(["export", str(tmp_path / "a.pt"), str(tmp_path / "b"), "--to", "voxceleb_trainer"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_flags_are_read_without_torch():
    """`--help` and a mistyped flag answer at once."""
    code = "import sys, spknet.train.voxceleb_trainer_flags; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
