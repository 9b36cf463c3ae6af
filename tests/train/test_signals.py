"""Signals to ranks, to torchrun's agent and to everything at once; lost, stalled and disagreeing ranks."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spknet.train.metrics_log import read_metrics
from spknet.train.run_folder import read_state
from tests.ranks import free_port, run_ranks, train

ROOT = Path(__file__).resolve().parents[2]


def torchrun(words, run_dir, ranks=2, extra=(), **more):
    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        str(free_port()),
    ]
    command += ["--signals-to-handle", handled, "--shutdown-timeout", "60", *extra, "-m", "spknet.train", *words]
    command += ["--run_dir", str(run_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **more)


def descendants(pid):
    """Process ids below a process, its own last."""
    below = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        below += descendants(int(child))
    return [*below, pid]


def workers(pid):
    """The ranks of an agent, by rank."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        rank = [e.split("=")[1] for e in environment if e.startswith("RANK=")]
        if rank:
            found[int(rank[0])] = int(child)
    return found


def wait_for_step(run_dir, step, process, limit=120):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        assert process.poll() is None, process.stderr.read()
        path = run_dir / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in read_metrics(path)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached within {limit} s")


def finish(words, run_dir, process):
    """After the signal: the run says requeue and, started again, ends with each step once."""
    process.communicate(timeout=90)
    state = read_state(run_dir)
    assert state["state"] == "requeue" and state["step"] < 4000
    resumed = [*words[:-1], str(state["step"] + 3)]
    lines = train(2, [*resumed, "--run_dir", str(run_dir)])
    assert [line["step"] for line in lines] == list(range(1, state["step"] + 4))
    assert read_state(run_dir)["state"] == "done"


