"""A rank that fails anywhere ends every rank soon, with the reason once; state.json holds that reason."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from spknet.errors import UserError
from spknet.train.metrics_log import read_metrics
from spknet.train.run_folder import read_state
from tests.ranks import exit_statuses

FAIL_SECONDS = 10.0  # from the failure until the last rank has ended


def _fail(error):
    """Writes down when it fails, and fails."""

    def fail(*_, **__):
        Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
        if error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise error

    return fail


def _patched(rank: int, place: str, victim: int, words: list[str]) -> int:
    """spknet.train, one rank of which fails at `place`."""
    from spknet.train import __main__ as command
    from spknet.train import sidelines, trainer

    if rank == victim and place != "none":
        mistake, bug = UserError("the mount is missing"), KeyError("nobody thought of this")
        places = {
            "options": (command.voxceleb_trainer, "options", mistake),
            "data": (trainer.Corpus, "open", mistake),
            "network": (trainer, "build_model", bug),
            "checkpoint": (trainer.Trainer, "_load", mistake),
            "loader": (trainer.Batches, "__next__", mistake),
            "step": (trainer, "prepare", bug),
            "killed in a step": (trainer, "prepare", None),
            "killed at the data": (trainer.Corpus, "open", None),
            "killed in the evaluation": (sidelines.evaluation, "evaluate_network", None),
            "saving": (sidelines.checkpoint, "save", OSError(28, "No space left on device", "RUN")),
            "evaluation": (sidelines.evaluation, "evaluate_network", bug),
        }
        owner, name, error = places[place]
        setattr(owner, name, _fail(error))
    return command.main(words)


CASES = [
    ("options", 1, 2, "failed", "the mount is missing"),
    ("data", 1, 2, "failed", "the mount is missing"),
    ("network", 1, 1, "failed", "nobody thought of this"),
    ("checkpoint", 1, 2, "failed", "the mount is missing"),
    ("loader", 1, 2, "failed", "the mount is missing"),
    ("step", 1, 1, "failed", "nobody thought of this"),
    ("step", 0, 1, "failed", "nobody thought of this"),
    ("saving", 0, 2, "failed", "disk is full"),
    ("evaluation", 1, 1, "failed", "nobody thought of this"),
    ("killed in a step", 1, 75, "requeue", "is gone: its process has ended"),
    ("killed at the data", 1, 75, "requeue", "is gone: its process has ended"),  # nobody waits in a collective yet
    ("killed in the evaluation", 1, 75, "requeue", "is gone: its process has ended"),  # which has no time limit
]


@pytest.mark.parametrize(("place", "victim", "status", "state", "reason"), CASES)
def test_a_rank_that_fails_ends_all_with_its_reason(
    place, victim, status, state, reason, options, corpus, tmp_path, capfd, monkeypatch
):
    failed_at, run = tmp_path / "failed", tmp_path / "run"
    monkeypatch.setenv("FAILED_AT", str(failed_at))
    words = [*options, "--train.max_steps", "3", "--train.save_every_steps", "1", "--run_dir", str(run)]
    words += ["--eval.trials", f"{corpus}/test_list.txt", "--eval.root", str(corpus), "--eval.every_epochs", "0.6"]
    if place == "checkpoint":
        assert exit_statuses(2, _patched, "none", -1, [*words[:-2], "--train.max_steps", "1"]) == [0, 0]
    statuses = exit_statuses(2, _patched, place, victim, words)
    ended = time.time()
    assert ended - float(failed_at.read_text()) < FAIL_SECONDS
    survivors = [code for rank, code in enumerate(statuses) if not place.startswith("killed") or rank != victim]
    assert set(survivors) == {status}
    said = capfd.readouterr().err
    if victim >= 0 and place != "checkpoint":  # a run that was there before is left as it is
        found = read_state(run)
        assert found["state"] == state and reason in found["reason"] and "Traceback" not in found["reason"]
    told = [line for line in said.splitlines() if line.startswith("error: ") and reason in line]
    assert 1 <= len(told) <= (2 if victim else 1), said
    assert ("Traceback" in said) == (status == 1)


def test_three_ranks_end_alike_where_one_fails(options, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FAILED_AT", str(tmp_path / "failed"))
    words = [*options, "--data.speakers_per_batch", "12", "--train.max_steps", "3", "--run_dir", str(tmp_path / "run")]
    assert exit_statuses(3, _patched, "loader", 1, words) == [2, 2, 2]
    assert "are gone" not in capfd.readouterr().err


def _lost_in_a_meeting(rank: int) -> int:
    from spknet.parallel.ranks import RankLost, meet
    from spknet.parallel.together import gather_objects

    with meet(20):
        try:
            gather_objects(rank)
            if rank == 0:
                os._exit(0)
            gather_objects(rank)
        except RankLost:
            os._exit(75)
    return 0


def test_a_rank_that_is_gone_at_a_meeting_is_lost_and_no_mistake_of_the_user():
    assert exit_statuses(2, _lost_in_a_meeting, timeout=60) == [0, 75]


def test_a_run_with_loaders_ends_without_a_word_of_them(options, tmp_path, capfd):
    words = [*options, "--data.workers", "3", "--train.max_steps", "3", "--run_dir", str(tmp_path)]
    assert exit_statuses(1, _patched, "none", -1, words) == [0]
    said = capfd.readouterr().err
    assert "Exception ignored" not in said and "Traceback" not in said and "killed" not in said


def test_a_run_goes_on_from_an_older_checkpoint_under_another_spelling(options, tmp_path, monkeypatch):
    words = [*options, "--train.save_every_steps", "2", "--train.keep_checkpoints", "0"]
    words += ["--run_dir", str(tmp_path / "run"), "--train.max_steps"]
    assert exit_statuses(1, _patched, "none", -1, [*words, "6"]) == [0]
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    older = str(tmp_path / "link/checkpoints/step-00000004.pt")
    assert exit_statuses(1, _patched, "none", -1, [*words, "8", "--train.resume", older]) == [0]
    again = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [x["step"] for x in again] == list(range(1, 9))
    assert [x["loss"] for x in again[:6]] == [x["loss"] for x in lines]
    assert (tmp_path / "run/before-1/checkpoints/step-00000006.pt").exists()
    assert (tmp_path / "run/checkpoints/step-00000002.pt").exists()  # earlier ones stay


def _killed_loader(rank: int, words: list[str]) -> int:
    import multiprocessing
    import threading

    from spknet.train.__main__ import main

    def kill() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.1)
        time.sleep(0.5)
        multiprocessing.active_children()[0].kill()

    if rank == 0:
        threading.Thread(target=kill, daemon=True).start()
    return main(words)


def test_a_loader_that_is_killed_from_outside_asks_for_a_requeue(options, tmp_path, capfd):
    words = [*options, "--data.workers", "1", "--train.max_steps", "100000", "--run_dir", str(tmp_path)]
    assert exit_statuses(1, _killed_loader, words) == [75]
    assert "a loader process is gone" in capfd.readouterr().err
    assert read_state(tmp_path)["state"] == "requeue"


def test_a_loader_killed_while_it_hands_a_batch_over_is_lost_too():
    from spknet.data.batches import LoaderLost, of_loader

    error = ConnectionResetError(104, "Connection reset by peer")
    assert isinstance(of_loader(error, 2), LoaderLost) and of_loader(error, 0) is None


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_error_of_the_loader_is_told_in_its_own_words_and_ends_the_run(workers, options, corpus, tmp_path, capfd):
    import shutil

    shutil.copytree(corpus / "shards", tmp_path / "shards")
    for tar in (tmp_path / "shards").glob("*.tar"):
        with open(tar, "r+b") as file:
            file.truncate(2048)
    place = options.index("--data.train_shards") + 1
    words = [*options[:place], str(tmp_path / "shards"), *options[place + 1 :], "--data.workers", workers]
    words += ["--train.max_steps", "5", "--run_dir", str(tmp_path / "run")]
    assert exit_statuses(1, _patched, "none", -1, words, timeout=60) == [2]
    said = capfd.readouterr().err
    assert "error: " in said and ".tar" in said and "DataLoader worker process" not in said and "Traceback" not in said
    assert ".tar" in read_state(tmp_path / "run")["reason"]


def test_a_small_dev_shm_is_named_with_its_size_and_the_remedy(options, tmp_path, capfd, monkeypatch):
    from spknet.data import batches

    room = type("Room", (), {"total": 2**16, "free": 2**12})
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda _path: room)
    words = [*options, "--data.workers", "2", "--train.max_steps", "2", "--run_dir", str(tmp_path)]
    assert exit_statuses(1, _patched, "none", -1, words) == [2]
    assert "/dev/shm has 0.0 of 0.1 MiB free, and 2 loader processes need" in capfd.readouterr().err
    assert "--data.workers 0" in read_state(tmp_path)["reason"]


def test_a_rank_that_never_comes_is_named(options, tmp_path, capfd):
    words = [*options, "--train.timeout_seconds", "3", "--run_dir", str(tmp_path)]
    assert exit_statuses(2, _absent, words, timeout=60) == [2, 0]
    assert "rank 1 of 2 did not come to 127.0.0.1 within 3 s" in capfd.readouterr().err


def _absent(rank: int, words: list[str]) -> int:
    return _patched(rank, "none", -1, words) if rank == 0 else 0


def test_ranks_of_another_world_size_say_so(options, tmp_path, capfd):
    assert set(exit_statuses(2, _of_three, [*options, "--run_dir", str(tmp_path)], timeout=60)) == {2}
    assert "was started as one of 3" in capfd.readouterr().err


def _of_three(rank: int, words: list[str]) -> int:
    if rank == 1:
        os.environ["WORLD_SIZE"] = "3"
    return _patched(rank, "none", -1, [*words, "--train.timeout_seconds", "5"])


def test_a_reader_of_stderr_that_leaves_does_not_end_the_run(options, tmp_path):
    import subprocess

    command = [sys.executable, "-m", "spknet.train", *options, "--train.max_steps", "4", "--run_dir", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=Path(__file__).resolve().parents[2])
    process.stderr.close()
    assert process.wait(120) == 0
    assert read_state(tmp_path)["state"] == "done"


def _slow_evaluation(rank: int, words: list[str]) -> int:
    """spknet.train whose evaluation takes a minute; rank 1 gets SIGTERM two seconds into it."""
    import threading

    from spknet.evaluate import embed
    from spknet.train.__main__ import main

    real = embed._read_ahead

    def signal_myself() -> None:
        Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGTERM)

    def slowly(*arguments):
        if rank == 1:
            threading.Timer(2, signal_myself).start()
        for batch in real(*arguments):
            time.sleep(4)
            yield batch

    embed._read_ahead = slowly
    return main(words)


def test_a_signal_to_one_rank_stops_a_long_evaluation_and_loses_no_step(options, corpus, tmp_path, monkeypatch):
    run, signalled_at = tmp_path / "run", tmp_path / "signalled"
    monkeypatch.setenv("FAILED_AT", str(signalled_at))
    words = [*options, "--train.max_steps", "2", "--run_dir", str(run), "--eval.batch_seconds", "0.7"]
    words += ["--eval.trials", f"{corpus}/test_list.txt", "--eval.root", str(corpus)]
    assert exit_statuses(2, _slow_evaluation, words) == [75, 75]
    assert time.time() - float(signalled_at.read_text()) < 20  # of the 48 s and more that were left
    assert read_state(run)["state"] == "requeue" and (run / "checkpoints/step-00000002.pt").exists()
    assert exit_statuses(2, _patched, "none", -1, words) == [0, 0]
    lines = read_metrics(run / "metrics.jsonl")
    assert [(line["step"], "eval" in line) for line in lines] == [(1, False), (2, False), (2, True)]
