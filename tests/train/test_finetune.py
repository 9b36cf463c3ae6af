"""Large-margin fine-tuning and fine-tuning on other speakers, end to end on real speech."""

from pathlib import Path

import pytest
import resemblyzer
import torch

from shards.pack import pack
from spknet import cli
from spknet.checkpoints.averages import with_averages
from spknet.checkpoints.file import CheckpointError, newest
from spknet.checkpoints.network import load_network
from spknet.checkpoints.voxceleb_trainer import to_legacy
from spknet.config import ConfigError, ModelConfig
from spknet.models import build_model
from spknet.options import parse
from spknet.parallel.ranks import Ranks
from spknet.train.metrics_log import read_metrics
from spknet.train.trainer import Trainer
from tests.ranks import train

NETWORK = "--model.name ResNetSE34L --model.width 0.25 --model.embedding_size 32".split()  # noqa: SIM905
BASE = [*NETWORK, "--loss.name", "aamsoftmax", "--data.utterances_per_speaker", "1", "--data.workers", "0"]
BASE += [
    "--log.every_steps",
    "1",
    "--log.tensorboard",
    "false",
    "--train.threads",
    "1",
    "--augment.noise_shards",
    "null",
]
SPEEDS = ["--augment.speed", "[1.0, 0.9, 1.1]", "--augment.speed_labels", "true"]


@pytest.fixture(scope="module")
def speech(shared, tmp_path_factory):
    """Shards of three sets of speakers: 16, the first 10 of them with 2 others, and these 16 with 8 others."""
    folder = tmp_path_factory.mktemp("speech")
    utterances: dict[str, list[str]] = {}
    for line in (shared / "speech/train_list.txt").read_text().splitlines():
        speaker, path = line.split()
        utterances.setdefault(speaker, []).append(path)
    names = [name for name, paths in utterances.items() if len(paths) >= 4][:24]
    sets = {"first": names[:16], "fewer": names[:10] + names[16:18], "more": names}
    for part, speakers in sets.items():
        rows = [(s, p.rsplit(".", 1)[0], shared / "speech" / p) for s in speakers for p in utterances[s][:4]]
        pack(rows, folder / part, progress=False)
    for part in ("old", "new"):
        ours = names[:4] if part == "old" else names[16:20]
        pairs = [(int(a == b), utterances[a][0], utterances[b][1]) for a in ours for b in ours]
        (folder / f"{part}.txt").write_text("".join(f"{t} {a} {b}\n" for t, a, b in pairs))
    return folder


@pytest.fixture(scope="module")
def finished(speech, tmp_path_factory):
    """A run with speeds as classes and averaged weights."""
    run = tmp_path_factory.mktemp("runs") / "first"
    words = [*BASE, *SPEEDS, "--data.train_shards", str(speech / "first"), "--data.speakers_per_batch", "8"]
    words += [
        "--data.crop_seconds",
        "1",
        "--train.max_steps",
        "8",
        "--train.epochs",
        "1",
        "--train.average_epochs",
        "1",
    ]
    train(1, [*words, "--train.ema", "0", "--run_dir", str(run)])
    return run


def started(config) -> Trainer:
    trainer = Trainer(config, Ranks())
    trainer.resume()
    return trainer


def fine(speech, run, part, folder, *more):
    words = [*BASE, "--data.train_shards", str(speech / part), "--data.speakers_per_batch", "4", "--loss.margin", "0.5"]
    words += ["--data.crop_seconds", "2", "--train.initial_model", str(run), "--run_dir", str(folder)]
    return [*words, "--train.max_steps", "3", *more]


