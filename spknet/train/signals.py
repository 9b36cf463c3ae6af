"""What asks a run to stop: SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and a first Ctrl-C let it finish the step, save, and leave.

    SIGTERM, SIGUSR1, SIGUSR2   from schedulers, torchrun and `kill`; again and again: nothing more happens
    SIGHUP                      the terminal has gone; left alone where the run was started under nohup
    SIGINT                      Ctrl-C; a second one, a second or more after the first, leaves at once with status 130
    SIGKILL                     cannot be heard: the next start continues from the newest checkpoint

A second SIGTERM is no wish for haste: schedulers send it to each process of a job, and torchrun passes it on once more. A signal
that comes before `with StopSignals()` ends the process, which has nothing to save yet; one that comes while it saves or after
the last step is noted, and the run ends as it would have.

    with StopSignals() as stop:
        while not stop.received: ...
"""

from __future__ import annotations

import os
import signal
import time


class StopSignals:
    """received: name of the first signal that asked to stop, or None."""

    NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self):
        self.received: str | None = None
        self._first_interrupt: float | None = None

    def __enter__(self) -> StopSignals:
        hung_up = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
        numbers = [number for number in self.NUMBERS if not (hung_up and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            # One Ctrl-C under torchrun arrives twice: from the terminal and from the agent.
            if self._first_interrupt is not None and now - self._first_interrupt >= 1:
                os._exit(130)
            self._first_interrupt = self._first_interrupt or now
        self.received = self.received or signal.Signals(number).name
