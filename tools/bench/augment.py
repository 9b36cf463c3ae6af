"""Augmented training crops with features, a second and core, beside voxceleb_trainer's way, in one run; its share of a step.

    ours     rows of shards -> crops, noise, impulse responses (Steps), mixed by the batch (mix) -> 80 log-mel bands
    theirs   utterance by utterance: the whole file with soundfile (float64), a crop, noise files of 5 s read whole, numpy;
             scipy.signal.convolve with an impulse response; then the features by the batch: torchaudio's MelSpectrogram and
             InstanceNorm1d, as its networks have it (the same numbers as ours), or ours

Theirs is written anew after DatasetLoader.py of clovaai/voxceleb_trainer: one of five, as it is, reverberation, music, 3 to 7
talkers, noise. A further row draws as WeSpeaker does (0.6; half reverberation, half one noise), which is less work. Made-up
audio (utterances of 4 to 12 s, as VoxCeleb's; noise of 5 s pieces, as it cuts MUSAN; rooms of 1 s). Times are those of the
process, one thread, ways in turn on other batches each time, so that a busy neighbour slows all.

    spknet bench augment [--preset wespeaker] [--seconds 30]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.signal
import soundfile
import torch
import torchaudio

from shards.pack import pack
from spknet.config import Config
from spknet.data.batches import Steps
from spknet.data.corpus import Corpus
from spknet.data.mixing import mix
from spknet.models import build_model
from spknet.models.features import Spectrum
from spknet.options import parse
from spknet.parallel.ranks import Ranks
from tools.bench.loader import RATE, make_wavs, write_wav
from tools.bench.table import Row, beside, in_turn

BATCH = 64  # utterances
BANDS = 80
SNR = {"noise": (0, 15), "speech": (13, 20), "music": (5, 15)}
TALKERS = (3, 7)


def make_noise(folder: Path, pieces: int) -> dict[str, list[tuple[str, str, str]]]:
    """Noise of 5 s in three categories and 1 s impulse responses: (category, key, path)."""
    rng = np.random.default_rng(1)
    entries: dict[str, list] = {"noise": [], "rir": []}
    for category in ("music", "noise", "speech", "rir"):
        for i in range(pieces):
            key = f"{category}/{i:04d}"
            if category == "rir":
                x = rng.normal(0, 1, RATE) * np.exp(-np.arange(RATE) / 1500)
                x[rng.integers(20, 200)] = 8
            else:
                x = np.convolve(rng.normal(0, 1, 5 * RATE), np.ones(8), "same")
            write_wav(folder / f"{key}.wav", x / np.abs(x).max() * 20000)
            entries["rir" if category == "rir" else "noise"].append((category, key, str(folder / f"{key}.wav")))
    return entries


class TheirWay:
    """voxceleb_trainer's loading and augmentation of one utterance at a time."""

    def __init__(self, entries: dict, samples: int, like_wespeaker: bool):
        self.samples, self.like_wespeaker = samples, like_wespeaker
        self.files = {name: [p for c, _, p in entries["noise"] if c == name] for name in SNR}
        self.rooms = [path for _, _, path in entries["rir"]]
        self.rng = np.random.default_rng(2)

    def crop(self, path: str) -> np.ndarray:
        audio, _ = soundfile.read(path)
        if len(audio) <= self.samples:
            audio = np.pad(audio, (0, self.samples - len(audio) + 1), "wrap")
        start = int(self.rng.random() * (len(audio) - self.samples))
        return audio[start : start + self.samples]

    def reverberate(self, audio: np.ndarray) -> np.ndarray:
        room, _ = soundfile.read(self.rng.choice(self.rooms))
        return scipy.signal.convolve(audio, room / np.sqrt(np.sum(room**2)), mode="full")[: self.samples]

    def add(self, audio: np.ndarray, category: str, number: int) -> np.ndarray:
        clean_db, out = 10 * np.log10(np.mean(audio**2) + 1e-4), audio
        for path in self.rng.choice(self.files[category], number, replace=False):
            noise = self.crop(path)
            noise_db, snr = 10 * np.log10(np.mean(noise**2) + 1e-4), self.rng.uniform(*SNR[category])
            out = out + np.sqrt(10 ** ((clean_db - noise_db - snr) / 10)) * noise
        return out

    def utterance(self, path: str) -> np.ndarray:
        audio = self.crop(path)
        if self.like_wespeaker:
            draw = self.rng.random()
            if draw < 0.3:
                return self.reverberate(audio)
            return self.add(audio, self.rng.choice(list(SNR)), 1) if draw < 0.6 else audio
        kind = self.rng.integers(5)
        if kind == 1:
            return self.reverberate(audio)
        if kind == 2:
            return self.add(audio, "music", 1)
        if kind == 3:
            return self.add(audio, "speech", self.rng.integers(TALKERS[0], TALKERS[1] + 1))
        return self.add(audio, "noise", 1) if kind == 4 else audio

    def __call__(self, paths: list[str]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.utterance(path) for path in paths]).astype(np.float32))


