"""Noise, music, babble, reverberation, speed and SpecAugment, drawn by slot, mixed on the device.

The loader's half (`Augmenter.read`) decides by slot and reads int16 crops of noise and impulse responses; the device's half
(`mix`) scales, convolves by FFT and adds. Per utterance, with `augment.probability`, one of what the given shards offer
(categories of Snyder et al. 2018, "X-vectors", section 3.3):

    noise   one recording, 0 to 15 dB        speech  3 to 7 recordings summed ("babble"), 13 to 20 dB
    music   one recording, 5 to 15 dB        rir     convolution with one impulse response, level kept

Speed: the crop is read longer and resampled (kaldi's speed perturbation; the label stays). SpecAugment (Park et al. 2019):
two bands of at most 1/5 of the mel axis, two spans of at most 1/10 of the time axis.

    waves = mix(batch.crops, batch.augment, samples=32000, dtype=torch.float32)  # (n, samples) in [-1, 1]
"""

from __future__ import annotations

import numpy as np
import torch

from shards.reader import open_shards
from spknet import rng
from spknet.config import AugmentConfig, ConfigError

SNR_DB = {"noise": (0.0, 15.0), "music": (5.0, 15.0), "speech": (13.0, 20.0)}
BABBLE = (3, 7)  # recordings summed
RIR_SECONDS = 1.0  # of an impulse response used
MASKS = ((2, 0.2), (2, 0.1))  # (number, largest fraction) of frequency bands, of time spans


