"""Checkpoints: what is in them, what is kept, what is refused."""

import pytest
import torch

from spknet import config
from spknet.checkpoints import file as checkpoint
from spknet.checkpoints.file import CheckpointError
from spknet.checkpoints.head_rows import load_head_by_speaker
from spknet.checkpoints.network import load_network
from spknet.checkpoints.resume import changed_options
from spknet.config import LossConfig
from spknet.losses import build_loss
from spknet.options import parse
from tests.ranks import train


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = f"--data.train_shards {corpus}/shards --data.speakers_per_batch 8 --data.crop_seconds 0.5 --data.workers 0"
    words += " --model.width 0.125 --model.embedding_size 16 --loss.name softmaxproto --train.max_steps 6"
    words += f" --train.save_every_steps 2 --train.keep_checkpoints 2 --log.tensorboard false --run_dir {folder}"
    train(1, words.split())
    return folder


def test_only_the_newest_checkpoints_are_kept_and_load_with_weights_only(run):
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000004.pt", "step-00000006.pt"]
    state = torch.load(run / "checkpoints/step-00000006.pt", weights_only=True)
    wanted = {
        "step",
        "epoch",
        "config",
        "model",
        "loss",
        "optimizer",
        "scheduler",
        "scaler",
        "speakers",
        "data_fingerprint",
    }
    assert wanted <= set(state) and state["step"] == 6 and state["epoch"] == 2.0
    assert state["speakers"] == [f"id{i:05d}" for i in range(12)]


def test_a_run_folder_gives_its_network(run):
    network, c, meta = load_network(run)
    assert not network.training and c.loss.name == "softmaxproto" and meta["step"] == 6
    with torch.no_grad():
        assert network(torch.randn(2, 8000)).shape == (2, 16)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damage_is_an_error_that_names_the_file(run, tmp_path, damage):
    content = (run / "checkpoints/step-00000006.pt").read_bytes()
    path = tmp_path / "step-00000006.pt"
    path.write_bytes({"truncated": content[: len(content) // 2], "text": b"not a checkpoint", "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"step-00000006.pt is damaged or not a checkpoint: .*; use an earlier"):
        checkpoint.read(path)


def test_a_pickled_program_is_refused(tmp_path):
    class Program:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save(Program(), tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="evil.pt is damaged or not a checkpoint"):
        checkpoint.read(tmp_path / "evil.pt")


def test_a_folder_without_checkpoints_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoints/step"):
        load_network(tmp_path)


def test_changed_options_are_listed_and_harmless_ones_are_not():
    old = config.to_dict(parse(["--optim.lr", "0.1", "--data.workers", "4", "--train.epochs", "3"]))
    new = parse(["--optim.lr", "0.2", "--model.encoder", "TAP", "--eval.crops", "5", "--run_dir", "x"])
    assert changed_options(old, new) == ["model.encoder: SAP -> TAP", "optim.lr: 0.1 -> 0.2"]


def test_rows_of_a_head_follow_their_speakers():
    loss = build_loss(LossConfig(name="softmax"), 3, 4, 1)
    (name, weight), *_ = ((n, w) for n, w in loss.state_dict().items() if w.dim() == 2)
    theirs = {n: torch.full_like(w[:2], 7) if w.dim() else w for n, w in loss.state_dict().items()}
    theirs[name] = torch.tensor([[1.0, 1, 1], [2, 2, 2]])
    state = {"speakers": ["anna", "bert"], "labels": [0, 1], "loss": theirs}
    merged = load_head_by_speaker(loss, state, ["zoe", "bert", "new", "anna"], [0, 1, 2, 3])
    assert merged[name][1].tolist() == [2, 2, 2] and merged[name][3].tolist() == [1, 1, 1]
    assert torch.equal(merged[name][[0, 2]], weight[[0, 2]])
