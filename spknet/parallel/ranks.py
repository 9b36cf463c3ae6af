"""Who am I among the ranks: from torchrun's variables, from srun's, or alone; how ranks meet, and how they leave.

Ranks meet at a store (MASTER_ADDR:MASTER_PORT) before anything else: from then on what one rank fails, all learn
(spknet/parallel/together.py), and a rank that falls silent is named (spknet/parallel/watchdog.py). The process group for
tensors (NCCL on GPUs, gloo on CPUs) comes second.

    with meet(timeout_seconds=600) as me:               # me.rank, me.world_size
        with join(device="auto", threads=0) as me:      # me.device; collectives work
            ...
    with ranks("cpu") as me: ...                        # both at once
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from spknet.errors import UserError
from spknet.parallel import torchrun
from spknet.parallel.nodelist import first_host, rendezvous_port
from spknet.parallel.process import identity

MOST_RANKS, MOST_THREADS = 1 << 20, 1024  # more is a slip, and torch would wait for them, or OpenMP die of them
PATIENCE = 10.0  # seconds of waiting after which a rank says what it waits for
GOODBYE = 2.0  # seconds that the store outlives its rank's last words


class RankError(UserError):
    """Ranks do not fit together, or one of them was lost; the message names it."""


class RankLost(RankError):
    """Another rank is gone: no fault of the run, which goes on when it is started again."""


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


@dataclass
class Meeting:
    """What the ranks of this process's run share before a process group exists."""

    me: Ranks
    store: dist.Store | None = None  # None: alone
    address: tuple[str, int] | None = None
    limit: float = 600.0  # seconds that a rank waits for the others
    serves: bool = False  # whether this process holds the store
    peers: dict[int, tuple] = field(default_factory=dict)  # of each rank: host, and its process' identity


_meeting = Meeting(Ranks())


def here() -> Ranks:
    """This process's place among the ranks; alone outside of `meet`."""
    return _meeting.me


def meeting() -> Meeting:
    """The store of this run and the place in it."""
    return _meeting


def from_environment(environment=os.environ) -> dict[str, int] | None:
    """Rank, world size and place on this machine from torchrun's variables or, under srun, from SLURM's; None if alone.

    Under srun MASTER_ADDR and MASTER_PORT are filled in: the first host of the job, a port from the job's id. An interactive
    shell of a job (`srun --pty bash`) has SLURM's variables too, but one task: it is alone. Raises RankError for half a set.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, world, local, local_size = (_number(environment, name) for name in names)
        lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if world > 1 and name not in environment]
        if lacking or not 0 <= rank < world <= MOST_RANKS:
            found = f"{' and '.join(lacking)} not" if lacking else f"RANK={rank} of WORLD_SIZE={world}"
            raise RankError(f"RANK and WORLD_SIZE are set, but {found}; start ranks by torchrun, or unset RANK")
        return {"rank": rank, "world_size": world, "local": local, "local_size": local_size or world}
    if "SLURM_STEP_ID" in environment and _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = first_host(environment["SLURM_STEP_NODELIST"])
        environment.setdefault("MASTER_PORT", str(rendezvous_port(environment["SLURM_JOB_ID"])))
        per_node = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        node = _number(environment, "SLURM_NODEID")
        return {
            "rank": int(environment["SLURM_PROCID"]),
            "world_size": int(environment["SLURM_STEP_NUM_TASKS"]),
            "local": int(environment["SLURM_LOCALID"]),
            "local_size": per_node[min(node, len(per_node) - 1)],
        }
    return None


def _tasks_per_node(word: str) -> list[int]:
    """SLURM's `4(x2),1` -> [4, 4, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", word)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))] or [1]


def _number(environment, name: str, default: int = 0) -> int:
    value = environment.get(name, str(default))
    if not value.isdecimal():
        raise RankError(f"{name}={value!r} in the environment; expected a whole number")
    return int(value)