class Augmenter:
    """Reads what augmentation needs for a set of slots.

    samples: length of a training crop; read_samples: what to read so that the fastest speed still fills it.
    Raises ConfigError for categories or speeds that cannot be used.
    """

    def __init__(self, config: AugmentConfig, seed: int, samples: int, sample_rate: int):
        self.config, self.seed, self.samples = config, seed, samples
        if any(not 0.5 <= speed <= 2 or round(speed * 100, 6) % 1 for speed in config.speed):
            raise ConfigError(f"augment.speed={config.speed}: speeds lie between 0.5 and 2, in steps of 0.01")
        if not 0 <= config.probability <= 1:
            raise ConfigError(f"augment.probability={config.probability} must lie between 0 and 1")
        self.read_samples = int(np.ceil(samples * max([1.0, *config.speed])))
        self.noise = _open(config.noise_shards, sample_rate, set(SNR_DB), "augment.noise_shards")
        self.rir = _open(config.rir_shards, sample_rate, {"rir"}, "augment.rir_shards")
        self.rir_samples = int(RIR_SECONDS * sample_rate)
        kinds = list(self.noise.speakers) if self.noise is not None else []
        self.kinds = kinds + (["rir"] if self.rir is not None else [])

    def read(self, epoch: int, slots: np.ndarray) -> dict[str, torch.Tensor | np.ndarray]:
        """Everything `mix` and the network need; empty without augmentation.

        speed (n,) percent; masks (n, 4, 2); noise (k, samples) int16 with noise_of (k,) places in the batch and
        noise_snr (k,) dB; rir (j, rir_samples) int16 with rir_of (j,).
        """
        out: dict[str, np.ndarray] = {}
        if self.config.speed:
            choice = rng.uniform(self.seed, epoch, "speed", slots) * len(self.config.speed)
            out["speed"] = np.round(np.array(self.config.speed) * 100)[choice.astype(int)].astype(np.int64)
        if self.config.spec_augment:
            out["masks"] = self._masks(epoch, slots)
        if self.kinds:
            does = rng.uniform(self.seed, epoch, "augment", slots) < self.config.probability
            kind = (rng.uniform(self.seed, epoch, "kind", slots) * len(self.kinds)).astype(int)
            kind = np.where(does, kind, -1)
            if self.noise is not None:
                out |= self._noise(epoch, slots, kind)
            if self.rir is not None:
                out |= self._rir(epoch, slots, kind == len(self.kinds) - 1)
        # What is large travels as a tensor (see spknet.data.batches.Batch).
        return out | {name: torch.from_numpy(out[name]) for name in ("noise", "rir") if name in out}

    def _masks(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        spans = []
        for axis, (number, largest) in enumerate(MASKS):
            for i in range(number):
                width = largest * rng.uniform(self.seed, epoch, f"mask {axis} {i} width", slots)
                start = (1 - width) * rng.uniform(self.seed, epoch, f"mask {axis} {i} start", slots)
                spans.append(np.stack([start, start + width], axis=-1))
        return np.stack(spans, axis=1)

    def _noise(self, epoch: int, slots: np.ndarray, kind: np.ndarray) -> dict[str, np.ndarray]:
        places = np.flatnonzero((kind >= 0) & (kind < len(self.noise.speakers)))
        names = np.array(list(self.noise.speakers))[kind[places]]
        low, high = np.array([SNR_DB[name] for name in names]).reshape(-1, 2).T
        snr = low + (high - low) * rng.uniform(self.seed, epoch, "snr", slots[places])
        layers = BABBLE[0] + rng.uniform(self.seed, epoch, "babble", slots[places]) * (BABBLE[1] - BABBLE[0] + 1)
        layers = np.where(names == "speech", layers.astype(int), 1)
        total = np.zeros((len(places), self.samples), dtype=np.int32)
        for layer in range(int(layers.max(initial=0))):
            these = np.flatnonzero(layers > layer)
            total[these] += self._crops(
                self.noise, epoch, f"noise {layer}", slots[places[these]], kind[places[these]], self.samples
            )
        # Only the ratio to the speech matters: halve until it fits 16 bits.
        excess = np.abs(total).max(axis=1, initial=0) // 32768
        total >>= np.ceil(np.log2(excess + 1)).astype(np.int32)[:, None]
        return {"noise": total.astype(np.int16), "noise_of": places, "noise_snr": snr}

    def _rir(self, epoch: int, slots: np.ndarray, chosen: np.ndarray) -> dict[str, np.ndarray]:
        places = np.flatnonzero(chosen)
        category = np.zeros(len(places), dtype=int)
        crops = self._crops(self.rir, epoch, "rir", slots[places], category, self.rir_samples, whole=True)
        return {"rir": crops, "rir_of": places}

    def _crops(self, source, epoch, tag, slots, category, samples, whole=False) -> np.ndarray:
        first = source.speaker_rows[category].astype(np.int64)
        count = source.speaker_rows[category + 1].astype(np.int64) - first
        rows = first + (rng.uniform(self.seed, epoch, tag + " row", slots) * count).astype(np.int64)
        length = source.samples[rows].astype(np.int64)
        starts = (rng.uniform(self.seed, epoch, tag + " start", slots) * np.maximum(length - samples + 1, 1)).astype(
            np.int64
        )
        starts = np.zeros_like(starts) if whole else starts
        crops = np.empty((len(rows), samples), dtype=np.int16)
        source.read_batch(rows, starts, crops)
        if whole:  # an impulse response is not repeated: silence after its end
            crops[np.arange(samples) >= length[:, None]] = 0
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


def mix(crops: torch.Tensor, augment: dict[str, torch.Tensor], samples: int, dtype: torch.dtype) -> torch.Tensor:
    """Augmented waves in [-1, 1], (n, samples), of int16 crops (n, >= samples) and the tensors of `Augmenter.read`."""
    waves = crops.to(dtype) / 32768
    if "speed" in augment:
        waves = _change_speed(waves, augment["speed"], samples)
    waves = waves[:, :samples]
    if "rir" in augment and len(augment["rir"]):
        waves = waves.index_copy(0, augment["rir_of"], _reverberate(waves[augment["rir_of"]], augment["rir"].to(dtype)))
    if "noise" in augment and len(augment["noise"]):
        speech, noise = waves[augment["noise_of"]], augment["noise"].to(dtype) / 32768
        ratio = _power(speech) / _power(noise).clamp_min(1e-10) / 10 ** (augment["noise_snr"].to(dtype)[:, None] / 10)
        waves = waves.index_copy(0, augment["noise_of"], speech + noise * ratio.sqrt())
    return waves


def _power(waves: torch.Tensor) -> torch.Tensor:
    return waves.square().mean(dim=1, keepdim=True)


def _reverberate(waves: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    # The direct sound (the largest value) stays where the speech was, and the level is kept.
    n = waves.shape[1] + responses.shape[1]
    direct = responses.abs().argmax(dim=1)
    wet = torch.fft.irfft(torch.fft.rfft(waves, n) * torch.fft.rfft(responses, n), n)
    places = direct[:, None] + torch.arange(waves.shape[1], device=waves.device)
    wet = wet.gather(1, places)
    return wet * (_power(waves) / _power(wet).clamp_min(1e-10)).sqrt()


def _change_speed(waves: torch.Tensor, percent: torch.Tensor, samples: int) -> torch.Tensor:
    import torchaudio

    out = waves[:, :samples].clone()
    for speed in percent.unique().tolist():
        if speed != 100:
            these = (percent == speed).nonzero().squeeze(1)
            out[these] = torchaudio.functional.resample(waves[these], speed, 100)[:, :samples]
    return out
