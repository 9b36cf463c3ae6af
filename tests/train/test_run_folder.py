"""Owner, state and record of a run folder; what a refused start leaves untouched."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spknet.train import run_folder as run
from spknet.train.lock import RunError, hold
from spknet.train.run_folder import begin, carries_on, note_before_begin, read_state, set_aside, write_state
from tests.train.full_disk import on_a_small_disk

ROOT = Path(__file__).resolve().parents[2]


def test_a_second_run_stops_and_names_the_owner(tmp_path):
    script = "import sys, time\nfrom spknet.train.lock import hold\nwith hold(sys.argv[1]):\n print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(RunError, match=rf"belongs to a run on {socket.gethostname()} \(pid {other.pid}"),
            hold(tmp_path),
        ):
            pass
    finally:
        other.kill()
        other.wait()
    with hold(tmp_path):  # its death frees the folder at once
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


def test_state_is_replaced_whole(tmp_path):
    assert read_state(tmp_path) is None
    write_state(tmp_path, "running", 3)
    write_state(tmp_path, "failed", 4, "why")
    state = read_state(tmp_path)
    assert (state["state"], state["step"], state["reason"]) == ("failed", 4, "why")


def test_the_record_names_revision_command_and_versions():
    record = run.record(["CPU"], ["host"])
    assert record["hosts"] == ["host"] and record["packages"]["torch"] and record["command"]


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[1]", b'{"state": "run', b"\xff\xfe", b'{"state": "gone", "step": 1}']
)
def test_a_damaged_state_is_told_and_replaced(content, tmp_path):
    (tmp_path / "state.json").write_bytes(content)
    state = read_state(tmp_path)
    assert state["state"] == "unreadable" and "state.json is damaged" in state["reason"]
    assert write_state(tmp_path, "running", 2) and read_state(tmp_path)["step"] == 2


def snapshot(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_a_start_that_is_refused_leaves_a_finished_run_as_it_was(tmp_path):
    with hold(tmp_path) as owner:
        begin(owner, {"optim": {"lr": 0.1}}, run.record(["CPU"], ["here"]), 0)
        write_state(tmp_path, "done", 60, "", owner.token)
    before = snapshot(tmp_path)
    with pytest.raises(RunError), hold(tmp_path) as owner:
        try:
            raise RunError("options have changed")
        except RunError as error:
            note_before_begin(tmp_path, "failed", str(error), owner.token)
            raise
    assert snapshot(tmp_path) == before


def test_a_first_start_that_fails_before_it_began_says_why(tmp_path):
    with hold(tmp_path / "new") as owner:
        note_before_begin(tmp_path / "new", "failed", "index.json is missing", owner.token)
    assert (read_state(tmp_path / "new")["state"], read_state(tmp_path / "new")["reason"]) == (
        "failed",
        "index.json is missing",
    )
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["state.json"]


def test_a_rank_lost_before_the_beginning_asks_for_a_requeue_and_leaves_a_finished_run_alone(tmp_path):
    for before, after in ((None, "requeue"), ("requeue", "requeue"), ("running", "requeue"), ("done", "done")):
        if before:
            write_state(tmp_path, before, 7)
        note_before_begin(tmp_path, "requeue", "rank 1 is gone")
        assert (read_state(tmp_path)["state"], read_state(tmp_path)["step"]) == (after, 7 if before else 0)


def test_options_record_and_state_are_written_at_the_beginning(tmp_path):
    options = {"run_dir": "x", "optim": {"lr": 0.1}}
    with hold(tmp_path) as owner:
        assert begin(owner, options, run.record(["CPU"], ["here"]), 7) == []
        assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == options
        assert json.loads((tmp_path / "record.json").read_text())["hosts"] == ["here"]
        assert (read_state(tmp_path)["state"], read_state(tmp_path)["step"]) == ("running", 7)


@pytest.mark.parametrize("version", ["this one", "one that kept no digest"])
def test_a_config_that_was_edited_by_hand_is_kept_with_a_word(version, tmp_path):
    with hold(tmp_path) as owner:
        begin(owner, {"optim": {"lr": 0.1}}, {}, 0)
        if version != "this one":
            (tmp_path / "record.json").write_text("{}")
        assert begin(owner, {"optim": {"lr": 0.2}}, {}, 0) == []  # changed on the command line: nothing is lost
        if version != "this one":
            (tmp_path / "record.json").write_text("{}")
        (tmp_path / "config.yaml").write_text("optim: {lr: 0.5}  # tried by hand\n")
        (note,) = begin(owner, {"optim": {"lr": 0.2}}, {}, 0)
        assert "config.yaml was edited" in note and "config.yaml.edited-1" in note
    assert "tried by hand" in (tmp_path / "config.yaml.edited-1").read_text()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"optim": {"lr": 0.2}}


def test_a_full_disk_cannot_keep_the_state_from_being_told(tmp_path):
    said = on_a_small_disk(
        tmp_path,
        """
        from spknet.train.lock import hold
        from spknet.train.run_folder import begin, read_state, write_state
        with hold(disk) as owner:
            begin(owner, {"a": 1}, {}, 0)
            fill()
            assert write_state(disk, "failed", 3, "the disk is full", owner.token)
        state = read_state(disk)
        print(state['state'], state['step'], state['reason'], [p.name for p in disk.iterdir()])
        fresh = disk / "fresh"
        fresh.mkdir()
        fill()
        try:
            with hold(fresh):
                pass
        except OSError as error:
            print(error.errno == errno.ENOSPC, list(fresh.iterdir()))
        """,
    )
    assert "failed 3 the disk is full" in said and ".tmp" not in said and "True []" in said


def git(folder, *words):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    subprocess.run(command, check=True, capture_output=True, env=environment)


def package(folder):
    (folder / "spknet").mkdir(parents=True)
    (folder / "spknet/errors.py").write_text("")


def checkout(folder):
    """A repository that tracks a package in its top folder; its revision."""
    package(folder)
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return (folder / ".git" / (folder / ".git/HEAD").read_text().split()[1]).read_text().strip()


def test_the_revision_is_that_of_the_packages_own_checkout(tmp_path):
    revision = checkout(tmp_path / "own")
    assert run.git_revision(tmp_path / "own") == revision
    (tmp_path / "own/spknet/errors.py").write_text("changed")
    assert run.git_revision(tmp_path / "own") == f"{revision}-modified"


def test_another_repositorys_revision_is_not_recorded(tmp_path, monkeypatch):
    revision = checkout(tmp_path / "own")
    package(tmp_path / "own/venv/site-packages")  # installed inside a repository, tracked there or not
    assert run.git_revision(tmp_path / "own/venv/site-packages") is None
    git(tmp_path / "own", "add", ".")
    assert run.git_revision(tmp_path / "own/venv/site-packages") is None
    git(tmp_path / "own", "reset", "--hard")
    checkout(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))  # as in a git hook of the other one
    assert run.git_revision(tmp_path / "own") == revision


@pytest.mark.parametrize("trouble", ["no git", "git fails", "git hangs"])
def test_a_container_without_git_records_no_revision(trouble, tmp_path, monkeypatch):
    program = tmp_path / "git"
    if trouble != "no git":
        program.write_text("#!/bin/sh\n" + ("exit 128" if trouble == "git fails" else "exec sleep 60"))
        program.chmod(0o755)
    monkeypatch.setattr(run, "GIT_SECONDS", 0.3)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if trouble == "git hangs" else str(tmp_path))
    if trouble == "git hangs":
        assert shutil.which("sleep")
    assert run.record(["CPU"], ["here"])["git_revision"] is None


def test_a_requeue_and_the_same_words_again_carry_on_and_others_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--train.resume", "never"])
    assert not carries_on(tmp_path)
    with hold(tmp_path) as owner:
        begin(owner, {}, run.record([], []), 0)
        assert carries_on(tmp_path)  # killed while it ran
        write_state(tmp_path, "requeue", 5, "SIGTERM", owner.token)
        assert carries_on(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train", "--train.resume", "never", "--optim.lr", "3"])
        assert not carries_on(tmp_path)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert carries_on(tmp_path)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        monkeypatch.setenv("SLURM_JOB_ID", "9")
        assert not carries_on(tmp_path)
        begin(owner, {}, run.record([], []), 0)
        monkeypatch.setattr(sys, "argv", ["train"])
        assert carries_on(tmp_path)  # the same job
        write_state(tmp_path, "done", 9, "", owner.token)
        assert not carries_on(tmp_path)


def test_what_an_earlier_run_left_is_set_aside_when_one_is_begun_anew(tmp_path):
    for name in (
        "checkpoints/step-00000010.pt",
        "checkpoints/step-00000020.pt",
        "metrics.jsonl",
        "eval/step-00000010/report.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    with hold(tmp_path) as owner:
        (note,) = set_aside(owner)
        assert "before-1" in note
        assert sorted(p.name for p in (tmp_path / "before-1").iterdir()) == ["checkpoints", "eval", "metrics.jsonl"]
        assert (tmp_path / "before-1/checkpoints/step-00000020.pt").exists()
        assert set_aside(owner) == []
