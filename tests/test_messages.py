"""What a run says: a line now and then in a log, a bar on a terminal."""

import contextlib
import logging
import os
import pty
import re
import sys

import pytest

from spknet import messages


def advanced(seconds_apart: float, steps: int, monkeypatch) -> None:
    """Steps that are so far apart on the clock."""
    clock = [1000.0]
    monkeypatch.setattr(messages.time, "monotonic", lambda: clock[0])
    with messages.Progress(steps) as progress:
        for step in range(steps):
            clock[0] += seconds_apart
            progress.advance(f"loss {step}")


@pytest.mark.parametrize(("seconds_apart", "lines"), [(0.1, 1), (10, 171), (61, 1200)])
def test_a_log_gets_a_line_a_minute_and_no_bar(seconds_apart, lines, monkeypatch, capfd):
    advanced(seconds_apart, 1200, monkeypatch)
    said = capfd.readouterr().err
    assert "\r" not in said and len(said.splitlines()) == lines
    assert all(re.fullmatch(r"step \d+ of 1200: loss \d+", line) for line in said.splitlines())


def test_a_terminal_gets_a_bar_and_messages_above_it(monkeypatch):
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with messages.Progress(10) as progress:
            progress.advance("loss 2.1")
            logging.getLogger("spknet").info("a message")
    data = b""
    with contextlib.suppress(OSError):  # the end; one read may give a part
        while piece := os.read(ours, 2**16):
            data += piece
    said = data.decode()
    assert "\r" in said and "a message" in said and "/10" in said and "of 10: " not in said
    os.close(ours)
