"""What is drawn, against what was asked for: 20,000 slots a preset, compared with the chances of the configuration."""

import numpy as np
import pytest

from spknet.config import AugmentConfig, ConfigError
from spknet.data.augment import Augmenter
from spknet.data.presets import composition

N = 20_000
SPREAD = 4.5  # standard deviations that a count may be off: one test in 150,000 fails by chance


def augmenter(noise_and_rir, **options) -> Augmenter:
    noise, rir = noise_and_rir
    return Augmenter(AugmentConfig(noise_shards=str(noise), rir_shards=str(rir), **options), 7, 3200, 16000)


def shares(of: Augmenter) -> dict:
    drawn = of.draw(1, np.arange(N))
    return {"as it is": (drawn.kind < 0).mean()} | {kind: (drawn.kind == i).mean() for i, kind in enumerate(of.kinds)}


# By hand from the recipes: WeSpeaker draws among all recordings (4 of each category here, speech as one talker).
EXPECTED = {
    "none": {"as it is": 0.4} | {(s, False): 0.15 for s in ("noise", "music", "babble")} | {(None, True): 0.15},
    "kaldi": {"as it is": 1.28 / 2.28}
    | {(s, False): 0.25 / 2.28 for s in ("noise", "music", "babble")}
    | {(None, True): 0.25 / 2.28},
    "wespeaker": {"as it is": 0.4, (None, True): 0.3} | {(s, False): 0.1 for s in ("noise", "music", "talker")},
    "redimnet2": {"as it is": 0.4, (None, True): 0.06}
    | {(s, False): 0.6 * 0.65 / 4 for s in ("noise", "music", "talker", "babble")}
    | {(s, True): 0.6 * 0.25 / 4 for s in ("noise", "music", "talker", "babble")},
    "voxceleb_trainer": {"as it is": 0.2, (None, True): 0.2} | {(s, False): 0.2 for s in ("noise", "music", "babble")},
}
SNR = {
    "none": {"noise": (0, 15), "music": (5, 15), "babble": (13, 20)},
    "kaldi": {"noise": (0, 15), "music": (5, 15), "babble": (13, 20)},
    "wespeaker": {"noise": (0, 15), "music": (5, 15), "talker": (10, 30)},
    "redimnet2": {"noise": (0, 15), "music": (5, 15), "talker": (13, 20), "babble": (13, 20)},
    "voxceleb_trainer": {"noise": (0, 15), "music": (5, 15), "babble": (13, 20)},
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_20000_draws_have_the_shares_of_the_preset(noise_and_rir, preset):
    found = shares(augmenter(noise_and_rir, preset=preset))
    assert set(found) == set(EXPECTED[preset])
    for kind, chance in EXPECTED[preset].items():
        assert abs(found[kind] - chance) < SPREAD * (chance * (1 - chance) / N) ** 0.5, kind


def of_source(of: Augmenter, source: str, layer: int = 0) -> np.ndarray:
    """SNRs that were drawn for one source."""
    drawn = of.draw(1, np.arange(N))
    names = np.array([name or "" for name, _ in of.kinds])[drawn.kind[drawn.noise_of[layer]]]
    return drawn.noise_snr[layer][names == source]


@pytest.mark.parametrize("preset", SNR)
def test_20000_draws_have_the_levels_of_the_preset(noise_and_rir, preset):
    of = augmenter(noise_and_rir, preset=preset)
    for source, (low, high) in SNR[preset].items():
        snr = of_source(of, source)
        if preset == "kaldi":
            steps = {"noise": (0, 5, 10, 15), "music": (5, 8, 10, 15), "babble": (13, 15, 17, 20)}[source]
            counts = [(snr == step).sum() for step in steps]
            assert sum(counts) == len(snr)
            assert np.abs(np.array(counts) - len(snr) / 4).max() < SPREAD * (len(snr) * 3 / 16) ** 0.5
            continue
        assert low <= snr.min() and snr.max() <= high
        # Kolmogorov-Smirnov against the uniform distribution: 1.95 / sqrt(n) is passed once in 1000.
        grid = (np.sort(snr) - low) / (high - low)
        assert np.abs(grid - (np.arange(len(snr)) + 0.5) / len(snr)).max() < 1.95 / len(snr) ** 0.5


@pytest.mark.parametrize(("preset", "most"), [("none", 7), ("redimnet2", 6), ("voxceleb_trainer", 7)])
def test_a_babble_has_its_number_of_talkers(noise_and_rir, preset, most):
    drawn = augmenter(noise_and_rir, preset=preset).draw(1, np.arange(N))
    sizes = [len(places) for places in drawn.noise_of]
    assert len(sizes) == most and sizes[1] == sizes[2] > 500  # never fewer than three
    falls = -np.diff([*sizes[2:], 0])
    expected = sizes[2] / (most - 2)
    assert np.abs(falls - expected).max() < SPREAD * expected**0.5
    apart = [len(set(np.round(snr, 9))) for snr in drawn.noise_snr[:2]]
    assert min(apart) > 400  # SNRs of their own, whether or not the preset uses them


def test_every_recording_is_equally_likely_and_gains_are_uniform(noise_and_rir):
    of = augmenter(noise_and_rir, preset="redimnet2")
    drawn = of.draw(1, np.arange(N))
    counts = np.bincount(drawn.rir_rows, minlength=4)
    assert np.abs(counts - len(drawn.rir_rows) / 4).max() < SPREAD * (len(drawn.rir_rows) * 3 / 16) ** 0.5
    gain = np.sort(drawn.tensors["gain_db"])
    assert len(gain) == N and gain[0] >= -18 and gain[-1] <= 6
    assert np.abs((gain + 18) / 24 - (np.arange(N) + 0.5) / N).max() < 1.95 / N**0.5


def test_options_beat_the_preset_and_weights_are_free(noise_and_rir):
    free = augmenter(
        noise_and_rir,
        preset="wespeaker",
        by_recording=False,
        probability=1.0,
        reverb=0.2,
        both=0.3,
        noise=0.0,
        music=3.0,
    )
    expected = {"as it is": 0.0, (None, True): 0.2, ("music", False): 0.375, ("talker", False): 0.125}
    expected |= {("music", True): 0.225, ("talker", True): 0.075}
    found = shares(free)
    assert set(found) == set(expected)
    for kind, chance in expected.items():
        assert abs(found[kind] - chance) <= SPREAD * (chance * (1 - chance) / N) ** 0.5
    assert composition(AugmentConfig(preset="wespeaker")).level == "peak"
    assert composition(AugmentConfig(preset="wespeaker", level="kept")).level == "kept"


def test_20000_channels_and_speeds_have_their_chances(noise_and_rir):
    of = augmenter(noise_and_rir, lowpass=0.25, lowpass_hz=[1000, 3000], telephone=0.1, speed=[1.0, 0.9, 1.1])
    t = of.draw(1, np.arange(N)).tensors
    for name, chance in (("lowpass_of", 0.25), ("telephone_of", 0.1)):
        assert abs(len(t[name]) / N - chance) < SPREAD * (chance * (1 - chance) / N) ** 0.5
    assert t["lowpass_hz"].min() >= 1000 and t["lowpass_hz"].max() <= 3000
    assert abs(t["lowpass_hz"].mean() - 2000) < SPREAD * 2000 / 12**0.5 / len(t["lowpass_hz"]) ** 0.5
    assert abs(t["telephone_law"].mean() - 0.5) < SPREAD * 0.5 / len(t["telephone_law"]) ** 0.5
    for percent in (90, 100, 110):
        assert abs((t["speed"] == percent).mean() - 1 / 3) < SPREAD * (2 / 9 / N) ** 0.5


def test_masks_follow_their_options(noise_and_rir):
    of = augmenter(
        noise_and_rir, spec_augment=True, spec_probability=0.6, frequency_masks=1, frequency_width=0.1, time_masks=3
    )
    masks = of.draw(1, np.arange(N)).tensors["masks"]
    width = masks[:, :, 1] - masks[:, :, 0]
    assert masks.shape == (N, 6, 2) and masks.min() >= 0 and masks.max() <= 1
    assert (width[:, 1:3] == 0).all() and width[:, 0].max() <= 0.1 and width[:, 3:].max() <= 0.1
    masked = (width > 0).any(axis=1)
    assert abs(masked.mean() - 0.6) < SPREAD * (0.24 / N) ** 0.5
    assert width[masked][:, 3].mean() == pytest.approx(0.05, abs=0.001)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"preset": "wespeaker", "rir_shards": None},
            "augment.preset=wespeaker has reverberation: give augment.rir_shards",
        ),
        ({"preset": "kaldi", "noise_shards": None}, "has noise, music, babble: give augment.noise_shards"),
        ({"reverb": 0.8, "both": 0.3}, "shares add up to 1 at most"),
        ({"noise_snr": [15, 0]}, r"augment.noise_snr=\[15.0, 0.0\]: expected \[lowest, highest\]"),
        ({"gain_db": [3]}, r"augment.gain_db=\[3.0\]: expected"),
        ({"talkers": [7, 3]}, r"augment.talkers=\[7, 3\]: expected \[fewest, most\]"),
        ({"speed": [0.9, 1.1], "speed_labels": True}, "must begin with 1.0 and hold each speed once"),
        ({"lowpass_hz": [5000, 100]}, "augment.lowpass_hz"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_what_can(noise_and_rir, options, expected):
    noise, rir = noise_and_rir
    with pytest.raises(ConfigError, match=expected):
        Augmenter(AugmentConfig(**({"noise_shards": str(noise), "rir_shards": str(rir)} | options)), 0, 3200, 16000)
