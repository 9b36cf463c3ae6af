"""States of runs, from their folders and from SLURM's words."""

import pytest

from launch import status
from spknet.errors import run
from tests.launch.run_folders import note_job, write_run, write_sweep


@pytest.mark.parametrize(
    ("in_slurm", "said", "expected"),
    [
        ("PENDING", None, "queued"),
        ("RUNNING", None, "running"),
        ("RUNNING", "running", "running"),
        ("PENDING", "requeue", "requeued"),
        ("COMPLETING", "requeue", "requeued"),
        ("PENDING", "running", "requeued"),  # a node died
        (None, "done", "done"),
        ("RUNNING", "failed", "failed"),
    ],
)
def test_state_comes_from_the_run_and_from_slurm(tmp_path, in_slurm, said, expected):
    note_job(tmp_path, "12_3", age=60)
    if said:
        write_run(tmp_path, said, [50])
    assert status.run_status(tmp_path, {"12_3": in_slurm} if in_slurm else {}).state == expected


def test_reason_that_will_not_pass_by_itself_is_shown(tmp_path):
    note_job(tmp_path, "12_3", age=60)
    assert "queued (PartitionConfig)" in status.table(
        [status.run_status(tmp_path, {"12_3": "PENDING|PartitionConfig"})]
    )
    assert "queued (" not in status.table([status.run_status(tmp_path, {"12_3": "PENDING|Resources"})])


def test_failure_of_an_earlier_submission_is_not_that_of_the_new_one(tmp_path):
    write_run(tmp_path, "failed", [50], reason="a flat tyre")
    note_job(tmp_path, "12_3", age=-1)
    assert status.run_status(tmp_path, {"12_3": "PENDING"}).state == "queued"


def test_job_that_ended_without_a_word_is_a_failure_that_says_so(tmp_path):
    write_run(tmp_path, "running", [50])
    note_job(tmp_path, "4194304", executor="local", age=60)  # above the largest pid
    found = status.run_status(tmp_path, {})
    # No checkpoint was written: it would begin anew, whatever step it had reached.
    said = f"job 4194304 ended (gone); `spknet resubmit {tmp_path}` continues it at step 0"
    assert found.state == "failed" and found.reason == said


def test_run_without_a_launcher_lives_while_its_lock_is_fresh(tmp_path):
    write_run(tmp_path, "running", [50])
    assert "no sign of life; the same command continues it at step 0" in status.run_status(tmp_path, None).reason
    (tmp_path / "lock").write_text("{}")
    assert status.run_status(tmp_path, None).state == "running"


@pytest.mark.parametrize(
    ("word", "expected", "reason"),
    [
        ("CANCELLED by 1000|", "cancelled", "job 12_3 was cancelled"),
        ("FAILED|exit code 1:0", "failed", "job 12_3 ended (FAILED, exit code 1:0)"),
        ("OUT_OF_MEMORY|exit code 0:125", "failed", "ended (OUT_OF_MEMORY, exit code 0:125)"),
        ("TIMEOUT|", "failed", "ended (TIMEOUT)"),
        ("NODE_FAIL|", "failed", "ended (NODE_FAIL)"),
    ],
)
def test_ends_are_told_apart_by_slurms_own_word(tmp_path, word, expected, reason):
    write_run(tmp_path, "requeue", [50], reason="SIGTERM")
    note_job(tmp_path, "12_3", age=60)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000040.pt").write_text("")
    found = status.run_status(tmp_path, {"12_3": word})
    assert found.state == expected and reason in found.reason
    assert found.reason.endswith(f"`spknet resubmit {tmp_path}` continues it at step 40")  # of the checkpoint, not 50


def test_rank_killed_by_the_kernel_is_named_with_its_signal(tmp_path):
    write_run(tmp_path, "running", [50])
    log = tmp_path / "log.err"
    log.write_text("failed (exitcode: -9) local_rank: 0 (pid: 77) of binary: python\n")
    note_job(tmp_path, "12", log=log, age=60)
    assert (
        "a rank was killed by signal 9 (often: out of memory)" in status.run_status(tmp_path, {"12": "FAILED|"}).reason
    )


