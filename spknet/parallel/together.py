"""What one rank does or fails, all learn: plain values and failures travel through the store at which the ranks met.

    with together("opening the data"):
        corpus = open(...)               # no collective in here; what one rank raises, every rank raises, in the same words
    path = on_first("looking for the newest checkpoint", lambda: newest(run_dir))
    every = gather_objects(socket.gethostname())

The store works from the first line on, before a process group exists, and takes no part in what GPUs exchange. For a loop
full of collectives, where a rank that fails cannot come to a common place, there is spknet/parallel/watchdog.py.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from spknet.errors import UserError, of_system
from spknet.parallel.ranks import RankError, RankLost, here, meeting

PIECE = 1 << 22  # bytes of one entry of the store, which closes the connection from 8 MiB on
_rounds = 0  # exchanges so far; equal on all ranks
_told: list[list[str]] = []  # on rank 0, the keys of the last rounds


class Failed(RuntimeError):
    """A rank met an error that is not the user's; the message says which rank and what."""


def gather_objects(value: Any) -> list:
    """Every rank's plain value, in rank order, on every rank. Called by all ranks."""
    global _rounds
    me, store = here(), meeting().store
    if store is None:
        return [value]
    number, _rounds = _rounds, _rounds + 1
    # Pickled, as torch's own collectives of objects are: whoever reaches the store's port is taken for a rank.
    try:
        if not me.first:
            _put(store, f"round {number}/{me.rank}", value)
            return _take(store, f"round {number}")[0]
        every = [value]
        for rank in range(1, me.world_size):
            late = rank
            theirs, keys = _take(store, f"round {number}/{rank}")
            every.append(theirs)
            for key in keys:
                store.delete_key(key)
        _told.append(_put(store, f"round {number}", every))
        while len(_told) > 2:  # all have come here, so all have read the round before the last one
            for key in _told.pop(0):
                store.delete_key(key)
        return every
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        gone = f"rank {late} or the store" if me.first else "rank 0"
        raise RankLost(f"{gone} is gone; the run continues from its newest checkpoint ({_first_line(error)})") from None


def _put(store: dist.Store, key: str, value: Any) -> list[str]:
    """Writes a value into the store, in pieces, the number of all before the first; returns their keys."""
    data = pickle.dumps(value)
    parts = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
    keys = [key, *(f"{key} piece {i}" for i in range(1, len(parts)))]
    for name, part in list(zip(keys, parts))[:0:-1]:
        store.set(name, part)
    store.set(key, b"%d " % len(parts) + parts[0])  # last: who sees it finds the others
    return keys


def _take(store: dist.Store, key: str) -> tuple[Any, list[str]]:
    """Waits for what `_put` writes: the value, and its keys."""
    count, _, data = store.get(key).partition(b" ")
    keys = [f"{key} piece {i}" for i in range(1, int(count))]
    return pickle.loads(b"".join([data, *map(store.get, keys)])), [key, *keys]


def broadcast(value: Any) -> Any:
    """Rank 0's plain value on every rank."""
    me = here()
    return gather_objects(value if me.first else None)[0]


def barrier() -> None:
    """Returns when every rank has come here."""
    gather_objects(None)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """`with together("opening the data"):` ends on every rank as it ends on all: what one rank raises, every rank raises.

    The words are the same everywhere. A mistake of the user stays a UserError; any other error becomes Failed, and its
    traceback is printed where it happened. No collective may stand inside.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    raise_together(failure, what)


def raise_together(failure: Exception | None, what: str) -> None:
    """Raises on every rank what some rank has met, if any has."""
    if meeting().store is None:
        if failure is not None:
            raise failure
        return
    own = (
        None
        if failure is None
        else (isinstance(failure, (UserError, OSError)), sentence(failure), socket.gethostname())
    )
    every = gather_objects(own)
    failed = [(rank, *said) for rank, said in enumerate(every) if said is not None]
    if not failed:
        return
    if failure is not None and not own[0]:
        traceback.print_exception(failure, file=sys.stderr)
    rank, user, text, host = failed[0]
    if any(said[2] != text for said in failed) or len(failed) < len(every):
        # Rank 0 alone does what is done once for all: its place adds nothing.
        text = text if rank == 0 else f"rank {rank} ({host}), {what}: {text}"
    raised = (UserError if user else Failed)(text)
    raised.everywhere = True  # no other rank needs to be told
    raise raised from None


def on_first(what: str, work: Callable[[], Any], share: bool = True) -> Any:
    """The result of work() on rank 0, on every rank where it is shared, else None there. Its errors are raised on all."""
    result = None
    with together(what):
        if here().first:
            result = work()
    return broadcast(result) if share else result


def agree(facts: dict[str, str]) -> None:
    """Raises RankError on every rank, naming the first fact and rank that differ from rank 0's."""
    every = gather_objects((socket.gethostname(), facts))
    for rank, (host, theirs) in enumerate(every):
        for name, value in every[0][1].items():
            if theirs.get(name) != value:
                error = RankError(
                    f"ranks disagree on {name}: rank 0 ({every[0][0]}) has {value}, rank {rank} ({host}) has"
                    f" {theirs.get(name)}; start every rank with the same command, code and data"
                )
                error.everywhere = True
                raise error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def sentence(error: BaseException) -> str:
    """An error in one line, as a user and state.json read it."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return str(of_system(error))
    first = _first_line(error)
    return first if first == type(error).__name__ else f"{type(error).__name__}: {first}"
