"""The benchmark of augmentation: voxceleb_trainer's way as its recipe says, and a small run of the whole."""

import numpy as np
import pytest
import soundfile
import torch

from tools.bench.__main__ import main
from tools.bench.augment import BANDS, SNR, Spectrum, TheirWay, make_noise, their_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    speech = np.random.default_rng(0).normal(0, 0.1, 40000)
    soundfile.write(folder / "speech.wav", speech, 16000, subtype="PCM_16")
    return folder, make_noise(folder, 8)


def test_their_noise_has_its_level(folder):
    way = TheirWay(folder[1], 32000, like_wespeaker=False)
    audio = way.crop(str(folder[0] / "speech.wav"))
    for category, (low, high) in SNR.items():
        added = way.add(audio, category, 1) - audio
        ratio = 10 * np.log10((audio**2).mean() / (added**2).mean())
        assert len(audio) == 32000 and low - 0.1 < ratio < high + 0.1  # the floor of 1e-4 moves it a little


def test_their_features_are_ours():
    waves = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) / 10
    assert (their_features()(waves) - Spectrum(16000, BANDS)(waves)).abs().max() < 1e-3


def test_a_small_run_prints_a_row_for_each_way(capsys):
    words = ["augment", "--utterances", "150", "--noise", "8", "--seconds", "0", "--crop_seconds", "0.5"]
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ours, wespeaker, with features") for line in said) == 7
    assert [line for line in said if "theirs, with their features" in line and " x " in line]
    assert said[-1].startswith("reading and mixing in a step with it")
