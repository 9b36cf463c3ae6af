"""Resemblyzer's published network in spknet, against its own program (tools/setup.sh installs it for the tests)."""

from pathlib import Path

import numpy as np
import pytest
import resemblyzer
import soundfile
import torch
from resemblyzer import audio

import spknet
from spknet.checkpoints.network import load_network
from spknet.evaluate.metrics import eer, rates
from spknet.models.lstm import n_windows

PUBLISHED = Path(resemblyzer.__file__).parent / "pretrained.pt"
LISTS = ("test_list", "test_libri", "test_ocean")


@pytest.fixture(scope="module")
def network():
    network, config, meta = load_network(PUBLISHED)
    assert meta["kind"] == "Resemblyzer's GE2E-LSTM" and config.model.name == "GE2E-LSTM"
    return network


def trials(shared) -> dict[str, list[list[str]]]:
    return {name: [line.split() for line in (shared / f"speech/{name}.txt").open()] for name in LISTS}


def samples(shared, path: str) -> np.ndarray:
    return soundfile.read(shared / "speech" / path, dtype="float32")[0]


@torch.no_grad()
def embed(network, wave: np.ndarray) -> np.ndarray:
    return network(torch.from_numpy(np.asarray(wave, np.float32))[None])[0].numpy()


def test_forty_files_are_embedded_as_by_its_own_program_without_its_cutting(network, shared):
    theirs = resemblyzer.VoiceEncoder("cpu", verbose=False)
    files = sorted({path for rows in trials(shared).values() for row in rows for path in row[1:]})
    for path in files[:: len(files) // 40][:40]:
        wave = samples(shared, path)
        expected = theirs.embed_utterance(audio.normalize_volume(wave, -30, increase_only=True))
        np.testing.assert_allclose(embed(network, wave), expected, atol=1e-5)
    front = spknet.load(PUBLISHED, "cpu").embed(shared / "speech" / path)  # the last of them by the front door
    np.testing.assert_allclose(front[0], expected, atol=1e-5)


@pytest.mark.parametrize("n", [300, 5000, 25600, 25601, 37000, 37920, 56320])
def test_windows_of_any_length_are_cut_as_by_its_own_program(n, network):
    wave = 0.01 * np.random.default_rng(n).standard_normal(n).astype(np.float32)
    theirs = resemblyzer.VoiceEncoder("cpu", verbose=False)
    raised = audio.normalize_volume(wave, -30, increase_only=True)
    expected, partial, _ = theirs.embed_utterance(raised, return_partials=True)
    assert n_windows(1 + n // 160) == len(partial)
    np.testing.assert_allclose(embed(network, wave), expected, atol=1e-5)


def test_silence_has_a_finite_embedding(network):
    assert np.isfinite(embed(network, np.zeros(40000, np.float32))).all()


@pytest.mark.slow
def test_error_rates_are_those_of_its_own_program_with_its_cutting(network, shared):
    rows = trials(shared)
    files = sorted({path for lines in rows.values() for line in lines for path in line[1:]})
    vectors = {}
    for path in files:  # its cutting of pauses, then our network and our scorer
        raised = audio.normalize_volume(samples(shared, path), -30, increase_only=True)
        vectors[path] = embed(network, audio.trim_long_silences(raised))
    for name, expected in zip(LISTS, (5.66, 0.55, 9.93)):
        labels = np.array([int(line[0]) for line in rows[name]])
        scores = np.array([vectors[a] @ vectors[b] for _, a, b in rows[name]])
        assert eer(rates(scores, labels)) == pytest.approx(expected, abs=0.3), name
