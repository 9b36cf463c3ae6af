"""The speaker-balanced global batch: a pure function of (seed, epoch, step), the same on any number of ranks.

A batch is N speakers x M utterances with all speakers distinct, over ALL ranks: rank r of W takes columns [rN/W, (r+1)N/W),
so that a speaker's utterances stay together and no speaker stands on two ranks. An epoch is dealt like cards:

1. Speaker s has k_s = min(n_s, cap) // M groups of M utterances. The epoch has B steps, B being the largest integer with
   sum_s min(k_s, B) >= N B; beyond B groups a speaker is cut, since it can stand only once in each batch.
2. Speakers in random order, their groups side by side in one row; the first N B of them, cut into N rows of B.
3. Row i is dealt by a permutation of its own, one group to each of the B batches. A speaker that crosses the end of a row
   (at most one does, since k_s <= B) takes, in the second row, only batches that it did not take in the first.

So no batch holds a speaker twice, no group is used twice, fewer than N groups are left over, and nothing is retried.

    sampler = Sampler(speaker_rows, speakers_per_batch=200, utterances_per_speaker=2, cap=500, seed=0)
    rows = sampler.batch(epoch=3, step=17)  # (N, M) rows of the data set
"""

from __future__ import annotations

import hashlib

import numpy as np

from spknet import rng
from spknet.data.dealing import CROSSING, LARGE, Deal, crossing
from spknet.errors import UserError


class SamplerError(UserError):
    """The data cannot give such a batch; the message says what could."""


def steps_per_epoch(groups: np.ndarray, speakers_per_batch: int) -> int:
    """B, the largest integer with sum(min(groups, B)) >= N * B, by bisection."""
    low, high = 0, int(groups.sum()) // speakers_per_batch
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(groups, middle).sum() >= speakers_per_batch * middle:
            low = middle
        else:
            high = middle - 1
    return low


def deal(groups: np.ndarray, n_rows: int, generator: np.random.Generator) -> np.ndarray:
    """Which batch each group goes to (steps 2 and 3 above).

    groups: (S,) numbers of groups, speakers already in random order, none above B = steps_per_epoch.
    Returns (N, B): the batch of group j of row i; each row is a permutation of the B batches.
    """
    n_batches = steps_per_epoch(groups, n_rows)
    batch_of = generator.permuted(np.broadcast_to(np.arange(n_batches, dtype=np.uint32), (n_rows, n_batches)), axis=1)
    ends = np.cumsum(groups)
    for i in range(1, n_rows):
        boundary = i * n_batches
        speaker = np.searchsorted(ends, boundary, side="right")  # whose groups hold the first place of this row
        before = boundary - (ends[speaker] - groups[speaker])
        if before == 0:
            continue
        after = min(ends[speaker], boundary + n_batches) - boundary
        taken = np.zeros(n_batches, dtype=bool)
        taken[batch_of[i - 1, n_batches - before :]] = True
        row = batch_of[i]
        free = np.flatnonzero(~taken[row])[:after]
        rest = np.ones(n_batches, dtype=bool)
        rest[free] = False
        batch_of[i] = np.concatenate([row[free], row[rest]])
    return batch_of


