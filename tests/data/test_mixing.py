"""What comes out: levels measured on the output, convolution against scipy, channels against libsndfile."""

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch

from spknet.config import AugmentConfig
from spknet.data.augment import Augmenter
from spknet.data.channel import g711_levels, low_pass, resampler, telephone
from spknet.data.mixing import Mixing, mix

N, SAMPLES = 120, 8000
PRESETS = ("none", "kaldi", "wespeaker", "redimnet2", "voxceleb_trainer")


def speech(level_db: float = -20.0) -> torch.Tensor:
    """(N, SAMPLES) int16 of white noise at this level below full scale."""
    x = np.random.default_rng(0).standard_normal((N, SAMPLES)) * 10 ** (level_db / 20) * 32768
    return torch.from_numpy(x.round().clip(-32768, 32767).astype(np.int16))


def drawn_for(noise_and_rir, **options):
    noise, rir = noise_and_rir
    augmenter = Augmenter(AugmentConfig(noise_shards=str(noise), rir_shards=str(rir), **options), 3, SAMPLES, 16000)
    return augmenter, as_tensors(augmenter.read(1, np.arange(N)))


def as_tensors(drawn):
    return {k: v if isinstance(v, Mixing) else torch.as_tensor(v) for k, v in drawn.items()}


def wet(crops, drawn, place) -> np.ndarray:
    """The speech that noise is added to, reverberated by scipy where an impulse response was drawn."""
    x = crops[place].numpy() / 32768
    if place not in drawn["rir_of"].tolist():
        return x
    response = drawn["rir"][drawn["rir_of"].tolist().index(place)].numpy().astype(float)
    return scipy.signal.convolve(x, response / np.sqrt((response**2).sum()))[:SAMPLES]


def measured_snr(crops, drawn, mixed, place) -> list[tuple[float, float]]:
    """(drawn, measured on the output) in dB of each component: the output taken apart by least squares."""
    rows = [i for i, of in enumerate(drawn["noise_of"].tolist()) if of == place]
    parts = [wet(crops, drawn, place)] + [drawn["noise"][i].numpy() / 32768 for i in rows]
    factors = np.linalg.lstsq(np.stack(parts, axis=1), mixed[place].numpy(), rcond=None)[0]
    power = [(f * part).var() + (f * part).mean() ** 2 for f, part in zip(factors, parts)]
    return [(float(drawn["noise_snr"][i]), 10 * np.log10(power[0] / p)) for i, p in zip(rows, power[1:])]


# 40 dB below -20 dBFS is where WeSpeaker's and voxceleb_trainer's floor of 1e-4 rules: see the next test.
@pytest.mark.parametrize(
    ("preset", "level"),
    [(preset, -20.0) for preset in PRESETS] + [("none", -60.0), ("kaldi", -60.0), ("redimnet2", -60.0)],
)
def test_each_component_has_its_drawn_snr_on_the_output(noise_and_rir, preset, level):
    _, drawn = drawn_for(noise_and_rir, preset=preset, probability=1.0)
    crops = speech(level)
    mixed = mix(crops, drawn, SAMPLES, torch.float64)
    pairs = []
    for place in sorted(set(drawn["noise_of"].tolist())):
        rows = drawn["noise"][drawn["noise_of"] == place]
        if len(rows.unique(dim=0)) == len(rows):  # the same talker twice could not be told apart
            pairs += measured_snr(crops, drawn, mixed, place)
    pairs = np.array(pairs)
    assert len(pairs) >= 40 and np.ptp(pairs[:, 0]) > 10
    assert np.abs(pairs[:, 0] - pairs[:, 1]).max() < 0.5
    if preset == "voxceleb_trainer":
        assert len(pairs) > len(set(drawn["noise_of"].tolist()))  # talkers count one by one