def test_a_large_margin_run_starts_from_the_averages_and_the_rows_of_speed_1(speech, finished, tmp_path):
    words = fine(speech, finished, "first", tmp_path / "lm", "--augment.speed_classes", "3")
    before = with_averages(newest(finished, warn=print)[1])
    trainer = started(parse(words))
    assert torch.equal(trainer.task.loss.weight, before["loss"]["weight"])  # 3 x 16 rows, all of them
    small = started(parse(fine(speech, finished, "first", tmp_path / "small")))
    assert torch.equal(small.task.loss.weight, before["loss"]["weight"][:16])
    for name, value in small.task.model.state_dict().items():
        assert torch.equal(value, before["model"][name]), name
    last = started(parse(fine(speech, finished, "first", tmp_path / "x", "--train.initial_weights", "trained")))
    trained = newest(finished, warn=print)[1]["model"]
    assert all(torch.equal(value, trained[name]) for name, value in last.task.model.state_dict().items())
    lines = train(1, words)
    assert [line["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize(("part", "known", "new"), [("fewer", 10, 2), ("more", 16, 8)])
def test_fine_tuning_on_other_speakers_keeps_known_rows_and_watches_the_old_list(
    part, known, new, speech, shared, finished, tmp_path, capfd
):
    more = [
        "--optim.network_lr",
        "0.1",
        "--train.frozen",
        "stem",
        "norm",
        "stages.0",
        "--eval.root",
        str(shared / "speech"),
    ]
    more += ["--eval.trials", str(speech / "new.txt"), str(speech / "old.txt"), "--eval.every_epochs", "0"]
    words = fine(speech, finished, part, tmp_path / part, *more)
    before = with_averages(newest(finished, warn=print)[1])
    trainer = started(parse(words))
    assert f"head: rows of {known} speakers kept, those of {new} begin anew" in capfd.readouterr().err
    old = dict(zip(before["speakers"], before["labels"]))
    for speaker, label in zip(trainer.speakers(), trainer.corpus.utterances.labels.tolist()):
        if speaker in old:
            assert torch.equal(trainer.task.loss.weight[label], before["loss"]["weight"][old[speaker]])
    lines = train(1, words)
    lists = next(line["eval"] for line in read_metrics(tmp_path / part / "metrics.jsonl") if "eval" in line)
    assert {"new", "old"} <= set(map(str, lists["lists"])) and len(lines) >= 3
    after = newest(tmp_path / part, warn=print)[1]["model"]
    moved = {name for name, value in before["model"].items() if not torch.equal(value, after[name])}
    frozen = {name for name in after if name.startswith(("stem.", "norm.", "stages.0."))}
    assert len(frozen) > 20 and not moved & frozen  # statistics of BatchNorm included
    assert len(moved) > 0.8 * len(set(after) - frozen - {name for name in after if name.startswith("features.")})


@pytest.mark.parametrize("part", ["first", "fewer", "more"])
def test_fine_tuning_with_a_large_margin_starts_from_an_imported_checkpoint(part, speech, finished, tmp_path, capfd):
    network, _, _ = load_network(finished)
    torch.save(to_legacy(network, None), tmp_path / "imported.model")
    words = fine(speech, tmp_path / "imported.model", part, tmp_path / "run", "--optim.lr", "1e-9")
    assert [line["step"] for line in train(1, words)] == [1, 2, 3]
    assert "imported.model" in capfd.readouterr().err
    after, _, meta = load_network(tmp_path / "run")
    assert len(meta["speakers"]) == {"first": 16, "fewer": 12, "more": 24}[part]
    for name, value in network.named_parameters():  # of theirs: three steps at 1e-9 move nothing
        torch.testing.assert_close(after.get_parameter(name), value, rtol=0, atol=1e-5)


def official(kind: str, folder):
    """A small file of another project and the options of a run that starts from it."""
    if kind == "resemblyzer":
        path = Path(resemblyzer.__file__).parent / "pretrained.pt"  # the published weights
        return path, ["--model.name", "GE2E-LSTM", "--loss.name", "angleproto", "--data.utterances_per_speaker", "2"]
    model = build_model(ModelConfig("ECAPA-512"))
    folder = folder / "wespeaker"
    folder.mkdir()
    torch.save(model.state_dict() | {"projection.weight": torch.zeros(48, 192)}, folder / "avg_model.pt")
    (folder / "config.yaml").write_text("model: ECAPA_TDNN_GLOB_c512\nmodel_args: {feat_dim: 80, embed_dim: 192}\n")
    return folder, ["--model.name", "ECAPA-512"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wespeaker", "resemblyzer"])
def test_a_run_starts_from_other_projects_files(kind, speech, shared, tmp_path, capfd):
    path, options = official(kind, tmp_path)
    words = ["--data.train_shards", str(speech / "fewer"), "--data.speakers_per_batch", "3", "--data.crop_seconds", "1"]
    words += [*BASE[6:], "--loss.name", "aamsoftmax", "--data.utterances_per_speaker", "1", *options]
    words += ["--train.initial_model", str(path), "--optim.lr", "1e-5", "--eval.every_epochs", "0"]
    words += ["--eval.trials", str(speech / "old.txt"), "--eval.root", str(shared / "speech"), "--train.max_steps", "2"]
    before, _, _ = load_network(path)
    trainer = started(parse([*words, "--run_dir", str(tmp_path / "begun")]))
    assert "every row begins anew" in capfd.readouterr().err
    assert all(torch.equal(v, before.state_dict()[name]) for name, v in trainer.task.model.state_dict().items())
    lines = train(1, [*words, "--run_dir", str(tmp_path / "run")])
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    after, config, meta = load_network(tmp_path / "run")
    assert meta["step"] == 2 and config.model.name == options[1]
    near = [(v - before.state_dict()[n]).abs().max() for n, v in after.named_parameters()]
    assert 0 < max(near) < 1e-3  # two small steps away
    # The run's file to hand on starts the next one.
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "a.safetensors")]) == 0
    words[words.index(str(path))] = str(tmp_path / "a.safetensors")
    trainer = started(parse([*words, "--run_dir", str(tmp_path / "next")]))
    assert all(torch.equal(v, after.state_dict()[name]) for name, v in trainer.task.model.state_dict().items())


