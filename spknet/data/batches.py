"""From the sampler's rows to a rank's batch of int16 crops, in loader processes.

An item of the loader is one step's share of this rank: one int16 array (n, samples), the labels, the slots, and the noise
and impulse-response crops that belong to them; there is nothing to collate. What is read is a function of the global step
alone, so that prefetching, workers and ranks change nothing and a run continues at any step without replaying data.

    with Batches(config, corpus, me, first_step=1200, last_step=5000) as batches:
        for batch in batches: ...  # batch.crops: (n, samples) int16
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from spknet import rng
from spknet.config import Config, ConfigError
from spknet.data.augment import Augmenter
from spknet.data.corpus import Corpus
from spknet.data.mixing import Mixing
from spknet.errors import UserError
from spknet.parallel.ranks import Ranks

PREFETCH = 4  # batches a worker is ahead
PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when its parent ends


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
        """What goes to the device in memory that it can read by itself."""
        pinned = {name: torch.as_tensor(getattr(self, name)).pin_memory() for name in ("crops", "labels", "draws")}
        augment = {k: torch.as_tensor(v).pin_memory() if _is_array(v) else v for k, v in self.augment.items()}
        return replace(self, augment=augment, **pinned)

    def to(self, device: torch.device) -> tuple[torch.Tensor, dict, torch.Tensor, torch.Tensor]:
        """(crops, augment, labels, draws) on the device. To a GPU they are copied on a stream of their own, while it
        computes what it was told before; nothing waits but what uses them."""
        arrived = []

        def move(value):
            if not _is_array(value):
                return value
            arrived.append(torch.as_tensor(value).to(device, non_blocking=True))
            return arrived[-1]

        with _beside_the_work(device, arrived):
            return move(self.crops), {k: move(v) for k, v in self.augment.items()}, move(self.labels), move(self.draws)


def _is_array(value) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


@lru_cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _beside_the_work(device: torch.device, arrived: list[torch.Tensor]) -> Iterator[None]:
    """Copies in here run beside what the device computes; what comes after the block waits for them."""
    if device.type != "cuda":
        yield
        return
    work = torch.cuda.current_stream(device)
    with torch.cuda.stream(_copies(device)):
        yield
    work.wait_stream(_copies(device))
    for tensor in arrived:
        tensor.record_stream(work)  # its memory is free again when the work is done, not when it is forgotten


class Steps(torch.utils.data.Dataset):
    """Step number (global) -> Batch of one rank."""

    def __init__(self, config: Config, corpus: Corpus, me: Ranks):
        self.corpus, self.seed = corpus, config.train.seed
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
        self.workers = config.data.workers
        self.ring: list[torch.Tensor] = []  # a worker's own

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self._batch(step)
        except UserError as error:
            return error  # as a value: raised in a worker, its words would come wrapped in torch's own

    def _batch(self, step: int) -> Batch:
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


class LoaderLost(RuntimeError):
    """A loader process was killed from outside (out of memory, an administrator): nothing is wrong with the run."""


class Batches:
    """Batches of the global steps [first_step, last_step) in order, across epochs without a pause between them.

    With workers, a batch's crops are overwritten after the next two batches have been taken: use it, or copy it. Leaving the
    `with` block ends the workers, whatever happened: they ignore gentle signals, and torch would wait for them.

        with Batches(config, corpus, me, 0, 100) as batches: batch = next(batches)
    """

    def __init__(self, config: Config, corpus: Corpus, me: Ranks, first_step: int, last_step: int):
        self.workers = config.data.workers
        steps = Steps(config, corpus, me)
        if self.workers:
            check_shared_memory(steps, self.workers * me.local_size, config.data.utterances_per_speaker)
        self.loader = torch.utils.data.DataLoader(
            steps,
            sampler=range(first_step, last_step),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=me.device.type == "cuda",
            worker_init_fn=_prepare_worker,
            prefetch_factor=PREFETCH if self.workers else None,
            # A fork lacks the process group's threads, which a worker never needs; the reader reopens its files there.
            multiprocessing_context="fork" if self.workers else None,
        )

    def __enter__(self) -> Batches:
        before = multiprocessing.active_children()
        self.iterator = iter(self.loader)
        self.processes = [child for child in multiprocessing.active_children() if child not in before]
        return self

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        batch = next(self.iterator)
        if isinstance(batch, UserError):
            raise batch
        return batch

    def __exit__(self, *_) -> None:
        end_processes(self.processes)
        del self.iterator


def end_processes(processes: list) -> None:
    """Kills processes of a loader and waits for their end; torch would take each for an accident and raise."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if processes and main else None
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


def of_loader(error: BaseException, workers: int) -> Exception | None:
    """What an error says of a loader process that ended; None for any other error.

    torch raises a RuntimeError wherever the main thread happens to be when the process ends; a batch that is just being
    handed over breaks off with the connection.
    """
    said = " ".join(str(error).split())
    if workers and isinstance(error, (ConnectionResetError, ConnectionRefusedError, EOFError)):
        return LoaderLost(f"a loader process is gone ({said}); the run continues from its newest checkpoint")
    if not isinstance(error, RuntimeError) or "DataLoader worker" not in said:
        return None
    if "Bus error" in said or "shared memory" in said:
        return UserError(f"a loader process found /dev/shm full; {_remedy(workers)}")
    return LoaderLost(f"a loader process is gone ({said}); the run continues from its newest checkpoint")


def _remedy(workers: int) -> str:
    return f"enlarge it (docker run --shm-size 8g), or give --data.workers 0 (now {workers})"


def check_shared_memory(steps: Steps, workers: int, utterances_per_speaker: int) -> None:
    """Raises UserError where /dev/shm cannot hold the crops that `workers` loader processes of this machine keep in it."""
    if not Path("/dev/shm").is_dir():
        return
    rows = (steps.columns.stop - steps.columns.start) * utterances_per_speaker
    need = workers * (PREFETCH + 3) * rows * steps.augmenter.read_samples * 2
    room = shutil.disk_usage("/dev/shm")
    if need > room.free:
        raise UserError(
            f"/dev/shm has {room.free / 2**20:.1f} of {room.total / 2**20:.1f} MiB free, and {workers} loader processes need"
            f" {need / 2**20:.1f} MiB; {_remedy(steps.workers)}"
        )


def _prepare_worker(_worker: int) -> None:
    # A preemption signal to the whole tree is the trainer's business; a loader that dies of it would end the run.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # It must not outlive a trainer that is killed: it holds copies of its sockets, and the other ranks wait for their end.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
