"""A tiny run with a card: a quarter of ResNetSE34L's channels, the corpus of harmonic voices, trials of speakers it kept out."""

from pathlib import Path

import pytest

import spknet
from spknet import config
from spknet.checkpoints import file as checkpoint
from spknet.use import make_card
from tests.evaluate.test_evaluate import network, settings


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, corpus) -> Path:
    """A run on the first eight speakers; its development list holds all trials of the last four."""
    folder = tmp_path_factory.mktemp("use")
    speakers = sorted(path.name for path in corpus.glob("id*"))
    files = [f"{name}/session{u % 2}/{u:05d}.wav" for name in speakers[8:] for u in range(5)]
    pairs = [(a, b) for i, a in enumerate(files) for b in files[i + 1 :]]
    lines = [f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}\n" for a, b in pairs]
    (folder / "dev.txt").write_text("".join(lines))
    c = settings(eval={"dev_trials": str(folder / "dev.txt"), "root": str(corpus)}, loss={"name": "aamsoftmax"})
    state = {"step": 7, "epoch": 0.5, "config": config.to_dict(c), "model": network(c).state_dict()}
    state |= {"speakers": speakers, "dev_speakers": speakers[8:]}
    checkpoint.save(folder / "run", state, keep=0)
    assert make_card.main([str(folder / "run"), "--device", "cpu", "--license", "CC BY 4.0"]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def net(run_dir) -> spknet.Network:
    return spknet.load(run_dir, "cpu")


@pytest.fixture(scope="session")
def wavs(corpus) -> list[str]:
    """Four recordings of four speakers, then another of the last of them."""
    names = [f"id{s:05d}/session0/00000.wav" for s in range(4)] + ["id00003/session1/00001.wav"]
    return [str(corpus / name) for name in names]