@contextlib.contextmanager
def meet(timeout_seconds: float = 600.0) -> Iterator[Ranks]:
    """Waits for all ranks at the store, at most timeout_seconds. Raises RankError naming who did not come."""
    global _meeting
    place = from_environment()
    before, _meeting = _meeting, Meeting(Ranks(**(place or {})), limit=timeout_seconds)
    try:
        if _meeting.me.world_size > 1:
            _meeting.address = (os.environ["MASTER_ADDR"], _number(os.environ, "MASTER_PORT"))
            _meeting.store = _open_store(_meeting)
            try:
                _await_all(_meeting)
                # From here on the watchdog looks at the clock: an evaluation may keep the others waiting for hours.
                _meeting.store.set_timeout(datetime.timedelta(days=7))
            except (dist.DistStoreError, dist.DistNetworkError):
                raise RankError(f"rank 0 at {_meeting.address[0]} has left before all ranks had come") from None
        yield _meeting.me
    finally:
        with contextlib.suppress(RuntimeError):  # the store may be gone
            leave(_meeting)
        _meeting = before


def leave(where: Meeting, store: dist.Store | None = None) -> None:
    """Says goodbye. The rank that holds the store stays a moment, so that all others read what was told last.

    store: a connection of the caller's own, where the run's main thread may be waiting on the other one.
    """
    store = store or where.store
    if store is None:
        return
    store.set(f"left/{where.me.rank}", "")
    others = [f"left/{rank}" for rank in range(where.me.world_size)]
    end = time.monotonic() + GOODBYE
    while where.serves and time.monotonic() < end and not store.check(others):
        time.sleep(0.02)


def connect(where: Meeting, timeout_seconds: float) -> dist.TCPStore:
    """One more connection to the store: a thread that asks must not wait behind another one's question."""
    store = dist.TCPStore(*where.address, is_master=False, timeout=datetime.timedelta(seconds=timeout_seconds))
    return dist.PrefixStore(_attempt(), store)


def _open_store(where: Meeting) -> dist.Store:
    me, (host, port) = where.me, where.address
    # torchrun's agent holds the store itself where it says so; otherwise rank 0 does.
    where.serves = serves = me.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = datetime.timedelta(seconds=where.limit)
    try:
        with _saying(f"waiting for the store of rank 0 at {host}:{port}"):
            options = {"is_master": serves, "timeout": limit, "wait_for_workers": False}
            store = _within(where.limit, lambda: dist.TCPStore(host, port, **options))
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if serves and ("EADDRINUSE" in reason or "in use" in reason):
            raise RankError(f"port {port} of {host} is in use by another program; give another MASTER_PORT") from None
        if serves:
            raise RankError(f"cannot open the store of the ranks at {host}:{port}: {reason}") from None
        raise RankError(
            f"no rank 0 at {host}:{port} within {where.limit:g} s; is it running, and is MASTER_ADDR right?"
        ) from None
    return dist.PrefixStore(_attempt(), store)


