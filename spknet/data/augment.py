"""Noise, music, babble, reverberation, speed, channel and SpecAugment, drawn by slot, mixed on the device.

The loader's half is here: `Augmenter.draw` decides by slot (spknet/data/presets.py says what there is), `read` gets the int16
crops of noise and impulse responses. The device's half is `mix` (spknet/data/mixing.py). Without a preset an utterance gets, with
`augment.probability`, one of what the given shards offer (Snyder et al. 2018, "X-vectors", section 3.3):

    noise   one recording, 0 to 15 dB        speech  3 to 7 recordings summed ("babble"), 13 to 20 dB
    music   one recording, 5 to 15 dB        rir     convolution with one impulse response, level kept

Speed: the crop is read longer and resampled (kaldi's speed perturbation); the label stays, or each speed is a speaker of
its own (`augment.speed_labels`). SpecAugment (Park et al. 2019): by default two bands of at most 1/5 of the mel axis and
two spans of at most 1/10 of the time axis, each utterance its own.

    drawn = Augmenter(config.augment, seed=0, samples=32000, sample_rate=16000).read(epoch, slots)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from shards.reader import Utterances, open_shards
from spknet import rng
from spknet.config import AugmentConfig, ConfigError
from spknet.data import dither
from spknet.data.mixing import Mixing, mix
from spknet.data.presets import CATEGORY, Composition, composition, kinds

__all__ = ["SNR_DB", "Augmenter", "classes_per_speaker", "mix", "noise_fingerprint"]

CATEGORIES = {"noise", "music", "speech"}
SNR_DB = {"noise": (0.0, 15.0), "music": (5.0, 15.0), "speech": (13.0, 20.0)}  # without a preset


@dataclass
class Draws:
    """What was decided for a set of slots; n slots, places are positions among them."""

    kind: np.ndarray  # (n,) index of Augmenter.kinds, -1 for none
    noise_of: list[np.ndarray] = field(default_factory=list)  # a layer each: places,
    noise_rows: list[np.ndarray] = field(default_factory=list)  # rows of the noise shards,
    noise_starts: list[np.ndarray] = field(default_factory=list)  # first samples,
    noise_snr: list[np.ndarray] = field(default_factory=list)  # and dB
    rir_of: np.ndarray | None = None  # places
    rir_rows: np.ndarray | None = None
    tensors: dict[str, np.ndarray] = field(default_factory=dict)  # what goes to the device as it is


class Augmenter:
    """Reads what augmentation needs for a set of slots.

    samples: length of a training crop; read_samples: what to read so that the fastest speed still fills it.
    Raises ConfigError for categories, speeds or other options that cannot be used.
    """

    def __init__(self, config: AugmentConfig, seed: int, samples: int, sample_rate: int):
        self.config, self.seed, self.samples, self.rate = config, seed, samples, sample_rate
        self.composition = composition(config)
        self.read_samples = int(np.ceil(samples * max([1.0, *config.speed])))
        self.noise = _open(config.noise_shards, sample_rate, CATEGORIES, "augment.noise_shards")
        self.rir = _open(config.rir_shards, sample_rate, {"rir"}, "augment.rir_shards")
        self.rir_samples = int(config.rir_seconds * sample_rate)
        self.kinds: list[tuple[str | None, bool]] = []  # (source, reverberated)
        if config.preset != "none" or self.noise is not None or self.rir is not None:
            recordings = None
            if self.noise is not None:
                recordings = dict(zip(self.noise.speakers, np.diff(self.noise.speaker_rows.astype(np.int64)).tolist()))
            self.kinds, chances = kinds(self.composition, config.preset, recordings, self.rir is not None)
            self.thresholds = np.cumsum(chances)[:-1]

    def read(self, epoch: int, slots: np.ndarray, speed_slots: np.ndarray | None = None) -> dict:
        """Everything `mix` and the network need; empty without augmentation.

        speed_slots: (n,), what the speed is drawn by (the slots): equal ones get the same speed. Returns speed (n,) percent
        and speed_of_P (places at P percent); masks (n, 2 K, 2); noise (k, samples) int16 with noise_of (k,) places in the
        batch and noise_snr (k,) dB; rir (j, rir_samples) int16 with rir_of (j,); augmented: places; gain_db (n,);
        lowpass_of, lowpass_hz; telephone_of, telephone_law; dither (n,), keys; mixing.
        """
        drawn = self.draw(epoch, slots, speed_slots)
        out: dict = dict(drawn.tensors)
        c, layers = self.composition, ()
        if drawn.noise_of:
            noise = self._noise(drawn)
            out |= {"noise": torch.from_numpy(noise), "noise_of": np.concatenate(drawn.noise_of[: self.n_layers])}
            out["noise_snr"] = np.concatenate(drawn.noise_snr[: self.n_layers])
            layers = tuple(len(places) for places in drawn.noise_of) if c.talkers_apart else ()
        if drawn.rir_of is not None:
            # What is large travels as a tensor (see spknet.data.batches.Batch).
            out |= {"rir": torch.from_numpy(self._responses(drawn.rir_rows)), "rir_of": drawn.rir_of}
        mixing = Mixing(self.rate, layers, c.rir, c.level, c.power_floor, self.config.dither)
        if mixing != Mixing() and out:
            out["mixing"] = mixing
        return out

    @property
    def n_layers(self) -> int | None:
        """Layers of noise that the device adds; those of a babble are otherwise summed here, as one recording."""
        return None if self.composition.talkers_apart else 1

    def draw(self, epoch: int, slots: np.ndarray, speed_slots: np.ndarray | None = None) -> Draws:
        """Every decision for these slots, nothing read yet."""
        c, drawn = self.config, Draws(np.full(len(slots), -1))

        def uniform(tag: str, items: np.ndarray = slots) -> np.ndarray:
            return rng.uniform(self.seed, epoch, tag, items)

        if c.speed:
            drawn.tensors |= self._speeds(uniform("speed", slots if speed_slots is None else speed_slots))
        if c.spec_augment:
            drawn.tensors["masks"] = self._masks(uniform)
        if self.kinds:
            does = uniform("augment") < self.composition.probability
            drawn.kind = np.where(does, np.searchsorted(self.thresholds, uniform("kind"), side="right"), -1)
            if self.noise is not None:
                self._draw_noise(drawn, uniform, slots)
            if self.rir is not None:
                wet = np.array([wet for _, wet in self.kinds] + [False])  # the last: kind -1
                drawn.rir_of = np.flatnonzero(wet[drawn.kind])
                drawn.rir_rows, _ = self._rows(self.rir, uniform, "rir", slots[drawn.rir_of], 0)
            if self.composition.level != "kept":
                drawn.tensors["augmented"] = np.flatnonzero(drawn.kind >= 0)
        self._draw_channel(drawn.tensors, uniform)
        if c.dither:
            drawn.tensors["dither"] = dither.keys(self.seed, epoch, slots)
        return drawn

    def _speeds(self, draws: np.ndarray) -> dict[str, np.ndarray]:
        percent = np.round(np.array(self.config.speed) * 100).astype(np.int64)
        chosen = percent[(draws * len(percent)).astype(int)]
        groups = {f"speed_of_{p}": np.flatnonzero(chosen == p) for p in dict.fromkeys(percent.tolist()) if p != 100}
        return {"speed": chosen} | groups

    def speed_index(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        """(n,) which of augment.speed each slot gets, when speeds are drawn by these slots; zeros without speeds."""
        draws = rng.uniform(self.seed, epoch, "speed", slots)
        return (draws * max(1, len(self.config.speed))).astype(np.int64)

    def _masks(self, uniform) -> np.ndarray:
        """(n, 2 K, 2): K bands, then K spans, as fractions [start, end); where one axis has fewer, empty ones fill up."""
        c, spans = self.config, []
        most = max(c.frequency_masks, c.time_masks)
        masked = uniform("masked") < c.spec_probability
        axes = ((c.frequency_masks, c.frequency_width), (c.time_masks, c.time_width))
        for axis, (number, largest) in enumerate(axes):
            for i in range(most):
                width = np.where(masked, largest, 0) * uniform(f"mask {axis} {i} width") * (i < number)
                start = (1 - width) * uniform(f"mask {axis} {i} start")
                spans.append(np.stack([start, start + width], axis=-1))
        return np.stack(spans, axis=1) if spans else np.zeros((len(masked), 0, 2))

    def _draw_noise(self, drawn: Draws, uniform, slots: np.ndarray) -> None:
        c, categories = self.composition, list(self.noise.speakers)
        names = np.array([source or "" for source, _ in self.kinds] + [""])[drawn.kind]
        places = np.flatnonzero(names != "")
        names = names[places]
        category = np.array([categories.index(CATEGORY[name]) for name in names], dtype=int)
        count = c.talkers[0] + uniform("babble", slots[places]) * (c.talkers[1] - c.talkers[0] + 1)
        count = np.where(names == "babble", count.astype(int), 1)
        for layer in range(max(1, int(count.max(initial=0)))):
            these = np.flatnonzero(count > layer)
            rows, starts = self._rows(self.noise, uniform, f"noise {layer}", slots[places[these]], category[these])
            draws = uniform("snr" if layer == 0 else f"snr {layer}", slots[places[these]])
            drawn.noise_of.append(places[these])
            drawn.noise_rows.append(rows)
            drawn.noise_starts.append(starts)
            drawn.noise_snr.append(_snr(c, names[these], draws))

    def _draw_channel(self, tensors: dict[str, np.ndarray], uniform) -> None:
        c, gain = self.config, self.composition.gain_db
        if gain:
            tensors["gain_db"] = gain[0] + (gain[1] - gain[0]) * uniform("gain")
        if c.lowpass:
            these = np.flatnonzero(uniform("lowpass") < c.lowpass)
            low, high = c.lowpass_hz
            tensors["lowpass_of"] = these
            tensors["lowpass_hz"] = np.minimum(low + (high - low) * uniform("lowpass hz")[these], self.rate / 2)
        if c.telephone:
            these = np.flatnonzero(uniform("telephone") < c.telephone)
            either = (uniform("telephone law")[these] * 2).astype(np.int64)
            tensors["telephone_of"] = these
            tensors["telephone_law"] = {"mu": 0 * either, "a": 0 * either + 1, "both": either}[c.telephone_law]

    def _rows(
        self, source: Utterances, uniform, tag: str, slots: np.ndarray, category
    ) -> tuple[np.ndarray, np.ndarray]:
        """A recording of its category and a first sample for each slot."""
        first = source.speaker_rows[category].astype(np.int64)
        count = source.speaker_rows[np.add(category, 1)].astype(np.int64) - first
        rows = first + (uniform(tag + " row", slots) * count).astype(np.int64)
        length = source.samples[rows].astype(np.int64)
        starts = (uniform(tag + " start", slots) * np.maximum(length - self.samples + 1, 1)).astype(np.int64)
        return rows, starts

    def _noise(self, drawn: Draws) -> np.ndarray:
        crops = [_read(self.noise, *at, self.samples) for at in zip(drawn.noise_rows, drawn.noise_starts)]
        if self.n_layers is None:
            return np.concatenate(crops)
        total = crops[0].astype(np.int32)
        for places, crop in zip(drawn.noise_of[1:], crops[1:]):
            total[np.searchsorted(drawn.noise_of[0], places)] += crop
        # Only the ratio to the speech matters: halve until it fits 16 bits.
        excess = np.abs(total).max(axis=1, initial=0) // 32768
        total >>= np.ceil(np.log2(excess + 1)).astype(np.int32)[:, None]
        return total.astype(np.int16)

    def _responses(self, rows: np.ndarray) -> np.ndarray:
        crops = _read(self.rir, rows, np.zeros_like(rows), self.rir_samples)
        # An impulse response is not repeated: silence after its end.
        crops[np.arange(self.rir_samples) >= self.rir.samples[rows].astype(np.int64)[:, None]] = 0
        return crops

    def describe(self, epoch: int, slots: np.ndarray, speed_slots: np.ndarray | None = None) -> list[str]:
        """What was drawn for each slot, in words: `reverberation rir/room1; music/a at 7.3 dB; gain -4.0 dB`."""
        drawn = self.draw(epoch, slots, speed_slots)
        said: list[list[str]] = [[] for _ in slots]
        t = drawn.tensors
        for place, percent in enumerate(t.get("speed", [])):
            said[place].append(f"speed {percent / 100:g}")
        for place, row in zip(*([] if drawn.rir_of is None else [drawn.rir_of, drawn.rir_rows]), strict=True):
            said[place].append(f"reverberation {self.rir.key(row)}")
        for layer, (places, rows, snr) in enumerate(zip(drawn.noise_of, drawn.noise_rows, drawn.noise_snr)):
            for place, row, decibel in zip(places, rows, snr):
                at = f" at {decibel:.1f} dB" if layer == 0 or self.n_layers is None else " with it"
                said[place].append(self.noise.key(row) + at)
        for place, value in enumerate(t.get("gain_db", [])):
            said[place].append(f"gain {value:.1f} dB")
        for place, value in zip(t.get("lowpass_of", []), t.get("lowpass_hz", [])):
            said[place].append(f"low-pass {value:.0f} Hz")
        for place, value in zip(t.get("telephone_of", []), t.get("telephone_law", [])):
            said[place].append(f"telephone, {('mu', 'A')[value]}-law")
        for place, spans in enumerate(t.get("masks", [])):
            said[place].append(f"{int((spans[:, 1] > spans[:, 0]).sum())} masks")
        return ["; ".join(words) or "as it is" for words in said]


def _snr(c: Composition, names: np.ndarray, draws: np.ndarray) -> np.ndarray:
    out = np.empty(len(names))
    for name in np.unique(names):
        values, these = np.array(getattr(c, f"{name}_snr")), names == name
        if len(values) == 2:
            out[these] = values[0] + (values[1] - values[0]) * draws[these]
        else:
            out[these] = values[(draws[these] * len(values)).astype(int)]
    return out


def _read(source: Utterances, rows: np.ndarray, starts: np.ndarray, samples: int) -> np.ndarray:
    crops = np.empty((len(rows), samples), dtype=np.int16)
    source.read_batch(rows, starts, crops)
    return crops


def _open(path: str | None, sample_rate: int, categories: set[str], option: str):
    if path is None:
        return None
    source = open_shards(path)
    unknown = set(source.speakers) - categories
    if unknown:
        raise ConfigError(
            f"{option}: {path} holds {sorted(unknown)}; categories are {sorted(categories)} (as the speaker)"
        )
    if source.sample_rate != sample_rate:
        raise ConfigError(
            f"{option}: {path} has {source.sample_rate} Hz, the training data {sample_rate} Hz; pack it again"
        )
    return source


def classes_per_speaker(config: AugmentConfig) -> int:
    """How many classes of a classification head each speaker has: one for each speed with `speed_labels`.

    Raises ConfigError where augment.speed_classes has no room for the speeds.
    """
    drawn = len(config.speed) if config.speed_labels and config.speed else 1
    classes = drawn if config.speed_classes is None else config.speed_classes
    if classes < drawn:
        raise ConfigError(f"augment.speed_classes={classes}: augment.speed has {drawn} speeds; give at least {drawn}")
    return classes


def noise_fingerprint(config: AugmentConfig) -> str:
    """Digest of the noise and the impulse responses, whatever folder they lie in; empty without them."""
    paths = [path for path in (config.noise_shards, config.rir_shards) if path is not None]
    return ".".join(open_shards(path).fingerprint for path in paths)
