"""The training data of a run: its utterances, the speakers kept out of it, the sampler, and the class of each speaker.

corpus = Corpus.open(config.data, config.train.seed, config.augment)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.lists import read_lines
from shards.reader import Utterances, open_files, open_shards
from spknet import rng
from spknet.config import AugmentConfig, ConfigError, DataConfig
from spknet.data.augment import classes_per_speaker, noise_fingerprint
from spknet.data.sampler import Sampler

SAMPLE_RATE = 16000  # Hz, of loose files where data.sample_rate is not given


def dev_speakers(speakers: list[str], wanted: int | str) -> np.ndarray:
    """(S,) bool: the speakers kept out of training.

    wanted: how many (those whose names hash lowest, so that adding speakers hardly changes the choice), or a file with
    one name a line. Raises ConfigError for a name that the data lack, or where none would be left.
    """
    kept_out = np.zeros(len(speakers), dtype=bool)
    if isinstance(wanted, int):
        if not 0 <= wanted < len(speakers):
            raise ConfigError(f"data.dev_speakers={wanted}, but the data have {len(speakers)} speakers; keep out fewer")
        kept_out[np.argsort(rng.bits_of_names(0, 0, "dev ", speakers))[:wanted]] = True
        return kept_out
    place = {name: i for i, name in enumerate(speakers)}
    for number, line in read_lines(wanted):
        name = line.strip()
        if name not in place:
            raise ConfigError(f"{wanted}, line {number}: speaker {name!r} is not in the training data")
        kept_out[place[name]] = True
    return kept_out


@dataclass
class Corpus:
    """The training data of a run: utterances, the sampler over them, the class of each speaker."""

    utterances: Utterances
    sampler: Sampler
    kept_out: np.ndarray  # (S,) bool, development speakers
    cap: int
    noise: str = ""  # fingerprint of the noise and the impulse responses
    classes_per_speaker: int = 1  # one for each speed with augment.speed_labels

    @classmethod
    def open(cls, data: DataConfig, seed: int, augment: AugmentConfig | None = None) -> Corpus:
        """Opens packed data sets, or loose files. Raises ConfigError, ShardError or SamplerError.

        augment: gives the fingerprint of the noise data and the classes of speeds.
        """
        if bool(data.train_shards) == bool(data.train_list):
            raise ConfigError(
                "give the training data as --data.train_shards FOLDER (packed by spknet pack), or as --data.train_list FILE"
                " --data.train_root FOLDER; one of the two"
            )
        if data.train_shards:
            utterances = open_shards(
                data.train_shards,
                cache_dir=data.cache_dir,
                cache_gib=data.cache_gib,
                unite_speakers=data.unite_speakers,
            )
        else:
            if not data.train_root:
                raise ConfigError("--data.train_list wants --data.train_root, the folder its paths start from")
            utterances = open_files(data.train_list, data.train_root, data.sample_rate or SAMPLE_RATE)
        if data.sample_rate not in (None, utterances.sample_rate):
            raise ConfigError(
                f"data.sample_rate={data.sample_rate}, but {data.train_shards} has {utterances.sample_rate} Hz; leave the"
                " option out, or pack the audio at that rate"
            )
        kept_out = dev_speakers(list(utterances.speakers), data.dev_speakers)
        sampler = Sampler(
            utterances.speaker_rows,
            speakers_per_batch=data.speakers_per_batch,
            utterances_per_speaker=data.utterances_per_speaker,
            cap=data.max_utterances_per_speaker,
            seed=seed,
            balanced=data.epoch == "balanced",
            excluded=kept_out,
            plan=data.plan,
        )
        augment = augment or AugmentConfig()
        noise, classes = noise_fingerprint(augment), classes_per_speaker(augment)
        return cls(utterances, sampler, kept_out, data.max_utterances_per_speaker, noise, classes)

    @property
    def n_labels(self) -> int:
        """Labels of speakers are append-only, so one more than the largest."""
        return int(self.utterances.labels.max()) + 1

    @property
    def n_classes(self) -> int:
        """Classes of a classification head: speaker label + n_labels * speed index."""
        return self.n_labels * self.classes_per_speaker

    def fingerprint(self) -> str:
        """Digest of the audio's index, of the sampler's settings and of the noise data, whatever folder they lie in."""
        parts = [self.utterances.fingerprint, self.sampler.fingerprint(), self.noise]
        return "-".join(part for part in parts if part)

    def warnings(self) -> list[str]:
        """What a user should know about how the data fit the batches."""
        said = list(self.utterances.remarks)
        s = self.sampler
        if s.too_short:
            said.append(f"{s.too_short} speakers have fewer than {s.n_utterances} utterances and are left out")
        if s.lost_fraction > 0.05:
            said.append(
                f"{100 * s.lost_fraction:.0f} % of the utterances are not used in an epoch, because a speaker can stand only"
                f" once in each of its {s.steps} batches; a smaller data.speakers_per_batch or data.epoch=balanced uses more"
            )
        return said