def _within(seconds: float, make: Callable[[], Any]) -> Any:
    """make(), given up after some seconds: torch waits for ever for another program that listens and never answers."""
    answers: queue.Queue = queue.Queue()

    def work() -> None:
        try:
            answers.put((make(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True, name="store").start()
    end = time.monotonic() + seconds + GOODBYE
    while time.monotonic() < end:
        with contextlib.suppress(queue.Empty):
            store, error = answers.get(timeout=0.5)
            if error is not None:
                raise error
            return store
        if torchrun.is_gone():  # it holds the store, or would start the rank that does
            raise RankLost("torchrun has died before the ranks had met; the run continues from its newest checkpoint")
    raise dist.DistNetworkError("no answer")


def _attempt() -> str:
    # torchrun with a fixed --master_port keeps its store over restarts, with the words of ranks that are gone.
    return f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _await_all(where: Meeting) -> None:
    """Every rank says that it is here and how many it expects; all learn who is missing."""
    me, store = where.me, where.store
    store.set(f"here/{me.rank}", json.dumps([me.world_size, socket.gethostname(), *identity()]))
    begun = told = time.monotonic()
    missing = list(range(me.world_size))
    while missing:
        for rank in [r for r in missing if store.check([f"here/{r}"])]:
            missing.remove(rank)
            size, *where.peers[rank] = json.loads(store.get(f"here/{rank}"))
            _check_size(me, rank, size, where.peers[rank][0])
        now = time.monotonic()
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        if missing and now - begun > where.limit:
            raise RankError(
                f"rank {names} of {me.world_size} did not come to {where.address[0]} within {where.limit:g} s"
            )
        if missing and me.first and now - told > PATIENCE:
            print(f"waiting for rank {names} of {me.world_size}", file=sys.stderr, flush=True)
            told = now + 5 * PATIENCE
        time.sleep(0.05 if missing else 0)


def _check_size(me: Ranks, rank: int, size: int, host: str) -> None:
    if size != me.world_size:
        raise RankError(
            f"rank {rank} ({host}) was started as one of {size}, rank {me.rank} as one of {me.world_size}; start all"
            " with one WORLD_SIZE"
        )


@contextlib.contextmanager
def _saying(what: str) -> Iterator[None]:
    timer = threading.Timer(PATIENCE, lambda: print(what, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def join(device: str = "auto", threads: int = 0) -> Iterator[Ranks]:
    """Joins the process group of the ranks that have met, on the device that this rank is to use, and leaves it at the end.

    device: auto, cpu or cuda; threads: of this process on the CPU, 0 for an equal share of the cores. Raises RankError.
    """
    global _meeting
    me = _meeting.me
    where = _device(device, me)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    torch.set_num_threads(threads or threads_of(me))
    before, _meeting = _meeting, replace(_meeting, me=replace(me, device=where))
    try:
        if me.world_size > 1:
            # The watchdog speaks first (it can name the slow rank); the process group's own limit is the net below it.
            limit = datetime.timedelta(seconds=2 * _meeting.limit + 60)
            extra = {"device_id": where} if where.type == "cuda" else {}
            backend = "nccl" if where.type == "cuda" else "gloo"
            store = dist.PrefixStore("group", _meeting.store)
            dist.init_process_group(
                backend, store=store, rank=me.rank, world_size=me.world_size, timeout=limit, **extra
            )
        yield _meeting.me
        if dist.is_initialized():  # a rank that leaves while another still works may abort that one in gloo's threads
            dist.barrier()
            dist.destroy_process_group()
    finally:
        # After an error the group is left as it is: with a collective under way its end might wait for ever.
        _meeting = before


@contextlib.contextmanager
def ranks(device: str = "auto", threads: int = 0, timeout_seconds: float = 600.0) -> Iterator[Ranks]:
    """`meet` and `join`."""
    with meet(timeout_seconds), join(device, threads) as me:
        yield me


def _device(device: str, me: Ranks) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RankError("--train.device cuda, but torch sees no GPU here; see `nvidia-smi`, or use --train.device cpu")
    seen = torch.cuda.device_count()
    if seen == 1 and me.local_size > 1 and _own_gpu():
        return torch.device("cuda", 0)  # srun --gpus-per-task=1: each rank sees its own GPU only, as number 0
    if me.local >= seen:
        raise RankError(
            f"rank {me.rank} is number {me.local} on {socket.gethostname()}, which has"
            f" {seen} GPUs; start at most that many ranks a machine, or use --train.device cpu"
        )
    return torch.device("cuda", me.local)


def _own_gpu() -> bool:
    """Whether the launcher has given this rank one GPU of its own (a number or a MIG slice), and not all ranks the same."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return "SLURM_PROCID" in os.environ and bool(visible) and "," not in visible


def threads_of(me: Ranks) -> int:
    """CPU threads of a rank: OMP_NUM_THREADS where the user has set it (of nested values, `2,1`, the first), else an equal
    share of the cores. The 1 that torchrun sets where nobody has said anything does not count."""
    word = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if word.isdigit() and int(word) > MOST_THREADS:
        raise RankError(f"OMP_NUM_THREADS={word} in the environment; expected at most {MOST_THREADS}")
    if word.isdigit() and int(word) > 0 and not (word == "1" and torchrun.sets_threads()):
        return int(word)
    return max(1, len(os.sched_getaffinity(0)) // me.local_size)
