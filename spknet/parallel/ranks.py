"""Who am I among the ranks: process group from torchrun, from srun, or none; and what all ranks must agree on.

with ranks(config.train) as me:  # me.rank, me.world_size, me.device
    agree({"config": digest}, me)
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from spknet.errors import UserError
from spknet.parallel import gather
from spknet.parallel.wires import put_up


class RankError(UserError):
    """Ranks do not fit together, or one of them was lost; the message names it."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the run. local: number on this machine, of local_size."""

    rank: int = 0
    world_size: int = 1
    local: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        return self.rank == 0


def from_environment(environment=os.environ) -> dict[str, int] | None:
    """Rank, world size and place on this machine from torchrun's variables or, under srun, from SLURM's; None if alone.

    Under srun MASTER_ADDR and MASTER_PORT are filled in: the first host of the job, a port from the job's id.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, world, local, local_size = (int(environment.get(name, 0)) for name in names)
        return {"rank": rank, "world_size": world, "local": local, "local_size": local_size or world}
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = _first_host(environment["SLURM_STEP_NODELIST"])
        environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
        per_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0]
        return {
            "rank": int(environment["SLURM_PROCID"]),
            "world_size": int(environment["SLURM_STEP_NUM_TASKS"]),
            "local": int(environment["SLURM_LOCALID"]),
            "local_size": int(per_node),
        }
    return None


def _first_host(nodelist: str) -> str:
    found = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    return found.stdout.split()[0]


@contextlib.contextmanager
def ranks(device: str = "auto", threads: int = 0, timeout_seconds: float = 600.0) -> Iterator[Ranks]:
    """Joins the process group (NCCL on GPUs, gloo on CPUs; none for one rank) and leaves it at the end.

    device: auto, cpu or cuda; threads: of this process on the CPU, 0 for an equal share of the cores.
    """
    place = from_environment() or {"rank": 0, "world_size": 1, "local": 0, "local_size": 1}
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda and place["local"] >= torch.cuda.device_count():
        raise RankError(
            f"rank {place['rank']} is number {place['local']} on {socket.gethostname()}, which has"
            f" {torch.cuda.device_count()} GPUs; start at most that many ranks a machine, or use --train.device cpu"
        )
    where = torch.device("cuda", place["local"]) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, cores // place["local_size"]))
    if place["world_size"] > 1:
        # The watchdog speaks first (it can name the slow rank); the process group's own limit is the net below it.
        limit = datetime.timedelta(seconds=2 * timeout_seconds + 60)
        extra = {"device_id": where} if cuda else {}
        store, rank, world = next(rendezvous("env://", rank=place["rank"], world_size=place["world_size"]))
        # torchrun with a fixed --master_port keeps its store over restarts, with the addresses of ranks that are gone.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit, **extra)
    try:
        if dist.is_initialized() and not cuda:
            gather.wires = put_up(place["rank"], place["world_size"], 2 * timeout_seconds + 60)
        yield Ranks(device=where, **place)
        if dist.is_initialized():  # a rank that leaves while another still works may abort that one in gloo's threads
            dist.barrier()
    finally:
        if gather.wires is not None:
            gather.wires.close()
            gather.wires = None
        if dist.is_initialized():
            dist.destroy_process_group()


def agree(facts: dict[str, str], me: Ranks) -> None:
    """Raises RankError on every rank, naming the first fact and rank that differ from rank 0's."""
    every = gather_objects((socket.gethostname(), facts), me)
    for rank, (host, theirs) in enumerate(every):
        for name, value in every[0][1].items():
            if theirs.get(name) != value:
                raise RankError(
                    f"ranks disagree on {name}: rank 0 ({every[0][0]}) has {value}, rank {rank} ({host}) has"
                    f" {theirs.get(name)}; start every rank with the same command, code and data"
                )


def broadcast(value, me: Ranks):
    """Rank 0's plain value on every rank."""
    if me.world_size == 1:
        return value
    box = [value if me.first else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value, me: Ranks) -> list:
    """Every rank's plain value, in rank order, on every rank."""
    every = [value] * me.world_size
    if me.world_size > 1:
        dist.all_gather_object(every, value)
    return every


