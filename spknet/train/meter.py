"""How long a step takes, and its parts: waiting for data, forward, backward, exchange between ranks, optimizer.

On a CPU by the clock. A GPU works later than it is told to, so there events on its stream are the marks, and they are read when the
metrics are: measuring waits for nothing. `data` is then the time in which the GPU had nothing to do. What ranks exchange within the
forward and backward passes (BatchNorm's moments, prototypes) counts as `exchange` on a CPU; on a GPU it stays in its pass, and
`exchange` is the wait for gradients after it.

    meter = Meter(device); meter.begins("data"); ...; meter.begins("forward"); ...; meter.read()
"""

from __future__ import annotations

import time

import torch

from spknet.parallel import gather

PARTS = ("data", "forward", "backward", "exchange", "optimizer")


class Meter:
    """Training time, since the last pause and since the last reading; stands still while paused."""

    def __init__(self, device: torch.device):
        self.device = device
        self.begun = self.last = time.monotonic()
        self.part: str | None = None
        self.spans: list[tuple] = []  # (part, mark at its begin, mark at its end)

    def begins(self, part: str | None) -> None:
        """What is done from here on; None: nothing that is measured."""
        mark = self._mark()
        if self.part is not None:
            self.spans.append((self.part, self.at, mark))
        self.part, self.at = part, mark

    def _mark(self):
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter(), gather.exchange.seconds

    def elapsed(self) -> float:
        """Seconds since the last pause."""
        return time.monotonic() - self.begun

    def pause(self) -> float:
        self.stopped = time.monotonic()
        return self.stopped - self.begun

    def resume(self) -> None:
        now = time.monotonic()
        self.last += now - self.stopped
        self.begun = now

    def read(self) -> tuple[float, dict[str, float]]:
        """(seconds since the last reading, seconds of each part). Waits for the device."""
        parts = dict.fromkeys(PARTS, 0.0)
        if self.device.type == "cuda" and self.spans:
            self.spans[-1][2].synchronize()
        for part, first, last in self.spans:
            if self.device.type == "cuda":
                parts[part] += first.elapsed_time(last) / 1000
            else:
                exchanged = last[1] - first[1]
                parts[part] += last[0] - first[0] - exchanged
                parts["exchange"] += exchanged
        now = time.monotonic()
        seconds, self.last, self.spans = max(now - self.last, 1e-9), now, []
        return seconds, parts