def configured(folder: Path, chosen: argparse.Namespace) -> Config:
    words = {
        "data.train_shards": folder / "speech",
        "data.speakers_per_batch": BATCH,
        "data.utterances_per_speaker": 1,
        "data.crop_seconds": chosen.crop_seconds,
        "augment.preset": chosen.preset,
        "augment.noise_shards": folder / "noise_shards",
        "augment.rir_shards": folder / "rir_shards",
        "model.name": chosen.model,
    }
    if chosen.speed:
        words["augment.speed"] = "[1.0, 0.9, 1.1]"
    return parse([word for name, value in words.items() for word in (f"--{name}", str(value))])


def step_of(config: Config, samples: int):
    """Forward and backward of the network on a batch of waves."""
    model = build_model(config.model, RATE)
    waves = torch.randn(BATCH, samples) * 0.1

    def step(_i: int) -> None:
        model(waves, None).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def their_features() -> torch.nn.Module:
    """The front end of voxceleb_trainer's ResNetSE34L: (batch, samples) -> (batch, 80, frames)."""

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            options = {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": BANDS}
            self.torchfb = torchaudio.transforms.MelSpectrogram(RATE, window_fn=torch.hamming_window, **options)
            self.instancenorm = torch.nn.InstanceNorm1d(BANDS)

        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.instancenorm((self.torchfb(x) + 1e-6).log())

    return Features()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="wespeaker", help="of ours (wespeaker)")
    parser.add_argument("--speed", action="store_true", help="ours with speeds 1.0, 0.9, 1.1 as well")
    parser.add_argument("--crop_seconds", type=float, default=2.015, help="length of a crop (2.015)")
    parser.add_argument("--utterances", type=int, default=1000, help="made-up files (1000)")
    parser.add_argument("--noise", type=int, default=200, help="made-up noise files of each category (200)")
    parser.add_argument("--model", default="ResNetSE34L", help="network of the step (ResNetSE34L)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of measuring")


def rows(chosen: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entries = make_wavs(folder / "wav", chosen.utterances, speakers=2 * BATCH)
        noise = make_noise(folder / "noise", chosen.noise)
        for listed, out in ((entries, "speech"), (noise["noise"], "noise_shards"), (noise["rir"], "rir_shards")):
            pack(listed, folder / out, progress=False)
        yield from compare(folder, chosen, [path for _, _, path in entries], noise)


def compare(folder: Path, chosen: argparse.Namespace, paths: list[str], noise: dict) -> Iterator[Row]:
    config = configured(folder, chosen)
    steps = Steps(config, Corpus.open(config.data, 0, config.augment), Ranks())
    features, theirs, cpu = Spectrum(RATE, BANDS), their_features(), torch.device("cpu")
    batches = [[paths[(i * BATCH + j) * 7 % len(paths)] for j in range(BATCH)] for i in range(64)]
    own, like = TheirWay(noise, steps.samples, False), TheirWay(noise, steps.samples, True)

    def read(i: int):
        crops, augment, _, _ = steps[i].to(cpu)
        return mix(crops, augment, steps.samples, torch.float32)

    ours = f"ours, {chosen.preset}"
    ways = {
        f"{ours}, with features": lambda i: features(read(i)),
        "theirs, with their features": lambda i: theirs(own(batches[i % 64])),
        "theirs, with our features": lambda i: features(own(batches[i % 64])),
        "theirs, waves alone": lambda i: own(batches[i % 64]),
        "theirs as WeSpeaker draws, their features": lambda i: theirs(like(batches[i % 64])),
        f"{ours}, waves alone": read,
        "ours, the loader's half": lambda i: steps[i],
        f"a step of {chosen.model}": step_of(config, steps.samples),
    }
    seconds, _ = in_turn(ways, chosen.seconds)
    step, waves = seconds.pop(f"a step of {chosen.model}"), seconds[f"{ours}, waves alone"]
    speeds = {name: BATCH / value for name, value in seconds.items()}
    yield from beside(speeds, "crops/s/core")
    half, alone = speeds["ours, the loader's half"], speeds["theirs, waves alone"]
    yield Row("ours, the loader's half", half, "crops/s/core", half / alone, "theirs, waves alone")
    yield Row(f"a step of {chosen.model}", BATCH / step, "crops/s/core")
    yield Row("reading and mixing in a step with it", 100 * waves / (waves + step), "%")
