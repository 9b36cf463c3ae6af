"""Augmentation: the level that was asked for, reverberation against direct convolution, speed, masks."""

import numpy as np
import pytest
import torch

from spknet.config import AugmentConfig, ConfigError, from_dict
from spknet.data.augment import SNR_DB, Augmenter, mix

N, SAMPLES = 400, 4000


def draw(noise_and_rir, **options):
    noise, rir = noise_and_rir
    config = AugmentConfig(noise_shards=str(noise), rir_shards=str(rir), **options)
    return tensors(Augmenter(config, 3, SAMPLES, 16000).read(1, np.arange(N)))


def tensors(drawn):
    return {name: torch.as_tensor(value) for name, value in drawn.items()}


def speech():
    return torch.from_numpy(np.random.default_rng(0).integers(-9000, 9000, (N, SAMPLES)).astype(np.int16))


def test_noise_is_mixed_at_its_signal_to_noise_ratio(noise_and_rir):
    drawn, crops = draw(noise_and_rir, probability=1.0), speech()
    clean, mixed = crops.double() / 32768, mix(crops, drawn, SAMPLES, torch.float64)
    assert sorted([*drawn["noise_of"].tolist(), *drawn["rir_of"].tolist()]) == list(range(N))  # one kind each
    added = (mixed - clean)[drawn["noise_of"]]
    ratio = 10 * torch.log10(clean[drawn["noise_of"]].square().mean(1) / added.square().mean(1))
    torch.testing.assert_close(ratio, drawn["noise_snr"], rtol=0, atol=1e-6)
    low, high = min(a for a, _ in SNR_DB.values()), max(b for _, b in SNR_DB.values())
    assert low <= ratio.min() and ratio.max() <= high and ratio.max() - ratio.min() > 10


def test_reverberation_is_convolution_aligned_to_the_direct_sound_at_the_same_level(noise_and_rir):
    drawn, crops = draw(noise_and_rir, probability=1.0), speech()
    mixed = mix(crops, drawn, SAMPLES, torch.float64)
    for place, response in list(zip(drawn["rir_of"].tolist(), drawn["rir"].numpy().astype(float)))[:5]:
        x = crops[place].numpy() / 32768
        direct = np.abs(response).argmax()
        wet = np.convolve(x, response)[direct : direct + SAMPLES]
        wet *= np.sqrt((x**2).mean() / (wet**2).mean())
        np.testing.assert_allclose(mixed[place].numpy(), wet, atol=1e-9)


def test_probability_is_that_of_being_augmented(noise_and_rir):
    drawn = draw(noise_and_rir, probability=0.3)
    hit = len(drawn["noise_of"]) + len(drawn["rir_of"])
    assert abs(hit / N - 0.3) < 4 * (0.3 * 0.7 / N) ** 0.5
    none = draw(noise_and_rir, probability=0.0)
    assert torch.equal(mix(speech(), none, SAMPLES, torch.float64), speech().double() / 32768)


def test_draws_belong_to_slots_not_to_batches(noise_and_rir):
    noise, rir = noise_and_rir
    augmenter = Augmenter(
        AugmentConfig(noise_shards=str(noise), rir_shards=str(rir), spec_augment=True), 3, SAMPLES, 16000
    )
    crops = speech()
    whole = tensors(augmenter.read(1, np.arange(N)))
    part = tensors(augmenter.read(1, np.arange(100, 150)))
    mixed = mix(crops, whole, SAMPLES, torch.float64)[100:150]
    torch.testing.assert_close(mix(crops[100:150], part, SAMPLES, torch.float64), mixed, rtol=1e-9, atol=1e-12)
    assert torch.equal(whole["masks"][100:150], part["masks"])


def test_speed_moves_a_tone_by_its_factor():
    augmenter = Augmenter(AugmentConfig(speed=[0.9, 1.25]), 0, SAMPLES, 16000)
    assert augmenter.read_samples == 5000
    tone = (8000 * np.sin(2 * np.pi * 1000 * np.arange(5000) / 16000)).astype(np.int16)
    drawn = tensors(augmenter.read(0, np.arange(20)))
    waves = mix(torch.from_numpy(np.tile(tone, (20, 1))), drawn, SAMPLES, torch.float64)
    assert waves.shape == (20, SAMPLES) and set(drawn["speed"].tolist()) == {90, 125}
    for wave, percent in zip(waves.numpy(), drawn["speed"].tolist()):
        peak = np.abs(np.fft.rfft(wave * np.hanning(SAMPLES))).argmax() * 16000 / SAMPLES
        assert peak == pytest.approx(10 * percent, abs=8)


def test_masks_have_the_promised_sizes():
    masks = Augmenter(AugmentConfig(spec_augment=True), 0, SAMPLES, 16000).read(0, np.arange(1000))["masks"]
    width = masks[:, :, 1] - masks[:, :, 0]
    assert masks.shape == (1000, 4, 2) and masks.min() >= 0 and masks.max() <= 1
    assert width[:, :2].max() <= 0.2 and width[:, 2:].max() <= 0.1 and width.min() >= 0
    assert width[:, :2].mean() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"speed": [3.0]}, "speeds lie between 0.5 and 2"),
        ({"probability": 1.5}, "augment.probability: 1.5 given, expected less than or equal to 1"),
    ],
)
def test_impossible_settings_are_errors(options, expected):
    with pytest.raises(ConfigError, match=expected):
        Augmenter(from_dict({"augment": options}).augment, 0, SAMPLES, 16000)


def test_unknown_categories_are_an_error(noise_and_rir, corpus):
    with pytest.raises(ConfigError, match=r"categories are \['music', 'noise', 'speech'\]"):
        Augmenter(AugmentConfig(noise_shards=str(corpus / "shards")), 0, SAMPLES, 16000)
