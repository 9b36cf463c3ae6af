"""voxceleb_trainer's own command lines, run to their end on folders of WAV files with 420 speakers."""

import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from spknet import rng
from spknet.checkpoints import voxceleb_trainer as legacy_state
from spknet.config import ModelConfig
from spknet.models import build_model
from tests.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--max_frames", "30", "--eval_frames", "40", "--max_epoch", "1", "--test_interval", "1"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """420 speakers x 2 utterances of half a second to train on, 4 others to test on: a hum of their own pitch, and noise."""
    root, draws, t = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0), np.arange(8000) / 16000
    train, trials, tested = [], [], []
    for speaker in range(424):
        pitch = 80 + 0.7 * speaker
        hum = sum(np.sin(2 * np.pi * k * pitch * t) / k for k in range(1, 12))
        for utterance in range(2):
            name = f"id{speaker:05d}/s{utterance}/00001.wav"
            samples = (2000 * hum + 300 * draws.standard_normal(8000)).clip(-32768, 32767).astype("<i2")
            path = root / ("train" if speaker < 420 else "test") / name
            path.parent.mkdir(parents=True)
            with wave.open(str(path), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", ""))
                file.writeframes(samples.tobytes())
            (train if speaker < 420 else tested).append((speaker, name))
    for a, left in tested:
        trials += [f"{int(a == b)} {left} {right}" for b, right in tested if left < right]
    (root / "train_list.txt").write_text("".join(f"id{s:05d} {name}\n" for s, name in train))
    (root / "test_list.txt").write_text("\n".join(trials) + "\n")
    return root


def paths(corpus: Path, save_path: Path) -> list[str]:
    words = ["--train_list", corpus / "train_list.txt", "--test_list", corpus / "test_list.txt"]
    words += ["--train_path", corpus / "train", "--test_path", corpus / "test", "--save_path", save_path]
    return [str(word) for word in words]


def run(words: list[str], launcher: list[str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *(launcher or []), "spknet.train", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def finished(save_path: Path) -> list[dict]:
    """The metrics of a run that is done."""
    assert json.loads((save_path / "state.json").read_text())["state"] == "done"
    return [json.loads(text) for text in (save_path / "metrics.jsonl").read_text().splitlines()]


def test_am_softmax(corpus, tmp_path):
    line = "--model ResNetSE34L --encoder SAP --trainfunc amsoftmax --optimizer adam --batch_size 200 --scale 30 --margin 0.3"
    done = run([*line.split(), *SHORT, *paths(corpus, tmp_path / "exp1")])
    metrics = finished(tmp_path / "exp1")
    assert metrics[-1]["step"] == 4 and 0 <= metrics[-1]["eval"]["eer"] <= 100  # 840 utterances in batches of 200
    assert done.stderr.count("python -m spknet.train --run_dir") == 1
    config = yaml.safe_load((tmp_path / "exp1" / "config.yaml").read_text())
    assert config["model"]["input_scale"] == "int16" and config["loss"]["scale"] == 30


def test_angular_prototypical_on_two_ranks(corpus, tmp_path):
    line = "--model ResNetSE34L --encoder SAP --trainfunc angleproto --optimizer adam --batch_size 200 --nPerSpeaker 2"
    torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    torchrun += ["--master_port", str(free_port()), "-m"]
    done = run([*line.split(), *SHORT, *paths(corpus, tmp_path / "exp2")], torchrun)
    assert finished(tmp_path / "exp2")[-1]["step"] == 2  # 420 speakers in batches of 200
    assert done.stderr.count("the same in spknet's terms") == 1


def test_the_balanced_configuration(corpus, tmp_path):
    line = "--model ResNetSE34L --trainfunc angleproto --batch_size 400 --nPerSpeaker 2"
    run([*line.split(), *SHORT, *paths(corpus, tmp_path / "exp3")])
    assert finished(tmp_path / "exp3")[-1]["step"] == 1


def test_eval_with_an_initial_model_never_asks_and_saves_scores_where_told(corpus, tmp_path):
    model = build_model(ModelConfig(window="hann"))
    rng.initialize(model, 0)
    torch.save(legacy_state.to_legacy(model, None), tmp_path / "baseline_lite_ap.model")
    line = "--eval --model ResNetSE34L --trainfunc angleproto --eval_frames 40"
    words = [*line.split(), *paths(corpus, tmp_path / "exp4")]
    words += [
        "--initial_model",
        str(tmp_path / "baseline_lite_ap.model"),
        "--eval.scores",
        str(tmp_path / "scores.txt"),
    ]
    done = run(words)
    assert re.search(r"EER \d+\.\d{4} %, minDCF\(0\.05\) [01]\.\d{5}", done.stdout)
    scores = [line.split() for line in (tmp_path / "scores.txt").read_text().splitlines()]
    trials = [line.split() for line in (corpus / "test_list.txt").read_text().splitlines()]
    assert [row[1:3] for row in scores] == [row[1:3] for row in trials]
    assert all(-2 <= float(row[0]) <= 0 for row in scores)  # minus a mean distance of unit vectors
    assert not (tmp_path / "exp4" / "state.json").exists()
