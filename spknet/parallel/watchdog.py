"""No rank waits for ever: whoever fails alone tells the others, and a rank that stalls, dies or is cut off is named.

A collective that waits for a rank cannot be interrupted from Python. So each rank has two threads beside its work. One
tells the store what the rank does and looks whether another one has failed, through a connection of its own. It also looks
at the other ranks' processes on this machine, which the kernel knows to be dead within a second, and, where nothing else
limits its patience, at signs of life from elsewhere: rank 0 at everyone's, the others at rank 0's. One thread looks at the
clock: at how long the rank has been without a step, and at how long the store has not answered. Either ends the process
(os._exit) when there is no more to wait for. The first report counts: it is what every rank says and what state.json holds.

    watchdog = Watchdog(report); watchdog.start()
    watchdog.says("reading batches", step=12)
    watchdog.fail(Failure("rank 1: ...", status=2))        # from the rank that knows
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from spknet.errors import printable
from spknet.parallel import stacks, torchrun
from spknet.parallel.process import has_died
from spknet.parallel.ranks import PATIENCE, connect, here, leave, meeting

CONTINUES = "the run continues from its newest checkpoint"
OUT_OF_REACH = "its machine, or the network between them, is gone"
STALLED = "no step finished"  # in a reason: launchers read it
REQUEUE = 75  # exit status: not done, start the same command again (EX_TEMPFAIL)
GRACE = 5.0  # seconds that a failing rank stays, so that all others learn why


@dataclass(frozen=True)
class Failure:
    """Why a run ends before its time."""

    reason: str
    status: int = 1  # exit status of every rank: 2 a mistake of the user, 75 another rank is gone, 1 anything else
    rank: int = 0

    @property
    def state(self) -> str:
        """What state.json says: a lost rank is no fault of the run."""
        return "requeue" if self.status == REQUEUE else "failed"


class Watchdog:
    """One for each rank and run. report: called with the Failure on rank 0, before the process leaves."""

    def __init__(self, report: Callable[[Failure], None], wants_to_stop: Callable[[], str | None] = lambda: None):
        self.me, self.limit, self.report = here(), meeting().limit, report
        self.dumps: Path | None = None  # where stacks are left; set once the run folder is known
        self.wants_to_stop = wants_to_stop  # the signal that asked this rank to stop
        self.asked: str | None = None  # what asked some rank to stop
        self.interval = min(1.0, self.limit / 8)
        self.place = (0, 0, "starting")  # step, order within the step, in words
        self.since: float | None = time.monotonic()  # None: what is done now may take its time
        self.heard = time.monotonic()  # when the store answered last
        self.beats = 0
        self.unchanged: dict[int, tuple[int, int]] = {}  # of each rank: its beats, and how often they were the same
        self.stopped = threading.Event()
        self.leaving = threading.Lock()

    def start(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        if self.me.world_size > 1:
            self.store = connect(meeting(), max(1.0, min(10.0, self.limit)))
            threading.Thread(target=self._talk, daemon=True, name="heartbeat").start()
        return self

    def stop(self) -> None:
        """Nothing is watched any more: this rank leaves in its own way."""
        self.stopped.set()

    def says(self, doing: str, step: int = 0, order: int = 0) -> None:
        """What this rank does now. order: its place within the step; ranks are compared by (step, order)."""
        self.place, self.since = (step, order, doing), time.monotonic()

    def pause(self, doing: str, step: int = 0) -> None:
        """What comes now (an evaluation) may take much longer than a step."""
        self.place, self.since = (step, 9, doing), None

    def stop_asked(self) -> bool:
        """Whether some rank has been asked to stop; known to all within a second or two."""
        return bool(self.wants_to_stop() or self.asked)

    def fail(self, failure: Failure) -> Failure:
        """Tells all ranks why this one ends; returns the failure that was told first, which may be another rank's.

        Waits until the others know it, at most GRACE seconds.
        """
        if self.me.world_size == 1:
            return failure
        with contextlib.suppress(Exception):  # the store may be gone with the rank that held it
            told = self.store.compare_set("failure", "", json.dumps(asdict(failure)))
            failure = Failure(**json.loads(told))
            self.store.set(f"knows/{self.me.rank}", "")
            end = time.monotonic() + GRACE
            others = [f"knows/{rank}" for rank, (_, *place) in meeting().peers.items() if not has_died(*place)]
            while time.monotonic() < end and not self.store.check(others):
                time.sleep(0.05)
        return failure

    def last_acts(self, failure: Failure) -> None:
        """Leaves the stacks of a stalled run behind; ends the torchrun of one that has failed for good."""
        if STALLED in failure.reason and self.dumps is not None:
            stacks.write(self.dumps, self.me.rank)
        if failure.state == "failed" and self.me.local == 0:
            torchrun.end()

    def _talk(self) -> None:
        while not self.stopped.wait(self.interval):
            try:
                self.beats += 1
                step, order, doing = self.place
                self.store.set(f"at/{self.me.rank}", f"{self.beats} {step} {order} {doing}")
                told = self.store.get("failure").decode() if self.store.check(["failure"]) else ""
                if self.asked is None and self.wants_to_stop():
                    self.store.set("stop", self.wants_to_stop())
                if self.store.check(["stop"]):
                    self.asked = self.store.get("stop").decode()
                lost = "" if told else self._lost()
                self.heard = time.monotonic()
            except Exception as error:
                if self.stopped.wait(2 * PATIENCE if "timeout" in str(error).lower() else GRACE):
                    return
                self._leave(Failure(f"the other ranks are gone: {_short(error)}", REQUEUE, self.me.rank), tell=False)
                return
            if told:
                failure = Failure(**json.loads(told))
                self.store.set(f"knows/{self.me.rank}", "")
                if failure.rank != self.me.rank:
                    # Rank 0 may hold the store: it waits until all others have read this.
                    self._leave(failure, tell=self.me.first)
                    return
            elif lost:
                self._leave(Failure(f"{lost}; {CONTINUES}", REQUEUE, self.me.rank), tell=True)
                return

    def _watch(self) -> None:
        asking = None
        while not self.stopped.wait(min(0.5, self.interval)):
            now = time.monotonic()
            if self.me.world_size > 1 and now - self.heard > self.limit:
                host, port = meeting().address
                said = f"rank {self.me.rank} has not reached the other ranks ({host}:{port}) for {self.limit:g} s"
                self._leave(Failure(said + "; the network between them is cut", REQUEUE, self.me.rank), tell=False)
            elif asking is None and self.since is not None and now - self.since > self.limit:
                # Who is behind stands in the store, which may be out of reach, and then does not answer at all.
                asking = threading.Thread(target=self._leave_stalled, daemon=True, name="stalled")
                asking.start()

    def _leave_stalled(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: the heartbeat speaks
            # A machine that stalls is no fault of the run: the launcher starts it again, and blames the node.
            self._leave(Failure(self._stalled(), REQUEUE, self.me.rank), tell=True)

    def _leave(self, failure: Failure, tell: bool) -> None:
        self.leaving.acquire(timeout=2 * GRACE)  # who has it may wait for a store out of reach; it is never given back
        if self.stopped.is_set():
            return
        if tell:
            failure = self.fail(failure)
        alone = failure.rank == self.me.rank
        if self.me.first or alone:
            print(f"error: {printable(failure.reason)}", file=sys.stderr, flush=True)
        if self.me.first:
            self.report(failure)
        self.last_acts(failure)
        for child in multiprocessing.active_children():
            child.kill()  # loaders ignore gentler signals
        if alone and not tell and self.me.local == 0:
            torchrun.end_if_cut_off()
        if self.me.world_size > 1 and tell:
            with contextlib.suppress(RuntimeError):
                leave(meeting(), self.store)
        os._exit(failure.status)

    def gone(self) -> str:
        """Who is gone where a connection has broken; takes some beats to see."""
        with contextlib.suppress(Exception):  # the store may be gone with rank 0
            silent, _ = self._silent()
            if silent:
                return f"{self._named(silent)} {'is' if len(silent) == 1 else 'are'} gone"
        return "another rank is gone"

    def _lost(self) -> str:
        """Says which rank has died or has shown no sign of life for the limit, in an empty string none."""
        for rank, (_, *place) in meeting().peers.items():
            if has_died(*place) and not self.store.check([f"left/{rank}"]):
                return f"{self._named([rank])} is gone: its process has ended"
        watched = range(1, self.me.world_size) if self.me.first else [0]
        for rank, (beats, *_) in self._places(watched).items():
            before, times = self.unchanged.get(rank, (-1, 0))
            times = times + 1 if beats == before else 0
            self.unchanged[rank] = (beats, times)
            # Counted, not timed: this machine may have been suspended itself.
            late = times * self.interval > self.limit and self.since is None  # else the clock speaks, and says more
            if late and not self.store.check([f"left/{rank}"]):
                return f"{self._named([rank])} is gone: no sign of life for {self.limit:g} s; {OUT_OF_REACH}"
        return ""

    def _stalled(self) -> str:
        waited = f"{STALLED} within train.timeout_seconds={self.limit:g}"
        if self.me.world_size == 1:
            return f"{waited}; last seen {self.place[2]} at step {self.place[0]}{self._left()}"
        silent, places = self._silent()
        slowest = silent[0] if silent else min(places, key=lambda rank: places[rank][1:3])
        _, step, _, doing = places[slowest]
        if silent:
            doing = f"without a sign of life since: {OUT_OF_REACH}"
        steps = ", ".join(str(place[1]) for place in places.values())
        return (
            f"{waited}; {self._named([slowest])} is behind, last seen at step {step}, {doing} (steps of all ranks: {steps});"
            f" look at that rank's log and machine{self._left()}"
        )

    def _left(self) -> str:
        return f"; stacks of the ranks: {self.dumps}/stacks-rank-*.txt" if self.dumps else ""

    def _named(self, ranks: list[int]) -> str:
        hosts = sorted({meeting().peers[rank][0] for rank in ranks})
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} ({', '.join(hosts)})"

    def _silent(self) -> tuple[list[int], dict]:
        """Ranks without a sign of life for three beats, and where all of them are."""
        before = self._places(range(self.me.world_size))
        time.sleep(3 * self.interval)  # counters, not times: clocks of machines differ
        after = self._places(range(self.me.world_size))
        return [rank for rank in after if before[rank][0] == after[rank][0] and rank != self.me.rank], after

    def _places(self, ranks: Iterable[int]) -> dict[int, tuple[int, int, int, str]]:
        """Of each of these ranks: beats, step, order, doing."""
        found = {}
        for rank in ranks:
            name = f"at/{rank}"
            beats, step, order, doing = (
                self.store.get(name).decode() if self.store.check([name]) else "0 -1 0 -"
            ).split(" ", 3)
            found[rank] = int(beats), int(step), int(order), doing
        return found


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