def test_living_run_whose_controller_is_gone_is_running(tmp_path):
    write_run(tmp_path, "running", [50])
    note_job(tmp_path, "4194304", executor="local", age=60)
    (tmp_path / "lock").write_text("{}")
    assert status.run_status(tmp_path, None).state == "running"


def test_job_that_has_not_reached_the_accounting_yet_is_queued(tmp_path):
    note_job(tmp_path, "12")
    assert status.run_status(tmp_path, {}).state == "queued"
    note_job(tmp_path, "12", age=60)
    assert status.run_status(tmp_path, {}).state == "failed"


def test_slurm_is_asked_once_for_all_runs(tmp_path, monkeypatch):
    asked, runs = tmp_path / "asked.txt", [tmp_path / f"run-{i}" for i in range(20)]
    for i, folder in enumerate(runs):
        write_run(folder, "running", [50])
        note_job(folder, f"7_{i}", age=60)
    answers = {"squeue": "echo '7_3|RUNNING|None'", "sacct": "echo '7_4|TIMEOUT|0:0'; echo '7_5|CANCELLED by 1|0:0'"}
    for name, answer in answers.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {asked}\n{answer}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = {one.name: one.state for one in status.statuses(tmp_path)}
    assert [found[f"run-{i}"] for i in (3, 4, 5, 6)] == ["running", "failed", "cancelled", "failed"]
    squeue, sacct = asked.read_text().splitlines()  # one call of each
    assert squeue.startswith("squeue ") and sacct.startswith("sacct ")
    jobs = sacct.split(" -j ")[1].split(" ")[0].split(",")
    assert sorted(jobs) == sorted(f"7_{i}" for i in range(20) if i != 3)


def test_run_started_by_hand_and_stopped_is_cancelled_and_watching_it_ends(tmp_path, capsys):
    write_run(tmp_path / "a", "requeue", [50], reason="SIGINT")
    assert status.main([str(tmp_path / "a"), "--watch", "0.1"]) == 0
    assert "stopped by SIGINT; the same command continues it at step 0" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"done"'])
def test_damaged_files_of_a_run_are_no_traceback(tmp_path, content):
    write_run(tmp_path, "running", [50])
    for name in ("state.json", "config.yaml", "launch.json"):
        (tmp_path / name).write_text(content)
    found = status.run_status(tmp_path, None)
    assert found.state == "failed" and found.reason == "state.json cannot be read" and found.step == 50
    (tmp_path / "job.json").write_text(content)
    assert status.run_status(tmp_path, None).state == "failed"


def test_table_shows_step_speed_time_left_and_newest_eer(tmp_path):
    write_run(tmp_path / "a", "running", [10, 50], {"eer": 12.345})
    (tmp_path / "a" / "lock").write_text("{}")
    write_sweep(tmp_path, {"a": {}, "b": {}})
    text = status.table(status.statuses(tmp_path))
    # 150 steps of 16 utterances at 32 a second: 75 s
    assert text.splitlines()[1].split() == ["a", "running", "50/200", "32", "1", "min", "12.35"]
    assert text.splitlines()[-1] == "1 running, 1 missing"


def test_failed_run_shows_its_reason_and_the_end_of_its_own_log(tmp_path, capsys):
    log = tmp_path / "log.err"
    log.write_text(
        "old\n" * 50 + "FloatingPointError: loss is nan\nE1122 api.py:1] failed (exitcode: 1)\nmore\nsubmitit ERROR x\n"
    )
    write_run(tmp_path / "a", "failed", [50], reason="loss is nan at step 51")
    note_job(tmp_path / "a", "12", log=log, age=60)
    write_sweep(tmp_path, {"a": {}})
    assert status.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "a: loss is nan at step 51" in said and "more" not in said
    assert said.rstrip().endswith("FloatingPointError: loss is nan") and said.count("old") == status.LOG_LINES - 1


def test_folder_without_runs_is_an_error(tmp_path, capsys):
    assert run(status.main, [str(tmp_path)]) == 2
    assert "is neither a sweep (no sweep.json) nor a run" in capsys.readouterr().err
