"""Trial lists in noise: a copy of every utterance of the lists with noise, rooms or a channel on it.

    python -m tools.noisy --trials test.txt --root S --out noisy --augment.noise_shards NOISE_TEST \
      --augment.noise_snr 5 5 --augment.probability 1
    spknet evaluate --checkpoint RUN --trials test.txt --root noisy --out RUN/noisy

Takes the augmentation's options as training does (without speeds and masks). What an utterance gets is drawn by --train.seed and its
place among the lists' names in alphabetical order: the same for every system. Take noise and rooms that no training has
heard (`spknet musan --test-share`). Copies are 16-bit FLAC under the lists' names; where the sum would exceed full scale
the whole copy is softer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from shards.audio import encode_flac
from shards.commands import Parser
from shards.format import write_file
from spknet.config import AugmentConfig, ConfigError
from spknet.data.augment import Augmenter
from spknet.data.mixing import mix
from spknet.errors import UserError, run
from spknet.evaluate.trials import read_trials
from spknet.evaluate.utterances import Sources, stem
from spknet.options import parse


def noisy(audio: np.ndarray, config: AugmentConfig, seed: int, place: int, rate: int) -> np.ndarray:
    """(samples,) int16 -> the same with what is drawn for this place."""
    drawn = Augmenter(config, seed, len(audio), rate).read(0, np.array([place]))
    drawn = {key: torch.as_tensor(value) if isinstance(value, np.ndarray) else value for key, value in drawn.items()}
    wave = mix(torch.tensor(audio)[None], drawn, len(audio), torch.float64)[0].numpy() * 32768
    return (wave / max(1.0, np.abs(wave).max() / 32767)).round().astype(np.int16)


def write(path: Path, audio: np.ndarray, rate: int) -> None:
    """16-bit FLAC, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, encode_flac(audio.astype("<i2").tobytes(), rate))


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m tools.noisy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", nargs="+", required=True, help="lists `label path path`")
    parser.add_argument("--root", nargs="+", required=True, help="folders that the paths start from")
    parser.add_argument("--out", type=Path, required=True, help="folder for the copies, the root of the noisy lists")
    chosen, words = parser.parse_known_args(argv)
    config = parse(words)
    if config.augment.speed or config.augment.spec_augment:
        raise ConfigError("augment.speed and augment.spec_augment are for training; leave them out")
    names = {name for path in chosen.trials for name in read_trials(path).utterances()}
    sources = Sources(roots=chosen.root)
    places = sources.locate(sorted(names))
    if places.missing():
        name = places.missing()[0]
        raise UserError(f"{name}: found nowhere in {sources.describe(name)}; give --root FOLDER")
    places = sources.measure(places)
    for i, name in enumerate(places.names):
        audio = noisy(sources.read(places, i), config.augment, config.train.seed, i, sources.sample_rate)
        write(chosen.out / (stem(name) + ".flac"), audio, sources.sample_rate)
    print(f"{len(places.names)} utterances written to {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