def test_a_power_floor_lowers_the_snr_of_quiet_speech_as_its_formula_says(noise_and_rir):
    _, drawn = drawn_for(noise_and_rir, preset="wespeaker", probability=1.0, reverb=0.0)
    crops = speech(-60.0)
    mixed = mix(crops, drawn, SAMPLES, torch.float64)
    for place in drawn["noise_of"].tolist()[:10]:
        ((asked, found),) = measured_snr(crops, drawn, mixed, place)
        row = drawn["noise_of"].tolist().index(place)
        p_speech = ((crops[place].numpy() / 32768) ** 2).mean()
        p_noise = ((drawn["noise"][row].numpy() / 32768) ** 2).mean()
        expected = asked + 10 * np.log10(p_speech / (p_speech + 1e-4) * (p_noise + 1e-4) / p_noise)
        assert found == pytest.approx(expected, abs=0.01) and found < asked - 15


@pytest.mark.parametrize("preset", ["wespeaker", "redimnet2", "voxceleb_trainer"])
def test_reverberation_equals_scipy_convolution_with_unit_energy(noise_and_rir, preset):
    _, drawn = drawn_for(noise_and_rir, preset=preset, probability=1.0, level="kept", gain_db=[])
    crops = speech()
    mixed = mix(crops, drawn, SAMPLES, torch.float64)
    alone = sorted(set(drawn["rir_of"].tolist()) - set(drawn["noise_of"].tolist()))
    assert len(alone) > 5
    for place in alone:
        np.testing.assert_allclose(mixed[place].numpy(), wet(crops, drawn, place), atol=1e-12)


def test_noise_comes_on_top_of_reverberation(noise_and_rir):
    augmenter, drawn = drawn_for(noise_and_rir, preset="redimnet2", probability=1.0, both=0.9, gain_db=[])
    both = sorted(set(drawn["rir_of"].tolist()) & set(drawn["noise_of"].tolist()))
    assert len(both) > 0.8 * N
    crops = speech()
    mixed = mix(crops, drawn, SAMPLES, torch.float64)
    for place in both[:10]:
        row = drawn["noise_of"].tolist().index(place)
        speech_part, noise = wet(crops, drawn, place), drawn["noise"][row].numpy() / 32768
        factor = np.sqrt((speech_part**2).mean() / (noise**2).mean() / 10 ** (float(drawn["noise_snr"][row]) / 10))
        np.testing.assert_allclose(mixed[place].numpy(), speech_part + factor * noise, atol=1e-12)


def test_levels_are_the_peak_the_power_before_or_as_mixed(noise_and_rir):
    crops = speech()
    clean = crops.double() / 32768
    for level in ("peak", "power", "kept"):
        augmenter, drawn = drawn_for(noise_and_rir, preset="wespeaker", level=level)
        mixed = mix(crops, drawn, SAMPLES, torch.float64)
        touched = torch.from_numpy(augmenter.draw(1, np.arange(N)).kind >= 0)
        assert 40 < touched.sum() < 100 and torch.equal(mixed[~touched], clean[~touched])
        peak, power = mixed[touched].abs().amax(1), mixed[touched].square().mean(1)
        if level == "peak":
            kept = mix(crops, drawn_for(noise_and_rir, preset="wespeaker", level="kept")[1], SAMPLES, torch.float64)
            highest = kept[touched].abs().amax(1)
            torch.testing.assert_close(peak, highest / (highest + 1e-4))
        else:
            same = torch.allclose(power, clean[touched].square().mean(1), rtol=1e-9)
            assert same == (level == "power")


def test_gain_is_the_drawn_one_unless_the_peak_would_pass_full_scale(noise_and_rir):
    _, drawn = drawn_for(noise_and_rir, probability=0.0, gain_db=[-18.0, 20.0])
    crops = speech(-20.0)  # peaks near -8 dB
    mixed, clean = mix(crops, drawn, SAMPLES, torch.float64), crops.double() / 32768
    factor = (mixed[:, 1:20] / clean[:, 1:20]).nanmedian(dim=1).values
    limit = 1 / clean.abs().amax(1)
    torch.testing.assert_close(factor, torch.minimum(10 ** (drawn["gain_db"] / 20), limit), rtol=1e-9, atol=0)
    assert (10 ** (drawn["gain_db"] / 20) > limit).sum() > 20 and mixed.abs().max() <= 1 + 1e-12