LONG = ["--train.save_every_minutes", "60", "--train.max_steps", "4000"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("target", ["worker", "agent", "tree"])
def test_a_signal_saves_and_asks_for_a_requeue(name, target, options, tmp_path):
    words, number = [*options, *LONG], getattr(signal, name)
    process = torchrun(words, tmp_path, start_new_session=True)
    wait_for_step(tmp_path, 3, process)
    targets = {"worker": [workers(process.pid)[1]], "agent": [process.pid], "tree": descendants(process.pid)}[target]
    for pid in targets:
        os.kill(pid, number)
    finish(words, tmp_path, process)


def test_a_signal_to_a_single_process_saves_and_exits_with_75(options, tmp_path):
    command = [sys.executable, "-m", "spknet.train", *options, *LONG, "--run_dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=60)[1]
    state = read_state(tmp_path)
    assert process.returncode == 75 and state["state"] == "requeue" and state["reason"] == "SIGUSR1"
    assert f"stopped by SIGUSR1 at step {state['step']}" in said
    assert (tmp_path / f"checkpoints/step-{state['step']:08d}.pt").exists() and not (tmp_path / "lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loaders", ["0", "1"])
def test_a_killed_rank_takes_the_group_back_to_the_last_checkpoint_and_the_run_goes_on(loaders, options, tmp_path):
    words = [*options, "--train.save_every_steps", "10", "--train.max_steps", "60", "--data.workers", loaders]
    process = torchrun(words, tmp_path / "a", extra=["--max_restarts", "2"])
    wait_for_step(tmp_path / "a", 15, process)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    lines = read_metrics(tmp_path / "a/metrics.jsonl")
    whole = train(2, [*words, "--run_dir", str(tmp_path / "b")])
    assert [(x["step"], x["loss"]) for x in lines] == [(x["step"], x["loss"]) for x in whole]
    assert read_state(tmp_path / "a")["state"] == "done"


def _status(rank, _world, words, changed):
    from spknet.train.__main__ import main

    return main([*words, *(changed if rank == 1 else [])])


def test_ranks_that_disagree_on_an_option_say_which(options, tmp_path, capfd):
    words = [*options, "--train.max_steps", "3", "--run_dir", str(tmp_path)]
    began = time.monotonic()
    assert run_ranks(2, _status, words, ["--optim.lr", "0.5"], join=False) == [2, 2]
    assert time.monotonic() - began < 60
    said = capfd.readouterr().err
    assert "ranks disagree on option optim.lr: rank 0" in said and "has 0.001, rank 1" in said
    assert read_state(tmp_path)["state"] == "failed"


def _of_threads(rank, _world, words):
    os.environ["OMP_NUM_THREADS"] = str(1 + rank)  # as an equal share is on nodes of other sizes
    return _status(rank, _world, words, [])


def test_ranks_of_other_numbers_of_threads_are_refused_with_the_option_that_makes_them_equal(options, tmp_path, capfd):
    place = options.index("--train.threads")
    words = [*options[:place], *options[place + 2 :], "--train.max_steps", "1", "--run_dir", str(tmp_path)]
    assert run_ranks(2, _of_threads, words, join=False) == [2, 2]
    said = capfd.readouterr().err
    assert "ranks disagree on CPU threads (--train.threads sets them): rank 0" in said and "has 1, rank 1" in said


def test_ranks_with_different_data_say_so(options, corpus, tmp_path, capfd):
    from shards.pack import pack

    rows = [line.split() for line in (corpus / "train_list.txt").read_text().splitlines()]
    pack([(s, p.removesuffix(".wav"), corpus / p) for s, p in rows[:-1]], tmp_path / "other", progress=False)
    place = options.index("--data.train_shards") + 1
    # The same option on both ranks, other bytes behind it: each rank sees its own file system.
    words = [*options[:place], str(tmp_path / "data"), *options[place + 1 :], "--run_dir", str(tmp_path / "run")]
    assert run_ranks(2, _other_data, words, str(tmp_path), options[place], join=False) == [2, 2]
    assert "ranks disagree on the training data" in capfd.readouterr().err


def _other_data(rank, _world, words, folder, original):
    from spknet.data import corpus as data
    from spknet.train.__main__ import main

    real = data.open_shards
    data.open_shards = lambda _path, **options: real(original if rank == 0 else folder + "/other", **options)
    return main(words)


@pytest.mark.slow
@pytest.mark.parametrize("save_every", ["0", "1"])
def test_a_stalled_rank_is_named_by_the_others(save_every, options, tmp_path):
    words = [
        *options,
        "--train.max_steps",
        "4000",
        "--train.timeout_seconds",
        "4",
        "--train.save_every_steps",
        save_every,
    ]
    process = torchrun(words, tmp_path, start_new_session=True)
    try:
        wait_for_step(tmp_path, 3, process)
        stopped = workers(process.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        end = time.monotonic() + 60
        while read_state(tmp_path)["state"] == "running" and time.monotonic() < end:
            time.sleep(0.2)
        state = read_state(tmp_path)
        assert state["state"] == "requeue"
        assert re.search(r"rank 1 \(.+\) is behind, last seen at step", state["reason"]), state["reason"]
        os.kill(stopped, signal.SIGCONT)
        process.communicate(timeout=90)
        assert process.returncode != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_loss_that_is_not_finite_stops_with_step_rank_and_utterances(options, tmp_path, capfd):
    words = [*options, "--train.save_every_steps", "2", "--run_dir", str(tmp_path)]
    train(2, [*words, "--train.max_steps", "2"])
    capfd.readouterr()
    bad = [*words, "--train.max_steps", "9", "--optim.lr", "1e200", "--train.resume_override", "true"]
    assert run_ranks(2, _status, bad, [], join=False) == [1, 1]
    said = capfd.readouterr().err
    assert "the loss of step " in said and "is nan on rank 0" in said and "id000" in said
    assert read_state(tmp_path)["state"] == "failed"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002.pt"]


def _spoilt(rank, _world, words):
    from spknet.train import trainer as train
    from spknet.train.__main__ import main

    real, calls = train.step_at_once, []

    def spoil(task, *arguments):
        found = real(task, *arguments)
        calls.append(1)
        if len(calls) == 4 and rank == 1:
            next(task.parameters()).grad.view(-1)[3] = float("inf")
        return found

    train.step_at_once = spoil
    return main(words)


def test_a_gradient_that_is_not_finite_is_not_stepped(options, tmp_path, capfd):
    words = [*options, "--train.save_every_steps", "1", "--train.keep_checkpoints", "1", "--train.max_steps", "9"]
    assert run_ranks(2, _spoilt, [*words, "--run_dir", str(tmp_path)], join=False) == [1, 1]
    assert "the gradient of step 3 is not finite, though its loss is" in capfd.readouterr().err
    assert read_state(tmp_path)["state"] == "failed"
    state = torch.load(tmp_path / "checkpoints/step-00000003.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def _unforeseen(words, status):
    from spknet.train import sidelines
    from spknet.train.__main__ import main

    def fail(*_):
        raise KeyError("something nobody thought of")

    sidelines.Sidelines.write_metrics = fail
    status.value = main(words)


def test_an_unforeseen_error_ends_the_process_with_its_loaders(options, tmp_path, capfd):
    context = multiprocessing.get_context("fork")
    status = context.Value("i", -1)
    words = [*options, "--data.workers", "2", "--train.max_steps", "50", "--run_dir", str(tmp_path)]
    process = context.Process(target=_unforeseen, args=(words, status))
    process.start()
    process.join(60)
    try:
        assert process.exitcode == 0 and status.value == 1
    finally:
        process.kill()
    assert "something nobody thought of" in capfd.readouterr().err
    assert read_state(tmp_path)["state"] == "failed"


def test_a_second_run_on_the_folder_stops_and_names_the_owner(options, tmp_path, capfd):
    command = [sys.executable, "-m", "spknet.train", *options, *LONG, "--run_dir", str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_step(tmp_path, 1, first)
        assert run_ranks(1, _status, [*options, *LONG, "--run_dir", str(tmp_path)], [], join=False) == [2]
        assert f"(pid {first.pid}, job None" in capfd.readouterr().err
        assert json.loads((tmp_path / "state.json").read_text())["state"] == "running"
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    assert read_state(tmp_path)["state"] == "requeue"
