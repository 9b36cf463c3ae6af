"""An epoch's batches without a table of them: what spknet.data.sampler deals, worked out for one batch at a time.

A table takes 4 bytes an utterance in every loader process, and 50 while it is made: 5 GB for 100 million. Here an epoch
keeps 12 bytes a speaker. The cards are dealt as before (speakers in random order, groups side by side, N rows of B places,
each row dealt to the B batches by a permutation of its own), but by functions that can be asked for one batch:

    place -> batch in row i     a Feistel network of 6 rounds over [0, 2^2h) >= B, walked until it falls below B (Black and
                                Rogaway, 2002). Being invertible, it says for batch b which place of each row it takes.
    a speaker's utterances      sorted by a hash of (row, round), for the N speakers of the batch alone.

A speaker that crosses the end of a row could meet itself: where its places in row i are dealt to a batch that its places
in row i - 1 have taken, that place changes its batch with one beyond. There are few such speakers (at most one a row), so
the changed places are found once an epoch and kept. Batches are others than the table's, with the same properties.

    deal = Deal(sampler, epoch=3)
    rows = deal.batch(17)  # (N, M) rows of the data set
"""

from __future__ import annotations

import numpy as np

from spknet import rng

ROUNDS = 6
LARGE = 1 << 24  # utterances from which on an epoch has no table
CROSSING = 1 << 22  # places of speakers that cross an end of a row: with more, a table is quicker


def crossing(groups: np.ndarray, n_speakers: int) -> int:
    """About how many places the speakers have that cross the ends of rows: N speakers drawn by their number of groups."""
    return int(n_speakers * np.square(groups, dtype=np.float64).sum() / groups.sum())


class Deal:
    """The batches of one epoch. sampler: spknet.data.sampler.Sampler."""

    def __init__(self, sampler, epoch: int):
        self.sampler, self.epoch = sampler, epoch
        order = rng.stream(sampler.seed, epoch, "deal").permutation(len(sampler.usable)).astype(np.uint32)
        self.order, self.ends = order, np.cumsum(sampler.groups[order])  # (S,): places up to each speaker's last
        bits = max(2, int(sampler.steps - 1).bit_length())
        self.half = np.uint64((bits + 1) // 2)
        self.batch_at: list[dict[int, int]] = [{} for _ in range(sampler.n_speakers)]  # changed places of each row
        self.changed: dict[int, list[tuple[int, int]]] = {}  # batch -> (row, place) that it takes instead
        self._keep_apart()

    def permuted(self, row: np.ndarray, values: np.ndarray, inverse: bool = False) -> np.ndarray:
        """Batches of places (inverse: places of batches) of these rows, before any change: int64, the same shape."""
        row, out = row.astype(np.uint64), self._network(row, values, inverse)
        while (outside := out >= self.sampler.steps).any():
            out[outside] = self._network(row[outside], out[outside], inverse)
        return out.astype(np.int64)

    def _network(self, row: np.ndarray, values: np.ndarray, inverse: bool) -> np.ndarray:
        mask, values = (np.uint64(1) << self.half) - np.uint64(1), values.astype(np.uint64)
        left, right, above = values >> self.half, values & mask, row.astype(np.uint64) << np.uint64(32)
        for k in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
            known = left if inverse else right
            mixed = rng.bits(self.sampler.seed, self.epoch, f"deal {k}", above | known) & mask
            left, right = (right ^ mixed, left) if inverse else (right, left ^ mixed)
        return (left << self.half) | right

    def _keep_apart(self) -> None:
        """Changes places so that a speaker that crosses the end of a row is dealt to different batches on both sides."""
        steps, rows = self.sampler.steps, np.arange(1, self.sampler.n_speakers)
        speaker = np.searchsorted(self.ends, rows * steps, side="right")
        last = self.ends[speaker]
        before = rows * steps - (last - self.sampler.groups[self.order[speaker]])
        after = np.minimum(last, (rows + 1) * steps) - rows * steps
        for i, tail, head in zip(rows.tolist(), before.tolist(), after.tolist()):
            if tail == 0:
                continue
            taken = set(self._batches(i - 1, np.arange(steps - tail, steps)))
            clash = [place for place, batch in enumerate(self._batches(i, np.arange(head))) if batch in taken]
            # The places that the next end looks at, left alone if it can be.
            free = int(before[i]) if i < len(before) else 0
            for place in clash:
                self._exchange(i, place, head, steps - free, taken)

    def _batches(self, row: int, places: np.ndarray) -> list[int]:
        found = self.permuted(np.full(len(places), row), places)
        return [self.batch_at[row].get(place, batch) for place, batch in zip(places.tolist(), found.tolist())]

    def _exchange(self, row: int, place: int, head: int, tail: int, taken: set[int]) -> None:
        """Gives `place` a batch that is not taken: that of a place in [head, tail), or, if none will do, of one beyond."""
        for other in (*range(head, tail), *range(max(head, tail), self.sampler.steps)):
            batch = self._batches(row, np.array([other]))[0]
            if batch not in taken and other not in self.batch_at[row]:
                mine = self._batches(row, np.array([place]))[0]
                self.batch_at[row] |= {place: batch, other: mine}
                self.changed.setdefault(batch, []).append((row, place))
                self.changed.setdefault(mine, []).append((row, other))
                return
        raise AssertionError("a speaker has more groups than an epoch has batches")

    def batch(self, step: int) -> np.ndarray:
        """Rows of the data set of one global batch, (N, M) uint32."""
        sampler, row = self.sampler, np.arange(self.sampler.n_speakers)
        place = self.permuted(row, np.full(len(row), step), inverse=True)
        for i, changed in self.changed.get(step, []):
            place[i] = changed
        place += row * sampler.steps
        position = np.searchsorted(self.ends, place, side="right")
        usable = self.order[position]
        group = place - (self.ends[position] - sampler.groups[usable])
        return self._utterances(sampler.usable[usable], *np.divmod(group, sampler.per_round[usable]))

    def _utterances(self, speaker: np.ndarray, turn: np.ndarray, group: np.ndarray) -> np.ndarray:
        """The group's M utterances of each speaker, in the order that its utterances have in this turn through them."""
        sampler, m = self.sampler, self.sampler.n_utterances
        size = sampler.counts[speaker]
        start = np.cumsum(size) - size
        owner = np.repeat(np.arange(len(speaker), dtype=np.uint64), size)
        rows = np.arange(size.sum()) + np.repeat(sampler.first[speaker] - start, size)
        items = (np.repeat(turn, size).astype(np.uint64) << np.uint64(40)) | rows.astype(np.uint64)
        bits = rng.bits(sampler.seed, self.epoch, "order", items) >> np.uint64(32)
        order = np.argsort((owner << np.uint64(32)) | bits, kind="stable")
        return rows[order[(start + group * m)[:, None] + np.arange(m)]].astype(np.uint32)
