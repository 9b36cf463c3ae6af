"""Signals that ask a run to stop: which, how often, and when they come."""

import os
import signal
import subprocess
import sys
import time

import pytest

from spknet.train.signals import StopSignals


@pytest.fixture
def hears_hangups():
    """SIGHUP as it is without nohup, under which the tests themselves may run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_signals_are_remembered_once(name, hears_hangups):
    before = signal.getsignal(getattr(signal, name))
    with StopSignals() as stop:
        os.kill(os.getpid(), getattr(signal, name))
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == name
    assert signal.getsignal(getattr(signal, name)) is before


def test_a_second_interrupt_leaves_at_once_but_not_the_echo_of_the_first():
    script = (
        "import time\nfrom spknet.train.signals import StopSignals\n"
        "with StopSignals() as s:\n print('ready', flush=True)\n"
        " while s.received is None: time.sleep(0.01)\n print('asked', flush=True)\n time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "asked\n"
    child.send_signal(signal.SIGINT)
    time.sleep(1.1)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(10) == 130


def _hears_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def waiting(*before):
    """A process that says `ready`, waits for a signal, says its name, and ends after the block."""
    script = (
        "import time\nfrom spknet.train.signals import StopSignals\n"
        "with StopSignals() as stop:\n print('ready', flush=True)\n"
        " while stop.received is None: time.sleep(0.01)\n print(stop.received, flush=True)\n time.sleep(0.5)\n"
        "print('saved', flush=True)\ntime.sleep(60)"
    )
    command = [*before, sys.executable, "-c", script]
    # The tests themselves may run under nohup.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_hears_hangups)
    assert child.stdout.readline() == "ready\n"
    return child


def test_more_of_the_same_signal_while_it_saves_changes_nothing_and_after_it_the_default_holds():
    child = waiting()
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "SIGTERM\n"
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        child.send_signal(number)
    assert child.stdout.readline() == "saved\n"
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == -signal.SIGTERM


def test_a_hangup_asks_to_stop_but_not_under_nohup():
    child = waiting()
    child.send_signal(signal.SIGHUP)
    assert child.stdout.readline() == "SIGHUP\n"
    child.kill()
    child.wait()
    child = waiting("nohup")
    child.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert child.poll() is None
    child.send_signal(signal.SIGUSR2)
    assert child.stdout.readline() == "SIGUSR2\n"
    child.kill()
    child.wait()
