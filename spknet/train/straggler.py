"""Which rank keeps the others waiting: told once in a run's life, from each rank's own seconds a step.

All ranks meet in every step, so all steps take equally long. What tells them apart is the time without the exchange
between ranks: data, computing, the optimizer.

    slow = Straggler(); slow.look([0.21, 0.20, 0.34, 0.20])     # 2, once it has been so for three readings
"""

from __future__ import annotations

import statistics

RATIO = 1.5  # of the other ranks' median
READINGS = 3  # in a row


class Straggler:
    """The readings so far."""

    def __init__(self):
        self.suspect, self.readings, self.told = -1, 0, False

    def look(self, seconds: list[float]) -> int | None:
        """seconds: of each rank, a step. The rank to be named now, if any."""
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        others = [value for rank, value in enumerate(seconds) if rank != slowest]
        if self.told or not others or seconds[slowest] < RATIO * statistics.median(others):
            self.readings = 0
            return None
        self.readings = self.readings + 1 if slowest == self.suspect else 1
        self.suspect, self.told = slowest, self.readings >= READINGS
        return slowest if self.told else None