def test_low_pass_equals_scipy_and_takes_what_lies_above_its_cut_off():
    rng = np.random.default_rng(1)
    waves = rng.standard_normal((2, 16000))
    out = low_pass(torch.from_numpy(waves), torch.tensor([1000 / 16000, 5000 / 16000])).numpy()
    for wave, result, cutoff in zip(waves, out, (1000, 5000)):
        taps = scipy.signal.firwin(255, cutoff, window="hamming", fs=16000)
        np.testing.assert_allclose(result, scipy.signal.convolve(wave, taps, mode="same"), atol=1e-9)
        frequencies, density = scipy.signal.welch(result, 16000, nperseg=1024)
        passed, stopped = density[frequencies < cutoff - 200], density[frequencies > cutoff + 200]
        assert 10 * np.log10(stopped.max() / passed.mean()) < -40


@pytest.mark.parametrize(("law", "subtype"), [("mu", "ULAW"), ("a", "ALAW")])
def test_g711_levels_are_those_of_libsndfile(tmp_path, law, subtype):
    every = np.arange(-32768, 32768).astype(np.int16)
    soundfile.write(tmp_path / "x.wav", every, 8000, subtype=subtype)
    theirs = soundfile.read(tmp_path / "x.wav", dtype="int16")[0].astype(int)
    assert set(theirs) == set(g711_levels(law).tolist())
    borders = (g711_levels(law)[1:] + g711_levels(law)[:-1]) / 2
    ours = g711_levels(law)[np.searchsorted(borders, every)]
    # Borders between levels may fall to either side; anywhere else the levels are the same.
    assert (ours == theirs).mean() > 0.97 and np.abs(ours - every).max() <= np.abs(theirs - every).max()


def test_a_telephone_passes_300_to_3400_hz_and_leaves_256_levels():
    t = np.arange(16000) / 16000
    tones = np.stack([0.3 * np.sin(2 * np.pi * f * t) for f in (60, 1234.5, 3000, 3900, 6000)])
    out = telephone(torch.from_numpy(tones), torch.tensor([0, 1, 0, 1, 0]), 16000).numpy()
    assert out.shape == tones.shape
    loss = 20 * np.log10((out[:, 2000:-2000].std(axis=1) + 1e-9) / tones[:, 2000:-2000].std(axis=1))
    assert abs(loss[1]) < 0.3 and abs(loss[2]) < 0.5 and (loss[[0, 3, 4]] < -30).all()
    # The quantisation noise of G.711 on a loud tone lies 38 dB below it; linear 16 bits would give 90.
    error = out[1] - tones[1] * (out[1] @ tones[1]) / (tones[1] @ tones[1])
    assert -45 < 20 * np.log10(error[2000:-2000].std() / tones[1].std()) < -30


def test_half_a_batch_is_mixed_as_in_the_whole_batch(noise_and_rir):
    options = {"preset": "redimnet2", "telephone": 0.3, "lowpass": 0.3, "speed": [1.0, 0.9, 1.1]}
    augmenter, whole = drawn_for(noise_and_rir, **options, talkers_apart=True, level="power")
    x = np.random.default_rng(2).integers(-9000, 9000, (N, augmenter.read_samples)).astype(np.int16)
    crops = torch.from_numpy(x)
    mixed = mix(crops, whole, SAMPLES, torch.float64)
    half = as_tensors(augmenter.read(1, np.arange(60, N)))
    torch.testing.assert_close(mix(crops[60:], half, SAMPLES, torch.float64), mixed[60:], rtol=1e-9, atol=1e-12)
    for i in range(20):  # and alone, where most of what is drawn for others is empty
        one = as_tensors(augmenter.read(1, np.array([i])))
        alone = mix(crops[i : i + 1], one, SAMPLES, torch.float64)
        torch.testing.assert_close(alone, mixed[i : i + 1], rtol=1e-9, atol=1e-12)


def test_the_kernel_of_a_speed_is_made_once():
    kernels = [resampler(90, 100, torch.float32, torch.device("cpu")) for _ in range(2)]
    assert kernels[0] is kernels[1] and kernels[0] is not resampler(110, 100, torch.float32, torch.device("cpu"))
