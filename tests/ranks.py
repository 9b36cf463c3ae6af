"""Real gloo ranks for tests: forked processes, so that torch is not imported again in each."""

import contextlib
import multiprocessing
import os
import socket
import time
import traceback


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def set_environment(rank: int, world_size: int, port: int) -> None:
    """What torchrun would set for a rank on this machine."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )


def _child(function, arguments, rank, world_size, port, pipe, join):
    set_environment(rank, world_size, port)
    from spknet.parallel import ranks as distributed

    group = distributed.ranks(device="cpu", threads=1, timeout_seconds=60) if join else contextlib.nullcontext()
    try:
        with group:
            pipe.send((True, function(rank, world_size, *arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def run_ranks(world_size: int, function, *arguments, timeout: float = 240.0, join: bool = True) -> list:
    """[function(rank, world_size, *arguments) of each rank], every rank a process of one gloo group.

    join=False: the ranks only get torchrun's environment, and the function joins (as spknet.train does).
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(function, arguments, rank, world_size, port, theirs, join))
        process.start()
        pipes.append(ours)
        processes.append(process)
    results = []
    for rank, pipe in enumerate(pipes):
        assert pipe.poll(timeout), f"rank {rank} of {world_size} said nothing for {timeout} s"
        results.append(pipe.recv())
    for process in processes:
        process.join(30)
        if process.is_alive():
            process.kill()
    failed = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(results) if not good]
    assert not failed, "\n".join(failed)
    return [value for _, value in results]


def exit_statuses(world_size: int, function, *arguments, timeout: float = 120.0) -> list[int]:
    """Exit status of each rank of function(rank, *arguments); a rank may end itself. All must have ended by `timeout` s."""
    context, port = multiprocessing.get_context("fork"), free_port()

    def child(rank):
        set_environment(rank, world_size, port)
        os._exit(function(rank, *arguments))

    processes = [context.Process(target=child, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not alive, f"ranks {alive} of {world_size} were still there after {timeout} s"
    return [process.exitcode for process in processes]


def train(world_size: int, words: list[str], **options) -> list[dict]:
    """spknet.train with these words on W ranks; the lines of its metrics.jsonl. Every rank must end with status 0."""
    from spknet.train.metrics_log import read_metrics

    statuses = run_ranks(world_size, _train, words, join=False, **options)
    assert statuses == [0] * world_size
    return read_metrics(words[words.index("--run_dir") + 1] + "/metrics.jsonl")


def _train(_rank, world_size, words):
    from spknet.train.__main__ import main

    if world_size == 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    return main(words)
