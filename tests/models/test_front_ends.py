"""Front ends against the projects whose they are, and dither."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spknet.config import ConfigError, FeaturesConfig, ModelConfig
from spknet.data import dither
from spknet.models import build_model
from spknet.models.features import mel_energies, reflected, spans_of
from spknet.models.front_ends import FRONT_ENDS, Kaldi, build_features, resolve
from tests.models.test_official_networks import official_facts

REFERENCE = json.loads((Path(__file__).resolve().parents[1] / "reference" / "features.json").read_text())
OPTIONS = {
    "wespeaker": (80, FeaturesConfig("kaldi", window="hamming", scale="int16")),
    "3dspeaker": (80, FeaturesConfig("kaldi", window="povey", scale="unit")),
    "speechbrain": (80, FeaturesConfig("speechbrain")),
    "redimnet": (72, FeaturesConfig("redimnet")),
    "redimnet2": (72, FeaturesConfig("tfmel")),
}


def sounds(n: int, samples: int) -> torch.Tensor:
    """Harmonic sounds with vibrato and noise, as the README of the reference makes them: (n, samples)."""
    noise, t, rows = np.random.default_rng(7), np.arange(samples) / 16000, []
    for i in range(n):
        pitch = 100 + 40 * i + 10 * np.sin(2 * np.pi * (1 + i) * t)
        phase = 2 * np.pi * np.cumsum(pitch) / 16000
        harmonics = sum(np.sin(k * phase) / k * (1 + np.sin(2 * np.pi * 3 * t + k)) for k in range(1, 20))
        rows.append(0.05 * harmonics + 0.01 * noise.standard_normal(samples))
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def reference_input(name: str) -> torch.Tensor:
    if name != "quiet":
        return sounds(2, 8000)
    quiet = sounds(1, 4000) * np.float32(1e-4)
    quiet[:, :1600] = 0
    return quiet


def front_end(project: str, **changes) -> torch.nn.Module:
    bands, config = OPTIONS[project]
    config = FeaturesConfig(**{**config.__dict__, **changes})
    return build_features(ModelConfig(n_mels=bands), 16000, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["waves(2, 8000)", "quiet"])
@pytest.mark.parametrize("project", OPTIONS)
def test_features_equal_the_project_s(project, name, dtype):
    facts, waves = REFERENCE[project][name], reference_input(name)
    features = front_end(project).to(dtype)(waves).mT  # (batch, frames, bands)
    assert features.dtype == dtype and features.shape[1] == facts["frames"]
    expected = torch.tensor(facts["every 7th frame, every 5th band"], dtype=dtype)
    assert (features[:, ::7, ::5] - expected).abs().max() < 1e-4
    if (official := official_facts(f"features-{project}")) is not None:
        every = torch.tensor(official[name]["mean_removed"], dtype=dtype)
        assert (features - every).abs().max() < 1e-4
    whole = front_end(project, remove_mean=False).to(dtype)(waves)
    mean = torch.tensor(facts["mean_over_time"], dtype=dtype)
    assert (whole.mean(dim=2)[:, ::5] - mean).abs().max() < 1e-4


@pytest.mark.parametrize("project", OPTIONS)
def test_numbers_of_frames_equal_the_project_s(project):
    features = front_end(project)
    for samples, frames in REFERENCE[project]["frames"].items():
        assert features(torch.ones(1, int(samples))).shape == (1, features.bands, frames)


@pytest.mark.parametrize("rate", [16000, 8000])
@pytest.mark.parametrize("window", ["hamming", "povey"])
def test_kaldi_equals_torchaudio_at_any_rate_and_scale(window, rate):
    from torchaudio.compliance import kaldi

    waves = sounds(2, 6000) * torch.tensor([[1.0], [1e-3]])
    for scale, factor in (("unit", 1), ("int16", 32768)):
        found = Kaldi(rate, 40, FeaturesConfig("kaldi", window=window, scale=scale, remove_mean=False))(waves)
        for row, wave in zip(found, waves):
            options = {"num_mel_bins": 40, "window_type": window, "sample_frequency": rate}
            theirs = kaldi.fbank(factor * wave[None], dither=0.0, **options)
            assert (row.T - theirs).abs().max() < 1e-4


def test_swapped_scales_show_on_quiet_input_only():
    def difference(waves):
        rows = [front_end("wespeaker", scale=scale)(waves) for scale in ("unit", "int16")]
        return float((rows[0] - rows[1]).abs().max())

    assert difference(sounds(2, 8000)) < 1e-3
    assert difference(reference_input("quiet")) > 1


@pytest.mark.parametrize("project", OPTIONS)
def test_features_are_float32_under_autocast_and_one_utterance_does_not_see_the_others(project):
    features, waves = front_end(project), sounds(3, 4000)
    plain = features(waves)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(waves), plain)
    torch.testing.assert_close(features(waves[1:2]), plain[1:2], atol=2e-5, rtol=0)
    assert not features.state_dict()  # tables come from the options, not from checkpoints


def test_normalised_waves_have_no_level_and_others_do():
    waves = sounds(1, 4000)
    for project, normalised in (("redimnet2", True), ("redimnet", False)):
        for wanted in (None, True, False):
            features = front_end(project, normalize_wave=wanted, remove_mean=False)
            same = torch.allclose(features(waves), features(0.1 * waves), atol=1e-3)
            assert same == (normalised if wanted is None else wanted)


def test_a_wave_shorter_than_a_window_is_repeated():
    waves = sounds(1, 250)
    for project in OPTIONS:
        features = front_end(project)
        assert torch.equal(features(waves), features(torch.cat([waves, waves], dim=1)[:, :400]))


def test_frames_and_mel_limits_follow_the_sample_rate():
    for project, frames in {"wespeaker": 98, "speechbrain": 101, "redimnet": 67, "redimnet2": 99}.items():
        bands, config = OPTIONS[project]
        features = build_features(ModelConfig(n_mels=bands // 2), 8000, config)
        assert features(torch.randn(1, 8000)).shape == (1, bands // 2, frames)
    t = torch.arange(8000) / 8000
    low, high = (torch.sin(2 * torch.pi * hz * t)[None] for hz in (3700, 3900))  # limit of redimnet: 3800 Hz
    features = build_features(ModelConfig(n_mels=36), 8000, FeaturesConfig("redimnet", remove_mean=False))
    assert features(low)[0, -1].mean() > features(high)[0, -1].mean() + 1


def test_masks_come_after_the_mean_is_removed():
    features = front_end("wespeaker")
    masked = features(sounds(1, 4000), torch.tensor([[[0, 0.5], [0, 0], [0, 0], [0, 0]]]))
    assert torch.equal(masked[:, :40], torch.zeros_like(masked[:, :40])) and masked[:, 40:].abs().min() > 0


def test_published_options_give_way_to_the_user_s():
    assert resolve(FeaturesConfig(), "3dspeaker") == FeaturesConfig("kaldi", window="povey", scale="unit")
    assert resolve(FeaturesConfig(scale="int16"), "3dspeaker").scale == "int16"
    assert resolve(FeaturesConfig("tfmel"), "3dspeaker").name == "tfmel"
    assert resolve(FeaturesConfig(), "taoruijie").hop_ms == 10


@pytest.mark.parametrize("name", ["log_mel", "spectrum", *FRONT_ENDS])
def test_every_network_that_has_features_takes_every_front_end(name):
    waves = torch.randn(2, 6000) * 0.1
    for network in ("ResNetSE34L", "ResNet18"):
        model = build_model(ModelConfig(name=network, width=0.25, n_mels=40), 16000, FeaturesConfig(name))
        assert model(waves).shape[0] == 2 and model.features.bands == (257 if name == "spectrum" else 40)


def test_front_ends_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="features.name kaldi: RawNet3 learns its filters"):
        build_model(ModelConfig("RawNet3", encoder="ECA"), 16000, FeaturesConfig("kaldi"))
    with pytest.raises(ConfigError, match="features.hop_ms 0.01: less than a sample at 16000 Hz"):
        front_end("wespeaker", hop_ms=0.01)


def test_dither_is_normal_noise_of_the_wanted_deviation():
    keys = torch.from_numpy(dither.keys(3, 1, np.arange(50)))
    noise = dither.normal(keys, 4001, torch.float64)
    assert noise.shape == (50, 4001) and abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    below = torch.stack([(noise < x).double().mean() for x in (-2.0, -1.0, 0.0, 1.0, 2.0)])
    assert (below - torch.tensor([0.02275, 0.15866, 0.5, 0.84134, 0.97725])).abs().max() < 0.005
    lags = [(noise[:, k:] * noise[:, : 4001 - k]).mean() for k in (1, 2, 2000, 2001)]
    assert max(map(abs, lags)) < 0.01 and abs(np.corrcoef(noise[:2].numpy())[0, 1]) < 0.05
    quiet = dither.add(torch.zeros(50, 4001), keys, steps=2.0)
    assert abs(32768 * quiet.std() - 2) < 0.02


def test_dither_depends_on_seed_epoch_and_slot_only():
    every = dither.keys(3, 1, np.arange(8))
    assert np.array_equal(dither.keys(3, 1, np.arange(4, 8)), every[4:])
    others = [dither.keys(4, 1, np.arange(8)), dither.keys(3, 2, np.arange(8)), every[::-1]]
    assert not any((every == other).any() for other in others)
    shares = [dither.normal(torch.from_numpy(k), 1000, torch.float32) for k in (every, every[:4], every[4:])]
    assert torch.equal(shares[0], torch.cat(shares[1:]))


def test_dither_gives_digital_silence_a_spectrum():
    keys = torch.from_numpy(dither.keys(0, 0, np.arange(1)))
    noisy = front_end("wespeaker", remove_mean=False)(dither.add(torch.zeros(1, 16000), keys, 1.0))
    silent = front_end("wespeaker", remove_mean=False)(torch.zeros(1, 16000))
    # White noise of variance 1 has a power of sum(w^2) = 400 * 0.397 = 159 in each bin, before pre-emphasis (|H|^2 = 3.8
    # at half the rate) and the sum over a filter's bins, about 5 in the last band.
    assert abs(silent.max() - np.log(1.1920929e-7)) < 1e-3
    assert abs(noisy[0, -1].mean() - np.log(159 * 3.8 * 5)) < 1


@pytest.mark.parametrize("project", OPTIONS)
def test_pieces_and_narrow_products_change_nothing(project, monkeypatch):
    waves, features = sounds(5, 8000), front_end(project).double()
    expected = features(waves)
    monkeypatch.setattr("spknet.models.features.PIECE", 100)  # frames: two waves at a time, and one
    assert (features(waves) - expected).abs().max() < 1e-10
    power = torch.rand(2, 3, len(features.filters), dtype=torch.float64)
    narrow = spans_of(features.filters)
    assert sum((last - first) * (high - low) for first, last, low, high in narrow) < features.filters.numel() / 2
    found = mel_energies(power, features.filters, narrow)
    assert (found - power @ features.filters).abs().max() < 1e-12


def test_a_band_without_a_bin_stays_empty_and_reflection_is_torch_s():
    power = torch.rand(1, 2, 9)
    assert mel_energies(power, torch.zeros(9, 20), spans_of(torch.zeros(9, 20))).eq(0).all()
    waves = torch.rand(2, 7)
    assert reflected(waves, 3).equal(torch.nn.functional.pad(waves, (3, 3), mode="reflect"))
    with pytest.raises(RuntimeError, match="[Pp]adding"):
        reflected(waves, 7)
