"""RUN/lock: newcomers, dead and suspended owners, file systems without hard links or locks, and odd things under its name."""

import ctypes
import json
import multiprocessing
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spknet.parallel.process import machine, started
from spknet.train import lock as locks
from spknet.train.lock import FILES, FOLDERS, RunError, hold, may_write
from spknet.train.run_folder import read_state, write_state
from tests.ranks import exit_statuses

FORK = multiprocessing.get_context("fork")
CALLS = {"x86_64": {"link": 86, "linkat": 265, "flock": 73}, "aarch64": {"linkat": 37, "flock": 32}}


@pytest.fixture
def fast(monkeypatch):
    """A heart that beats every 0.2 s, and owners that count as dead after 1 s."""
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(locks, "STALE_SECONDS", 1.0)


def refuse_calls(names):
    """The kernel answers these system calls of this process with `not supported`, as some mounts do (seccomp, linux/filter.h)."""
    numbers = [CALLS[platform.machine()][name] for name in names if name in CALLS[platform.machine()]]
    load, equal, give = 0x20, 0x15, 0x06
    program = [(load, 0, 0, 0)]
    for i, number in enumerate(numbers):
        program.append((equal, len(numbers) - i, 0, number))
    program += [(give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | 95)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    pointer = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, pointer, 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP, a filter


def foreign(folder, **owner):
    """A lock of another machine."""
    folder.mkdir(exist_ok=True)
    content = {"token": "t", "host": "elsewhere", "machine": "m", "pid": 1, "start": "1", "job": None} | owner
    (folder / "lock").write_text(json.dumps(content))


def dead_owner(folder):
    """A lock of a process of this machine that was killed."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    start = started(child.pid)
    child.kill()
    child.wait()
    foreign(folder, host=socket.gethostname(), machine=machine(), pid=child.pid, start=start)


def _compete(folder, refused, ready, decided, results):
    refuse_calls(refused)
    if refused:
        with pytest.raises(OSError):
            os.link(folder / "lock", folder / "another name")
    ready.wait()
    try:
        with hold(folder) as owner:
            owner.check()
            decided.wait()
            results.put("held")
    except RunError as error:
        decided.wait()
        results.put(str(error))


@pytest.mark.parametrize("refused", [(), ("link", "linkat"), ("link", "linkat", "flock")])
def test_of_many_newcomers_one_takes_a_dead_owners_folder(refused, tmp_path):
    for attempt in range(2 if refused else 5):
        folder, count = tmp_path / str(attempt), 6
        dead_owner(folder)
        ready, decided, results = FORK.Barrier(count), FORK.Barrier(count), FORK.Queue()
        newcomers = [
            FORK.Process(target=_compete, args=(folder, refused, ready, decided, results)) for _ in range(count)
        ]
        for process in newcomers:
            process.start()
        said = sorted(results.get(timeout=60) for _ in newcomers)
        for process in newcomers:
            process.join(30)
        assert said.count("held") == 1
        assert all("belongs to a run on" in text or "taken over" in text for text in said if text != "held")
        assert not (folder / "lock").exists()


def _own(folder, host, pipe):
    locks.socket.gethostname = lambda: host
    try:
        with hold(folder) as owner:
            pipe.send("held")
            while True:
                time.sleep(0.1)
                owner.check()
                write_state(folder, "running", 1, host, owner.token)
    except RunError as error:
        pipe.send(str(error))


def owner_on(host, folder):
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_own, args=(folder, host, theirs))
    process.start()
    return process, ours


def test_an_owner_that_was_suspended_and_lost_its_folder_stops_before_it_writes(fast, tmp_path):
    first, said_first = owner_on("machine-a", tmp_path)
    assert said_first.recv() == "held"
    os.kill(first.pid, signal.SIGSTOP)
    second, said_second = owner_on("machine-b", tmp_path)
    try:
        assert said_second.poll(20) and said_second.recv() == "held"
        os.kill(first.pid, signal.SIGCONT)
        assert said_first.poll(20)
        assert "was taken over by a run on machine-b" in said_first.recv()
        first.join(10)
        time.sleep(1.5)  # the first's heart has stopped; the second's beats
        assert second.is_alive() and not said_second.poll()
        assert read_state(tmp_path)["reason"] == "machine-b"
    finally:
        for process in (first, second):
            process.kill()
            process.join()


def test_a_suspended_owner_of_this_machine_keeps_its_folder(fast, tmp_path):
    process, said = owner_on(socket.gethostname(), tmp_path)
    try:
        assert said.recv() == "held"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.5)
        with pytest.raises(RunError, match=rf"\(pid {process.pid}, job None\)"), hold(tmp_path):
            pass
    finally:
        process.kill()
        process.join()


def test_a_killed_owner_that_nobody_has_reaped_yet_is_dead(tmp_path):
    process, said = owner_on(socket.gethostname(), tmp_path)
    assert said.recv() == "held"
    process.kill()
    end = time.monotonic() + 10
    while " Z " not in Path(f"/proc/{process.pid}/stat").read_text() and time.monotonic() < end:
        time.sleep(0.01)
    began = time.monotonic()
    with hold(tmp_path):
        assert time.monotonic() - began < 0.5
    process.join()


def test_an_owner_elsewhere_is_believed_while_its_heart_beats(fast, tmp_path):
    process, said = owner_on("machine-a", tmp_path)
    try:
        assert said.recv() == "held"
        began = time.monotonic()
        with pytest.raises(RunError, match=r"belongs to a run on machine-a \(pid"), hold(tmp_path):
            pass
        assert time.monotonic() - began < 0.9
    finally:
        process.kill()
        process.join()
    waits = []
    with hold(tmp_path, say=waits.append):  # nobody here can know that it was killed: 1 s without a beat
        assert 1 <= time.monotonic() - began < 5
    assert len(waits) == 1 and "names a run on machine-a" in waits[0]


@pytest.mark.parametrize("offset", [-3600, 0, 3600])
def test_the_date_of_a_lock_says_nothing(offset, fast, tmp_path):
    foreign(tmp_path)
    os.utime(tmp_path / "lock", (time.time() + offset, time.time() + offset))
    began = time.monotonic()
    with hold(tmp_path):
        assert 1 <= time.monotonic() - began < 3


UNREADABLE = {
    "null": b"null",
    "a list": b"[1, 2]",
    "a torn line": b'{"host": "a", "pi',
    "no pid": b'{"host": "HERE", "start": "5"}',
    "a pid that is a word": b'{"host": "HERE", "pid": "many", "start": "5"}',
    "not UTF-8": b"\xff\xfe\x00",
    "deep": b"[" * 50_000,
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_lock_that_names_no_owner_is_watched_and_then_taken(case, fast, tmp_path):
    (tmp_path / "lock").write_bytes(UNREADABLE[case].replace(b"HERE", socket.gethostname().encode()))
    began = time.monotonic()
    with hold(tmp_path):
        assert 1 <= time.monotonic() - began < 3


def test_an_empty_lock_is_nobodys(tmp_path):
    (tmp_path / "lock").write_bytes(b"")
    began = time.monotonic()
    with hold(tmp_path):
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("kind", ["a pipe", "a link", "a folder", "a socket"])
def test_what_is_no_file_is_named_and_left_alone(kind, tmp_path):
    path = tmp_path / "lock"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "a folder":
        path.mkdir()
    else:
        os.chdir(tmp_path)
        socket.socket(socket.AF_UNIX).bind("lock")
    with pytest.raises(RunError, match=f"lock is {kind}, where a file is expected; remove it"), hold(tmp_path):
        pass
    assert os.path.lexists(path) and write_state(tmp_path, "failed", 0)


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_what_is_of_another_kind_in_a_runs_folder_is_named_and_blocks_nobody(name, tmp_path):
    path = tmp_path / name
    ways = [
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/null"),
        lambda: path.symlink_to(tmp_path / "nowhere"),
    ]
    ways.append(path.mkdir if name in FILES else path.touch)
    for make, found in zip(ways, ("a pipe", "a device", "a link", "a folder" if name in FILES else "a file")):
        make()
        with pytest.raises(RunError, match=f"{name} is {found}, where a f.* is expected; remove it"), hold(tmp_path):
            pass
        assert os.path.lexists(path) and not (tmp_path / "lock").exists()
        path.rmdir() if found == "a folder" else path.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch() if name in FILES else elsewhere.mkdir()
    path.symlink_to(elsewhere)  # a link to what is right is right
    with hold(tmp_path):
        pass


def test_a_requeued_job_takes_its_lock_at_once_but_not_from_another_living_step(fast, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    for owner, seconds in (
        ({"restarts": None, "step": "3"}, 0),  # before the requeue
        ({"restarts": "1", "step": "0"}, 0),  # torchrun has started the step's ranks anew
        ({"restarts": "1", "step": "1"}, 1),  # another srun of the same allocation: may live
    ):
        foreign(tmp_path, job="77", **owner)
        began = time.monotonic()
        with hold(tmp_path):
            assert seconds <= time.monotonic() - began < seconds + 0.7


def test_a_heart_never_touches_what_replaced_its_lock(fast, tmp_path):
    with hold(tmp_path) as owner:
        foreign(tmp_path / "other")
        os.replace(tmp_path / "other/lock", tmp_path / "lock")
        stamp = (tmp_path / "lock").stat().st_mtime_ns
        time.sleep(0.7)
        assert (tmp_path / "lock").stat().st_mtime_ns == stamp
        with pytest.raises(RunError, match="taken over by a run on elsewhere"):
            owner.check()
    assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere"  # left alone at the end, too


def test_an_owner_whose_lock_was_removed_stops(tmp_path):
    with hold(tmp_path) as owner:
        owner.check()
        (tmp_path / "lock").unlink()
        with pytest.raises(RunError, match="has been removed while this run held it"):
            owner.check()


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with hold(tmp_path / "a/b"):
        assert (tmp_path / "a/b/lock").exists()
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "a/b"):
        (tmp_path / "a/b/state.json").touch()
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["state.json"]


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_run_folder_that_is_a_file_is_named(path, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="a file stands where a folder is expected"), hold(tmp_path / path):
        pass


def test_nobody_writes_the_state_of_a_living_run(tmp_path, monkeypatch):
    process, said = owner_on("machine-a", tmp_path)
    try:
        assert said.recv() == "held"
        time.sleep(0.3)
        assert not write_state(tmp_path, "failed", 0, "another job")
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        assert not write_state(tmp_path, "failed", 0, "another job")
        assert read_state(tmp_path)["reason"] == "machine-a"
        token = json.loads((tmp_path / "lock").read_text())["token"]
        assert not write_state(tmp_path, "failed", 3, "of another run", token="other")
        assert write_state(tmp_path, "failed", 3, "rank 1 stalled", token=token)
        assert not write_state(tmp_path, "requeue", 3, "what others met because of it", token=token)
        assert (read_state(tmp_path)["state"], read_state(tmp_path)["reason"]) == ("failed", "rank 1 stalled")
    finally:
        process.kill()
        process.join()


def test_ranks_and_launchers_of_the_same_run_may_write_its_state(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    foreign(tmp_path, group=f"{socket.gethostname()}:29500", job="5")
    with may_write(tmp_path) as (allowed, _):
        assert allowed
    foreign(tmp_path, group="elsewhere:29500", job="5")  # its own 127.0.0.1:29500
    with may_write(tmp_path) as (allowed, _):
        assert not allowed
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    with may_write(tmp_path) as (allowed, _):
        assert allowed


def _start_with_a_limit_of_two_seconds(_rank, words):
    from spknet.train.__main__ import main

    locks.STALE_SECONDS = 5.0
    return main([*words, "--train.timeout_seconds", "2"])


def test_ranks_that_wait_for_a_stale_lock_longer_than_their_limit_do_not_stall(options, tmp_path):
    foreign(tmp_path / "run")
    words = [*options, "--train.max_steps", "1", "--run_dir", str(tmp_path / "run")]
    assert exit_statuses(2, _start_with_a_limit_of_two_seconds, words) == [0, 0]
