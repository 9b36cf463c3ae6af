"""Large-margin fine-tuning and fine-tuning on other speakers, end to end on real speech."""

import pytest
import torch

from shards.pack import pack
from spknet.checkpoints.averages import with_averages
from spknet.checkpoints.file import newest
from spknet.checkpoints.network import load_network
from spknet.checkpoints.voxceleb_trainer import to_legacy
from spknet.config import ConfigError
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


def test_a_part_that_the_network_has_not_is_an_error(speech, finished, tmp_path):
    with pytest.raises(
        ConfigError, match=r"train.frozen body: the network has no such part; it has features, stem, norm, stages"
    ):
        started(parse(fine(speech, finished, "first", tmp_path / "a", "--train.frozen", "body")))
