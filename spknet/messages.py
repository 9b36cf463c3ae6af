"""What a run says while it runs: messages of rank 0 on stderr, a progress bar on a terminal, a line a minute in a log.

A reader of stderr that goes away (`| head`, a `tee` that dies) takes nothing with it: the run goes on in silence.

    say("continuing runs/a at step 1200")
    with Progress(total=4000, initial=1200) as progress: progress.advance("loss 2.1")
"""

from __future__ import annotations

import logging
import os
import sys
import time

log = logging.getLogger("spknet")
LINE_SECONDS = 60.0  # between two lines of progress where there is no terminal


class _Stderr:
    """sys.stderr as it is at the time of writing; silent once its reader is gone."""

    def write(self, text: str) -> int:
        try:
            return sys.stderr.write(text)
        except (BrokenPipeError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            return len(text)

    def flush(self) -> None:
        try:
            sys.stderr.flush()
        except (BrokenPipeError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()


stderr = _Stderr()


class _Handler(logging.StreamHandler):
    """Writes above a progress bar, where one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        if stderr.isatty():
            from tqdm import tqdm

            tqdm.write(self.format(record), file=stderr)
        else:
            super().emit(record)


def _first(_record: logging.LogRecord) -> bool:
    # Every rank has the same to say; what one alone knows it raises.
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) in ("0", "")


if not log.handlers:
    _handler = _Handler(stderr)
    _handler.setFormatter(logging.Formatter("%(message)s"))
    _handler.addFilter(_first)
    log.addHandler(_handler)
    log.setLevel(os.environ.get("SPKNET_LOG", "INFO").upper())
    log.propagate = False

say = log.info
warn = log.warning


class Progress:
    """A bar on a terminal, else a line a minute; nothing on other ranks than the first."""

    def __init__(self, total: int, initial: int = 0, unit: str = "step", shown: bool = True):
        self.total, self.done, self.unit = total, initial, unit
        self.bar, self.shown, self.told = None, shown, time.monotonic()
        if shown and stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=initial, unit=unit, mininterval=1, file=stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, text: str = "", by: int = 1) -> None:
        """`by` more are done; text: what stands behind the bar or in the line."""
        self.done += by
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(by)
        elif self.shown and time.monotonic() - self.told > LINE_SECONDS:
            self.told = time.monotonic()
            say(f"{self.unit} {self.done} of {self.total}" + (f": {text}" if text else ""))
