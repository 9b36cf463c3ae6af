"""Which device and how many threads a rank takes, and what is said where ranks cannot meet."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spknet.parallel import ranks
from spknet.parallel.ranks import RankError, Ranks, from_environment, meeting, threads_of
from spknet.parallel.together import PIECE, barrier, gather_objects, on_first
from spknet.parallel.watchdog import Watchdog
from tests.ranks import exit_statuses, free_port, run_ranks, set_environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpus(monkeypatch):
    """Lets torch see so many GPUs."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


def test_each_rank_takes_the_gpu_of_its_number(gpus):
    gpus(4)
    assert ranks._device("auto", Ranks(5, 8, 1, 4)) == torch.device("cuda", 1)


def test_a_task_that_sees_one_gpu_of_its_own_takes_it(gpus, monkeypatch):
    # srun --gpus-per-task=1 and MIG: every task sees one device, as number 0.
    gpus(1)
    monkeypatch.setenv("SLURM_PROCID", "1")
    for visible in ("1", "MIG-GPU-8932f937/1/0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert ranks._device("auto", Ranks(1, 2, 1, 2)) == torch.device("cuda", 0)


def test_more_ranks_than_gpus_is_an_error_that_says_how_many(gpus, monkeypatch):
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    gpus(1)
    with pytest.raises(RankError, match="rank 1 is number 1 on .*, which has 1 GPUs; start at most that many"):
        ranks._device("auto", Ranks(1, 2, 1, 2))


def test_no_gpu_is_the_cpu_or_an_error_where_one_is_asked_for(gpus):
    gpus(0)
    assert ranks._device("auto", Ranks()) == torch.device("cpu")
    with pytest.raises(RankError, match="torch sees no GPU here"):
        ranks._device("cuda", Ranks())


def test_threads_are_an_equal_share_or_what_the_user_has_set(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for word, threads in ((None, 4), ("3", 3), ("2,1", 2), ("0", 4), ("many", 4), ("1", 1)):
        if word is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", word)
        assert threads_of(Ranks(0, 4, 0, 4)) == threads, word


SCRIPT = """
import multiprocessing
import os
import signal
os.sched_getaffinity = lambda pid: set(range(16))
from spknet.parallel.ranks import meet, threads_of
with meet(60) as me:
    os.write(1, f"threads {threads_of(me)};".encode())
"""


@pytest.mark.parametrize(("said", "threads"), [(None, "8"), ("1", "1"), ("3", "3")])
def test_the_one_thread_that_torchrun_sets_by_itself_does_not_count(said, threads, tmp_path):
    script = tmp_path / "threads.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}
    environment |= {} if said is None else {"OMP_NUM_THREADS": said}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == 2 * f"threads {threads};", done.stdout + done.stderr


def test_half_a_set_of_variables_is_named():
    with pytest.raises(RankError, match="RANK and WORLD_SIZE are set, but MASTER_ADDR and MASTER_PORT not"):
        from_environment({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(RankError, match="RANK=2 of WORLD_SIZE=2"):
        from_environment({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    with pytest.raises(RankError, match="WORLD_SIZE='two'"):
        from_environment({"RANK": "0", "WORLD_SIZE": "two"})
    with pytest.raises(RankError, match="WORLD_SIZE='.u00b2'|WORLD_SIZE='²'"):  # a digit, and no number
        from_environment({"RANK": "0", "WORLD_SIZE": "²"})
    with pytest.raises(RankError, match="RANK=0 of WORLD_SIZE=10000000"):
        from_environment({"RANK": "0", "WORLD_SIZE": "10000000", "MASTER_ADDR": "a", "MASTER_PORT": "1"})


def test_more_threads_than_any_machine_has_are_refused(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "999999999")
    with pytest.raises(RankError, match="OMP_NUM_THREADS=999999999 in the environment; expected at most 1024"):
        threads_of(Ranks())


def test_an_interactive_shell_of_a_job_is_alone_and_srun_needs_no_scontrol():
    shell = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert from_environment(dict(shell)) is None
    two = dict(shell, SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NODELIST="n[07-08]", SLURM_LOCALID="0")
    assert from_environment(two)["world_size"] == 2 and two["MASTER_ADDR"] == "n07"
    assert 15000 <= int(two["MASTER_PORT"]) < 30000


@pytest.mark.parametrize(("word", "counts"), [("4", [4]), ("4(x2),1", [4, 4, 1]), ("2,3(x2)", [2, 3, 3])])
def test_tasks_of_uneven_nodes_are_counted_node_by_node(word, counts):
    assert ranks._tasks_per_node(word) == counts


def _occupied(rank: int, port: int) -> int:
    os.environ["MASTER_PORT"] = str(port)
    try:
        with ranks.meet(3):
            return 0
    except RankError as error:
        return 2 if "is in use" in str(error) else 3


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert exit_statuses(1, _occupied, taken.getsockname()[1]) == [0]  # one rank needs none
        statuses = exit_statuses(2, _occupied, taken.getsockname()[1], timeout=60)
    assert statuses[0] == 2 and statuses[1] in (2, 3)


def _exchanged(rank: int, world: int) -> list:
    """What 3 ranks tell each other, larger than the store takes at once; and how many entries are left in it."""
    told = [gather_objects(bytes([rank]) * size) for size in (0, PIECE - 3, 2 * PIECE + 1, 10)]
    shared = on_first("making much", lambda: list(range(3_000_000)))  # 9 MB
    barrier()
    barrier()
    barrier()
    right = [
        told[k] == [bytes([r]) * size for r in range(world)] for k, size in enumerate((0, PIECE - 3, 2 * PIECE + 1, 10))
    ]
    return [right, shared == list(range(3_000_000)), meeting().store.num_keys()]


def test_ranks_tell_each_other_more_than_the_store_takes_at_once_and_leave_nothing_there():
    every = run_ranks(3, _exchanged)
    assert [found[:2] for found in every] == [[[True] * 4, True]] * 3
    assert every[0][2] < 30  # of 12 rounds with 3 pieces and more


def _waits_with_a_store_that_falls_silent(rank: int, port: int) -> None:
    set_environment(rank, 2, port)
    with ranks.meet(6):
        watchdog = Watchdog(report=lambda failure: None).start()
        watchdog.says("waiting", step=1)  # before the last sign of life of the other rank, and the store
        time.sleep(2)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)


def test_a_rank_that_asks_who_is_behind_as_the_store_falls_silent_ends_all_the_same(capfd):
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [context.Process(target=_waits_with_a_store_that_falls_silent, args=(rank, port)) for rank in (0, 1)]
    for process in processes:
        process.start()
    processes[1].join(30)
    for process in processes:
        process.kill()
    assert processes[1].exitcode == 75
    assert "rank 1 has not reached the other ranks (127.0.0.1:" in capfd.readouterr().err
