"""What augmentation does to an utterance, by name: the habits of four recipes, and any other by options.

With `probability` an utterance gets noise, reverberation, or reverberation and noise on top. Noise is one of

    noise   one recording          talker  one recording of speech
    music   one recording          babble  3 to 7 recordings of speech

Sources: kaldi, egs/voxceleb/v2 (Snyder et al. 2018, "X-vectors", section 3.3; SNRs are steps there; 1.0 of 2.28 million
utterances are augmented); wespeaker, examples/voxceleb/v2 at dfa7419; redimnet2, wespeaker_lite of entn-at/redimnet2 at
2a8d15f; voxceleb_trainer, DatasetLoader.py, five equally likely choices, one of them "as it is".

    composition(AugmentConfig(preset="wespeaker", music=0)).probability  # 0.6; options beat the preset
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from spknet.config import AugmentConfig, ConfigError

SOURCES = ("noise", "music", "talker", "babble")
CATEGORY = {"noise": "noise", "music": "music", "talker": "speech", "babble": "speech"}  # of the noise shards
PEAK_FLOOR = 1e-4  # WeSpeaker's: silence stays silence when it is divided by its peak


@dataclass(frozen=True)
class Composition:
    """One way to augment; the fields are the options of the same name in AugmentConfig."""

    probability: float = 0.6
    reverb: float | None = None  # None: as likely as one of the sources
    both: float = 0.0
    noise: float = 1.0
    music: float = 1.0
    talker: float = 0.0
    babble: float = 1.0
    by_recording: bool = False
    noise_snr: tuple[float, ...] = (0.0, 15.0)
    music_snr: tuple[float, ...] = (5.0, 15.0)
    talker_snr: tuple[float, ...] = (13.0, 20.0)
    babble_snr: tuple[float, ...] = (13.0, 20.0)
    talkers: tuple[int, int] = (3, 7)
    talkers_apart: bool = False
    power_floor: float = 0.0
    rir: str = "aligned"
    level: str = "kept"
    gain_db: tuple[float, ...] = ()


PRESETS = {
    "none": Composition(),
    "kaldi": Composition(
        probability=1.0 / 2.28,
        noise_snr=(0.0, 5.0, 10.0, 15.0),
        music_snr=(5.0, 8.0, 10.0, 15.0),
        babble_snr=(13.0, 15.0, 17.0, 20.0),
        level="power",
    ),
    "wespeaker": Composition(
        reverb=0.5,
        talker=1.0,
        babble=0.0,
        by_recording=True,
        talker_snr=(10.0, 30.0),
        power_floor=1e-4,
        rir="unit_energy",
        level="peak",
    ),
    "redimnet2": Composition(
        reverb=0.10, both=0.25, talker=1.0, talkers=(3, 6), rir="unit_energy", gain_db=(-18.0, 6.0)
    ),
    "voxceleb_trainer": Composition(
        probability=0.8, reverb=0.25, talkers_apart=True, power_floor=1e-4, rir="unit_energy"
    ),
}


def composition(config: AugmentConfig) -> Composition:
    """The preset with the options that are given. Raises ConfigError for values out of range."""
    given = {}
    for field in dataclasses.fields(Composition):
        value = getattr(config, field.name)
        if value is not None:
            given[field.name] = tuple(value) if isinstance(value, (list, tuple)) else value
    made = dataclasses.replace(PRESETS[config.preset], **given)
    _check(made)
    _check_options(config)
    return made


def _check(c: Composition) -> None:
    if (c.reverb or 0) + c.both > 1:
        raise ConfigError(f"augment.reverb={c.reverb} and augment.both={c.both}: shares add up to 1 at most")
    for name in SOURCES:
        snr = getattr(c, f"{name}_snr")
        if len(snr) < 2 or (len(snr) == 2 and snr[0] > snr[1]):
            raise ConfigError(f"augment.{name}_snr={list(snr)}: expected [lowest, highest] in dB, or more values")
    if len(c.talkers) != 2 or not 1 <= c.talkers[0] <= c.talkers[1] <= 32:
        raise ConfigError(f"augment.talkers={list(c.talkers)}: expected [fewest, most], between 1 and 32")
    _ordered("gain_db", c.gain_db, -100, 100, empty=True)


def _check_options(config: AugmentConfig) -> None:
    _ordered("lowpass_hz", config.lowpass_hz, 50, float("inf"))
    if any(not 0.5 <= speed <= 2 or round(speed * 100, 6) % 1 for speed in config.speed):
        raise ConfigError(f"augment.speed={config.speed}: speeds lie between 0.5 and 2, in steps of 0.01")
    if config.speed_labels and (config.speed[:1] != [1.0] or len(set(config.speed)) < len(config.speed)):
        raise ConfigError(
            f"augment.speed_labels: augment.speed={config.speed} must begin with 1.0 and hold each speed once; for"
            " instance [1.0, 0.9, 1.1]"
        )


def _ordered(name: str, values, low: float, high: float, empty: bool = False) -> None:
    if empty and not values:
        return
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        raise ConfigError(f"augment.{name}={list(values)}: expected [lowest, highest], both between {low} and {high}")


def kinds(c: Composition, preset: str, recordings: dict[str, int] | None, rooms: bool):
    """What an augmented utterance may get: ([(source or None, reverberated)], their probabilities).

    recordings: how many the noise shards have in each category, None without noise shards; rooms: whether there are
    impulse responses. Without a preset, what is not there is left out; a preset's part that is not there is an error.
    """
    weight = {name: getattr(c, name) for name in SOURCES}
    order = [name for category in recordings or {} for name in SOURCES if CATEGORY[name] == category and weight[name]]
    if preset != "none" and c.probability > 0:
        _check_complete(c, preset, order, rooms)
    parts = [weight[name] * (recordings[CATEGORY[name]] if c.by_recording else 1) for name in order]
    if not rooms:
        alone, both = 0.0, 0.0
    elif c.reverb is None:
        # As likely as one of equal sources; alone where there is no noise.
        alone, both = ((1 - c.both) / (1 + len(order)) if order else 1.0), c.both
    else:
        alone, both = c.reverb, c.both
    total = sum(parts)
    rest = 1 - alone - both
    made = [(name, False, rest * part / total) for name, part in zip(order, parts)]
    made += [(None, True, alone)] + [(name, True, both * part / total) for name, part in zip(order, parts)]
    made = [entry for entry in made if entry[2] > 0]
    whole = sum([p for _, _, p in made])
    return [(source, wet) for source, wet, _ in made], [p / whole for _, _, p in made]


def _check_complete(c: Composition, preset: str, order: list[str], rooms: bool) -> None:
    if not rooms and (c.reverb is None or c.reverb + c.both > 0):
        raise ConfigError(
            f"augment.preset={preset} has reverberation: give augment.rir_shards (spknet musan packs them), or"
            " set augment.reverb and augment.both to 0"
        )
    lacking = [name for name in SOURCES if getattr(c, name) and name not in order]
    if lacking and (c.reverb is None or c.reverb < 1):
        raise ConfigError(
            f"augment.preset={preset} has {', '.join(lacking)}: give augment.noise_shards with the categories"
            f" {', '.join(sorted({CATEGORY[name] for name in lacking}))} (spknet musan packs them), or set"
            f" {', '.join(f'augment.{name}' for name in lacking)} to 0"
        )