@contextlib.contextmanager
def first_rank_only(me: Ranks) -> Iterator[bool]:
    """`with first_rank_only(me) as first: if first: ...`: returns when rank 0 is done; what it raises, every rank raises."""
    failure = None
    try:
        yield me.first
    except Exception as error:
        failure = error
    failure = broadcast(failure, me)
    if failure is not None:
        raise failure


def barrier(me: Ranks) -> None:
    """Returns when every rank has come here."""
    if me.world_size > 1:
        dist.barrier()


def data_parallel(module: torch.nn.Module, me: Ranks) -> torch.nn.Module:
    """The module under DistributedDataParallel, or itself with one rank. Buffers are left alone: they are equal already."""
    if me.world_size == 1:
        return module
    wrapper = torch.nn.parallel.DistributedDataParallel
    # torch 2.14 has renamed the option; 2.11 has only the older name.
    new = "forward_sync_buffers" in inspect.signature(wrapper).parameters
    buffers = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    where = [me.device] if me.device.type == "cuda" else None
    return wrapper(module, device_ids=where, gradient_as_bucket_view=True, **buffers)


def average_gradients(parameters, me: Ranks) -> None:
    """Mean over ranks of every gradient, in one collective: what DDP does, for steps that ran outside of it."""
    if me.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= me.world_size
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def peer_lost(error: BaseException) -> bool:
    """Whether an error of a collective means that another rank is gone (killed, its machine down), not a fault here."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "NCCL error")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class Watchdog(threading.Thread):
    """Names the rank that stalls: every rank tells the store what it does; whoever waits too long reads all and stops.

    report: called with the message on the rank that gives up, before the process leaves with status 1. A stalled
    collective cannot be interrupted from Python, hence os._exit.
    """

    def __init__(self, me: Ranks, limit_seconds: float, report: Callable[[str], None]):
        super().__init__(daemon=True, name="watchdog")
        self.me, self.limit, self.report = me, limit_seconds, report
        self.interval = min(5.0, limit_seconds / 8)
        self.store = dist.distributed_c10d._get_default_store() if me.world_size > 1 else None
        self.since: float | None = None  # None: not watching
        self.stopped = threading.Event()
        self.beats = 0

    def waits(self, step: int) -> None:
        """This rank has done `step` steps (global) and waits for the next one's data."""
        self.since = time.monotonic()
        self._tell("at", f"{step} 0")

    def computes(self, step: int) -> None:
        """It has the data. Ranks meet in the step's collectives, so one that is slow stays behind in this alone."""
        self._tell("at", f"{step} 1")

    def saves(self, step: int) -> None:
        """Rank 0 writes a checkpoint, and the others wait for it."""
        self._tell("at", f"{step} -1")

    def pause(self) -> None:
        """What comes now (evaluation) may take much longer than a step."""
        self.since = None

    def _tell(self, what: str, value: str) -> None:
        if self.store is not None:
            self.store.set(f"{what}/{self.me.rank}", value)

    def run(self) -> None:
        while not self.stopped.wait(self.interval):
            self.beats += 1
            self._tell("beat", str(self.beats))
            if self.since is not None and time.monotonic() - self.since > self.limit:
                self.report(self._message())
                os._exit(1)

    def _read(self, what: str) -> list[str]:
        names = [f"{what}/{rank}" for rank in range(self.me.world_size)]
        return [self.store.get(name).decode() if self.store.check([name]) else "" for name in names]

    def _message(self) -> str:
        waited = f"no step finished within train.timeout_seconds={self.limit:g}"
        if self.store is None:
            return waited
        beats = self._read("beat")
        time.sleep(3 * self.interval)  # counters, not times: clocks of machines differ
        places = [tuple(map(int, (place or "-1 0").split())) for place in self._read("at")]
        silent = [r for r, (a, b) in enumerate(zip(beats, self._read("beat"))) if a == b and r != self.me.rank]
        slowest = silent[0] if silent else min(range(len(places)), key=places.__getitem__)
        step, phase = places[slowest]
        doing = "without a sign of life since" if silent else ("waiting for data", "computing", "saving")[phase]
        steps = ", ".join(str(step) for step, _ in places)
        return (
            f"{waited}; rank {slowest} is behind, last seen at step {step}, {doing} (steps of all ranks: {steps}); look at"
            " that rank's log and machine"
        )
