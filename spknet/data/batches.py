"""From the sampler's rows to a rank's batch of int16 crops, in loader processes.

An item of the loader is one step's share of this rank: one int16 array (n, samples), the labels, the slots, and the noise
and impulse-response crops that belong to them; there is nothing to collate. What is read is a function of the global step
alone, so that prefetching, workers and ranks change nothing and a run continues at any step without replaying data.

    corpus = Corpus.open(config.data, config.train.seed)
    for batch in loader(config, corpus, me, first_step=1200, last_step=5000): ...  # batch.crops: (n, samples) int16
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from shards.reader import Utterances, open_files, open_shards
from spknet import rng
from spknet.config import AugmentConfig, Config, ConfigError, DataConfig
from spknet.data import dither
from spknet.data.augment import Augmenter, classes_per_speaker, noise_fingerprint
from spknet.data.mixing import Mixing
from spknet.data.sampler import Sampler
from spknet.parallel.ranks import Ranks

SAMPLE_RATE = 16000  # Hz, where no data set says otherwise
PREFETCH = 4  # batches a worker is ahead


def dev_speakers(speakers: list[str], wanted: int | str) -> np.ndarray:
    """(S,) bool: the speakers kept out of training.

    wanted: how many (those whose names hash lowest, so that adding speakers hardly changes the choice), or a file with
    one name a line. Raises ConfigError for a name that the data lack, or where none would be left.
    """
    kept_out = np.zeros(len(speakers), dtype=bool)
    if isinstance(wanted, int):
        if not 0 <= wanted < len(speakers):
            raise ConfigError(f"data.dev_speakers={wanted}, but the data have {len(speakers)} speakers; keep out fewer")
        hashes = [int(rng.bits(0, 0, "dev " + name, np.zeros(1))[0]) for name in speakers]
        kept_out[np.argsort(hashes)[:wanted]] = True
        return kept_out
    place = {name: i for i, name in enumerate(speakers)}
    for number, line in enumerate(Path(wanted).read_text().splitlines(), 1):
        name = line.strip()
        if not name:
            continue
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
                "give the training data as --data.train_shards FOLDER (packed by shards.pack), or as --data.train_list FILE"
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
            utterances = open_files(data.train_list, data.train_root, SAMPLE_RATE)
        kept_out = dev_speakers(list(utterances.speakers), data.dev_speakers)
        sampler = Sampler(
            utterances.speaker_rows,
            speakers_per_batch=data.speakers_per_batch,
            utterances_per_speaker=data.utterances_per_speaker,
            cap=data.max_utterances_per_speaker,
            seed=seed,
            balanced=data.epoch == "balanced",
            excluded=kept_out,
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
        said = []
        s = self.sampler
        if s.too_short:
            said.append(f"{s.too_short} speakers have fewer than {s.n_utterances} utterances and are left out")
        if s.lost_fraction > 0.05:
            said.append(
                f"{100 * s.lost_fraction:.0f} % of the utterances are not used in an epoch, because a speaker can stand only"
                f" once in each of its {s.steps} batches; a smaller data.speakers_per_batch or data.epoch=balanced uses more"
            )
        return said


@dataclass
class Batch:
    """One step's share of a rank; n = speakers of the rank * M utterances, speaker by speaker.

    Only what is large is a tensor on its way from a worker: each costs a shared-memory file and a descriptor.
    """

    step: int  # global
    crops: torch.Tensor  # (n, samples) int16; longer than a training crop where the speed is changed
    labels: np.ndarray  # (n / M,) int64, classes
    rows: np.ndarray  # (n,) int64, rows of the data set
    slots: np.ndarray  # (n,) int64, positions in the epoch
    draws: np.ndarray  # (n / M, 2) float64 in [0, 1), the loss's randomness
    augment: dict[str, torch.Tensor | np.ndarray | Mixing]  # see spknet.data.augment

    def pin_memory(self) -> Batch:
        large = {name: v.pin_memory() for name, v in self.augment.items() if isinstance(v, torch.Tensor)}
        return replace(self, crops=self.crops.pin_memory(), augment=self.augment | large)

    def to(self, device: torch.device) -> tuple[torch.Tensor, dict, torch.Tensor, torch.Tensor]:
        """(crops, augment, labels, draws) on the device, copied without waiting where they are pinned."""

        def move(value):
            known = isinstance(value, (torch.Tensor, np.ndarray))
            return torch.as_tensor(value).to(device, non_blocking=True) if known else value

        return move(self.crops), {k: move(v) for k, v in self.augment.items()}, move(self.labels), move(self.draws)


class Steps(torch.utils.data.Dataset):
    """Step number (global) -> Batch of one rank."""

    def __init__(self, config: Config, corpus: Corpus, me: Ranks):
        self.corpus, self.seed, self.dither = corpus, config.train.seed, config.features.dither
        if not 0 <= self.dither < 1000:
            raise ConfigError(
                f"features.dither={self.dither}: expected 0 to 1000 steps of a 16-bit integer; usual is 1"
            )
        n, world = config.data.speakers_per_batch, me.world_size
        if n % world:
            raise ConfigError(
                f"data.speakers_per_batch={n} cannot be shared by {world} ranks; choose a multiple of {world}, or a number"
                f" of ranks that divides {n}"
            )
        self.columns = slice(me.rank * n // world, (me.rank + 1) * n // world)
        rate = corpus.utterances.sample_rate
        self.samples = round(config.data.crop_seconds * rate)
        self.augmenter = Augmenter(config.augment, config.train.seed, self.samples, rate)
        self.speed_labels = config.augment.speed_labels and bool(config.augment.speed)
        self.ring: list[torch.Tensor] = []  # a worker's own

    def __getitem__(self, step: int) -> Batch:
        sampler, utterances = self.corpus.sampler, self.corpus.utterances
        epoch, step_in_epoch = divmod(step, sampler.steps)
        rows = sampler.batch(epoch, step_in_epoch)[self.columns].astype(np.int64)  # (speakers, M)
        slots = sampler.slots(step_in_epoch)[self.columns]
        flat, length = rows.reshape(-1), self.augmenter.read_samples
        spare = np.maximum(utterances.samples[flat].astype(np.int64) - length, 0)
        starts = (rng.uniform(self.seed, epoch, "crop", slots.reshape(-1)) * (spare + 1)).astype(np.int64)
        crops = self._buffer(step, (len(flat), length))
        utterances.read_batch(flat, starts, crops.numpy())
        speakers = np.searchsorted(utterances.speaker_rows, rows[:, 0], side="right") - 1
        draws = np.stack([rng.uniform(self.seed, epoch, f"loss {i}", slots[:, 0]) for i in range(2)], axis=1)
        labels, speed_slots = utterances.labels[speakers].astype(np.int64), None
        if self.speed_labels:
            # All utterances of a speaker in a batch at one speed: they are one class.
            speed_slots = np.repeat(slots[:, :1], slots.shape[1], axis=1).reshape(-1)
            labels = labels + self.corpus.n_labels * self.augmenter.speed_index(epoch, slots[:, 0])
        augment = self.augmenter.read(epoch, slots.reshape(-1), speed_slots)
        if self.dither:
            augment["dither"] = dither.keys(self.seed, epoch, slots.reshape(-1))
        return Batch(
            step=step,
            crops=crops,
            labels=labels,
            rows=flat,
            slots=slots.reshape(-1),
            draws=draws,
            augment=augment,
        )

    def _buffer(self, step: int, shape: tuple[int, int]) -> torch.Tensor:
        """Where to read a step's crops to.

        A worker reads into a few shared arrays in turn: fresh shared memory costs three times the reading (page faults). A
        batch is overwritten once PREFETCH + 2 later ones of its worker have been asked for, and that is not before the
        consumer has taken the second batch after it.
        """
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return torch.empty(shape, dtype=torch.int16)
        if not self.ring:
            self.ring = [torch.zeros(shape, dtype=torch.int16).share_memory_() for _ in range(PREFETCH + 3)]
        return self.ring[step // worker.num_workers % len(self.ring)]


def _ignore_signals(_worker: int) -> None:
    # A preemption signal to the whole tree is the trainer's business; a loader that dies of it would end the run.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def loader(config: Config, corpus: Corpus, me: Ranks, first_step: int, last_step: int):
    """Batches of the global steps [first_step, last_step) in order, across epochs without a pause between them.

    With workers, a batch's crops are overwritten after the next two batches have been taken: use it, or copy it.
    """
    workers = config.data.workers
    return torch.utils.data.DataLoader(
        Steps(config, corpus, me),
        sampler=range(first_step, last_step),
        batch_size=None,
        num_workers=workers,
        pin_memory=me.device.type == "cuda",
        worker_init_fn=_ignore_signals,
        prefetch_factor=PREFETCH if workers else None,
        # Workers are forked before the process group has threads that matter; the reader reopens its files after a fork.
        multiprocessing_context="fork" if workers else None,
    )