def test_a_run_of_another_network_is_told_the_options_of_the_file(speech, tmp_path, capfd):
    path, _ = official("wespeaker", tmp_path)
    words = fine(speech, path, "fewer", tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"Give the options it was trained with \(--model.name ECAPA-512\), or"):
        started(parse(words))
    torch.save(build_model(ModelConfig("CAM++", embedding_size=192)).state_dict(), tmp_path / "campplus_cn_common.bin")
    words[words.index(str(path))] = str(tmp_path / "campplus_cn_common.bin")
    for word, value in (("--model.name", "CAM++"), ("--model.width", "1"), ("--model.embedding_size", "192")):
        words[words.index(word) + 1] = value
    started(parse(words))
    said = capfd.readouterr().err
    assert "recognised as 3D-Speaker's CAM++" in said
    assert (
        "other features than this run's; its own are --model.name CAM++ --model.embedding_size 192 --model.variant 3ds"
        in said
    )


def test_a_checkpoint_that_voxceleb_trainer_left_in_the_run_s_folder_goes_on_with_its_next_epoch(
    speech, finished, tmp_path, capfd
):
    network, _, _ = load_network(finished)
    theirs = tmp_path / "a" / "model" / "model000000002.model"
    theirs.parent.mkdir(parents=True)
    torch.save({"model_state_dict": to_legacy(network, None), "optimizer_state_dict": {}, "epoch": 2}, theirs)
    words = [*fine(speech, theirs, "first", tmp_path / "a"), "--optim.schedule", "step", "--optim.lr_decay_epochs", "1"]
    words[words.index("--train.max_steps") : words.index("--train.max_steps") + 2] = ["--train.epochs", "3"]
    trainer = started(parse(words))
    assert trainer.step == 2 * trainer.steps_per_epoch and trainer.total_steps == 3 * trainer.steps_per_epoch
    assert "going on after epoch 2" in capfd.readouterr().err
    lines = [line for line in train(1, words) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(trainer.step + 1, trainer.total_steps + 1))
    assert lines[0]["lr"] == pytest.approx(0.001 * 0.95**2)  # twice decayed


def test_a_part_that_the_network_has_not_is_an_error(speech, finished, tmp_path):
    with pytest.raises(
        ConfigError, match=r"train.frozen body: the network has no such part; it has features, stem, norm, stages"
    ):
        started(parse(fine(speech, finished, "first", tmp_path / "a", "--train.frozen", "body")))