class Sampler:
    """Global batches of a data set.

    speaker_rows: (S+1,), the rows of speaker s are [speaker_rows[s], speaker_rows[s+1]); excluded: (S,) bool, speakers
    that never stand in a batch; cap: utterances of a speaker used in one epoch; balanced: every speaker the same number
    of groups, whatever it has; plan: table (4 bytes an utterance), formula (spknet.data.dealing), or auto: a table up to
    2^24 utterances. Raises SamplerError where fewer than N speakers have M utterances.
    """

    def __init__(
        self,
        speaker_rows,
        *,
        speakers_per_batch,
        utterances_per_speaker,
        cap,
        seed,
        balanced=False,
        excluded=None,
        plan="auto",
    ):
        self.n_speakers, self.n_utterances, self.cap = speakers_per_batch, utterances_per_speaker, cap
        self.seed, self.balanced = seed, balanced
        self.first = np.asarray(speaker_rows[:-1], dtype=np.int64)
        self.counts = np.diff(np.asarray(speaker_rows, dtype=np.int64))
        self.excluded = np.zeros(len(self.counts), bool) if excluded is None else np.asarray(excluded, bool)
        available = np.where(self.excluded, 0, np.minimum(self.counts, cap) // self.n_utterances)
        self.usable = np.flatnonzero(available)
        self.too_short = int(((available == 0) & ~self.excluded).sum())  # speakers with fewer than M utterances
        if len(self.usable) < speakers_per_batch:
            raise SamplerError(
                f"{len(self.usable)} speakers have at least {utterances_per_speaker} utterances"
                f" ({self.too_short} have fewer), but a global batch wants data.speakers_per_batch={speakers_per_batch}"
                " distinct speakers; lower it, or add speakers"
            )
        self.per_round = available[self.usable]
        groups = self.per_round
        if balanced:
            groups = np.full(len(groups), max(1, int(groups.sum()) // len(groups)))
        self.steps = steps_per_epoch(groups, speakers_per_batch)
        self.groups = np.minimum(groups, self.steps)
        self.lost_fraction = 1 - self.groups.sum() / groups.sum()  # of all groups, lost to "once in each batch"
        large = self.steps * speakers_per_batch * utterances_per_speaker >= LARGE
        large &= crossing(self.groups, speakers_per_batch) < CROSSING
        self.formula = large if plan == "auto" else plan == "formula"
        self._plan = (None, None)

    def fingerprint(self) -> str:
        """Digest of everything the batches depend on but the step."""
        settings = f"{self.n_speakers} {self.n_utterances} {self.cap} {self.seed} {self.balanced}"
        settings += " formula" if self.formula else ""
        digest = hashlib.sha256(settings.encode())
        for part in (self.counts, self.excluded):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def plan(self, epoch: int) -> np.ndarray:
        """The epoch's batches: rows of the data set, (B, N, M) uint32 (4 bytes an utterance)."""
        if self.formula:
            return np.stack([self.batch(epoch, step) for step in range(self.steps)])
        return self._of(epoch)

    def _of(self, epoch: int) -> np.ndarray | Deal:
        """The table, or what stands for it, of an epoch; the last one is kept."""
        if self._plan[0] != epoch:
            self._plan = (None, None)  # not both at once
            self._plan = (epoch, Deal(self, epoch) if self.formula else self._deal_epoch(epoch))
        return self._plan[1]

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Rows of the global batch of one step of an epoch, (N, M)."""
        return self._of(epoch).batch(step) if self.formula else self._of(epoch)[step]

    def slots(self, step: int) -> np.ndarray:
        """Positions within the epoch of the utterances of one step, (N, M): what crops and augmentation are keyed by."""
        size = self.n_speakers * self.n_utterances
        return (step * size + np.arange(size)).reshape(self.n_speakers, self.n_utterances)

    def _deal_epoch(self, epoch: int) -> np.ndarray:
        generator = rng.stream(self.seed, epoch, "deal")
        order = generator.permutation(len(self.usable))
        groups, per_round = self.groups[order], self.per_round[order]
        row = self._groups_in_a_row(epoch, self.usable[order], groups, per_round)
        batch_of = deal(groups, self.n_speakers, generator)
        plan = np.empty((self.steps, self.n_speakers, self.n_utterances), dtype=np.uint32)
        plan[batch_of, np.arange(self.n_speakers)[:, None]] = row[: batch_of.size].reshape(*batch_of.shape, -1)
        return plan

    def _groups_in_a_row(self, epoch, speakers, groups, per_round) -> np.ndarray:
        """Groups of M utterances, speaker by speaker, (sum(groups), M): each speaker's own, in a random order.

        A speaker with fewer groups than it is asked for (balanced) goes through its utterances in several rounds, each in
        an order of its own. One sort of (round of a speaker, random bits) does it for all.
        """
        rounds = -(-groups // per_round)
        speaker = np.repeat(speakers, rounds)  # of each round
        size = self.counts[speaker]
        start = np.cumsum(size) - size
        round_of = np.repeat(np.arange(len(speaker), dtype=np.uint64), size)
        place = np.arange(size.sum()) - np.repeat(start, size)
        rows = np.repeat(self.first[speaker], size) + place
        # 32 random bits below the round's number: ties (1 in 10^7 pairs of one round) keep the order of the rows
        key = (round_of << np.uint64(32)) | (rng.bits(self.seed, epoch, "order", np.arange(len(rows))) >> np.uint64(32))
        rows = rows[np.argsort(key, kind="stable")]
        used = np.repeat(per_round, rounds)  # groups of a round
        excess = np.cumsum(rounds)  # the last round of a speaker gives what is still wanted
        used[excess - 1] = groups - (rounds - 1) * per_round
        return rows[place < np.repeat(used, size) * self.n_utterances].reshape(-1, self.n_utterances)
