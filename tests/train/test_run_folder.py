"""Owner, state and signals of a run folder; metrics that are cut on resume."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from spknet.train import run_folder as run
from spknet.train.metrics_log import MetricsLog, read_metrics
from spknet.train.run_folder import RunError, StopSignals, owned, read_state, write_state


def test_a_second_run_stops_and_names_the_owner(tmp_path):
    script = "import sys, time\nfrom spknet.train.run_folder import owned\nwith owned(sys.argv[1]):\n print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(RunError, match=rf"belongs to a run on {socket.gethostname()} \(pid {other.pid}"),
            owned(tmp_path),
        ):
            pass
    finally:
        other.kill()
        other.wait()
    with owned(tmp_path):  # its death frees the folder at once
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


def lock_of(tmp_path, age, **owner):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "1", "job": None} | owner))
    os.utime(lock, (time.time() - age, time.time() - age))


def test_an_owner_on_another_machine_is_believed_while_its_heart_beats(tmp_path):
    lock_of(tmp_path, age=5)
    with pytest.raises(RunError, match="belongs to a run on elsewhere"), owned(tmp_path):
        pass
    lock_of(tmp_path, age=run.STALE_SECONDS + 1)
    with owned(tmp_path):
        pass


def test_a_requeued_job_takes_its_own_lock_back_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock_of(tmp_path, age=1, job="77")
    with owned(tmp_path):
        pass


def test_state_is_replaced_whole(tmp_path):
    assert read_state(tmp_path) is None
    write_state(tmp_path, "running", 3)
    write_state(tmp_path, "failed", 4, "why")
    state = read_state(tmp_path)
    assert (state["state"], state["step"], state["reason"]) == ("failed", 4, "why")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_signals_are_remembered_once(name):
    before = signal.getsignal(getattr(signal, name))
    with StopSignals() as stop:
        os.kill(os.getpid(), getattr(signal, name))
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == name
    assert signal.getsignal(getattr(signal, name)) is before


def test_a_second_interrupt_leaves_at_once_but_not_the_echo_of_the_first():
    script = (
        "import time\nfrom spknet.train.run_folder import StopSignals\n"
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


def test_metrics_beyond_the_step_and_a_torn_line_are_cut(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": step / 8})
    log.write({"step": 2, "eval": {"eer": 5.0}})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(tmp_path, 2, tensorboard=False)
    assert log.has_evaluation(2) and not log.has_evaluation(1)
    log.write({"step": 3, "loss": 9.0})
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2, 3] and lines[-1]["loss"] == 9.0


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, tensorboard=True)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "loss": float(step)})
    log.close()
    time.sleep(1.1)  # event files are named by the second
    log = MetricsLog(tmp_path, 2, tensorboard=True)
    log.write({"step": 3, "loss": 30.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_the_record_names_revision_command_and_versions():
    record = run.record(["CPU"], ["host"])
    assert record["hosts"] == ["host"] and record["packages"]["torch"] and record["command"]
