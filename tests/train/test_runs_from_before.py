"""A run folder and a packed data set of commit b3abf10 (November 2026): today's code opens, loads and continues them.

tests/reference/before/ was made by that commit's code, on one CPU thread: shards/ (4 speakers x 2 utterances, FLAC), run/ (stopped
by SIGTERM at step 3 of 6), losses.json (its command, and the losses of the undisturbed 6 steps).
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from shards.reader import open_shards
from spknet.checkpoints.network import load_network
from spknet.train.metrics_log import read_metrics
from spknet.train.run_folder import read_state
from tests.ranks import train

BEFORE = Path(__file__).parents[1] / "reference/before"
REFERENCE = json.loads((BEFORE / "losses.json").read_text())


def words(run_dir):
    command = list(REFERENCE["command"])
    command[command.index("shards")] = str(BEFORE / "shards")
    return [*command, "--run_dir", str(run_dir)]


def losses(lines):
    return {line["step"]: line["loss"] for line in lines}


def test_a_packed_data_set_from_before_gives_the_same_samples():
    utterances = open_shards(BEFORE / "shards")
    digests = {
        utterances.key(row): hashlib.sha256(utterances.read_utterance(row).astype("<i2").tobytes()).hexdigest()
        for row in range(len(utterances))
    }
    assert digests == REFERENCE["audio_sha256"]


def test_the_network_of_a_run_from_before_is_loaded():
    network, config, meta = load_network(BEFORE / "run")
    assert (config.model.name, config.model.n_mels, meta["step"], len(meta["speakers"])) == ("ResNetSE34L", 24, 3, 4)
    with torch.no_grad():
        assert network(torch.randn(2, 8000)).shape == (2, 8)


def test_a_run_from_before_goes_on_with_the_losses_it_would_have_had(tmp_path):
    shutil.copytree(BEFORE / "run", tmp_path / "run")
    kept = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert read_state(tmp_path / "run")["state"] == "requeue"
    train(1, words(tmp_path / "run"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes().startswith(kept)
    found = losses(read_metrics(tmp_path / "run/metrics.jsonl"))
    expected = {int(step): loss for step, loss in REFERENCE["losses"].items()}
    assert list(found) == [1, 2, 3, 4, 5, 6]
    # Kernels differ between CPUs, by roundings of float32.
    assert found == pytest.approx(expected, rel=1e-6)
    assert read_state(tmp_path / "run")["state"] == "done"


def test_a_run_begun_today_has_the_losses_of_before(tmp_path):
    found = losses(train(1, words(tmp_path / "run")))
    assert found == pytest.approx({int(step): loss for step, loss in REFERENCE["losses"].items()}, rel=1e-6)
