"""torchrun starts all ranks again after any error; a run that has ended for good makes it end, too."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spknet.parallel import torchrun
from spknet.parallel.process import started as started_at
from spknet.train.metrics_log import read_metrics
from spknet.train.run_folder import read_state
from tests.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "said"), [("none", "error: none"), ("cut", ".tar")])
def test_a_run_that_is_refused_or_fails_is_started_once(shards, said, options, corpus, tmp_path):
    """Refused by all ranks, or failed in the first step by one that cannot read its tar."""
    shutil.copytree(corpus / "shards", tmp_path / "cut")
    for tar in (tmp_path / "cut").glob("*.tar"):
        os.truncate(tar, 2048)
    words = ["--data.train_shards", shards if shards == "none" else str(tmp_path / shards)]
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    logs = ["--log-dir", str(tmp_path / "logs"), "--redirects", "3"]
    command = [sys.executable, *agent, *logs, "-m", "spknet.train", *options, *words]
    done = subprocess.run([*command, "--run_dir", str(tmp_path / "run")], cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == 1
    assert [path.name for path in tmp_path.glob("logs/*/attempt_*")] == ["attempt_0"]
    told = "".join(path.read_text() for path in tmp_path.glob("logs/*/attempt_0/*/stderr.log"))
    assert told.count("error: ") in (1, 2) and said in told  # by rank 0, and by another that alone knows it
    assert read_state(tmp_path / "run")["state"] == "failed"


# Starts a command, writes its process number, and adopts what it leaves behind, as SLURM's step and some inits do.
ADOPTER = """
import ctypes, os, subprocess, sys
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
print(subprocess.Popen(sys.argv[1:], stdout=sys.stderr).pid, flush=True)
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("adopted", [False, True])
def test_ranks_whose_torchrun_died_before_they_had_met_end_and_say_so(adopted, options, tmp_path):
    """It holds their store: without a look at it they would wait as long as train.timeout_seconds says."""
    words = [*options, "--train.timeout_seconds", "600", "--run_dir", str(tmp_path / "run")]
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*([sys.executable, "-c", ADOPTER] if adopted else []), *agent, "-m", "spknet.train", *words]
    with open(tmp_path / "said", "w") as said:
        started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True)
    pid = int(started.stdout.readline()) if adopted else started.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    ranks, until = [], time.monotonic() + 100
    while len(ranks) < 2 and time.monotonic() < until:
        ranks = [int(rank) for rank in children.read_text().split()]
    os.kill(pid, signal.SIGKILL)
    assert len(ranks) == 2
    while any(started_at(rank) for rank in ranks) and time.monotonic() < until:
        time.sleep(0.2)
    waiting = [rank for rank in ranks if started_at(rank)]
    for rank in waiting:
        os.kill(rank, signal.SIGKILL)
    started.wait(60)
    assert not waiting
    assert "torchrun has died before the ranks had met" in (tmp_path / "said").read_text()


def _waits(for_ranks: int, run: Path, agents: list[subprocess.Popen]) -> int:
    """Waits until the newest step was one of so many ranks; that step."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        lines = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        if lines and len(lines[-1]["rank_seconds"]) == for_ranks:
            return lines[-1]["step"]
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.5)
    pytest.fail(f"no step of {for_ranks} ranks; state: {read_state(run)}")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_torchrun_that_joins_and_leaves_changes_the_ranks_and_none_looks_finished(options, tmp_path):
    """docs/elastic.md, a changing number of machines: two agents of one rank each."""
    where = ["--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "a"]
    where += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1", "--max-restarts", "10"]
    where += ["--rdzv-conf", "last_call_timeout=3"]  # each round waits 30 s for others otherwise
    words = ["-m", "spknet.train", *options, "--train.max_steps", "100000", "--run_dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "torch.distributed.run", *where, *words]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = []
    try:
        for ranks in (1, 2):
            agents.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL))
            joined = _waits(ranks, tmp_path / "run", agents)
        agents[1].terminate()
        assert agents[1].wait(120) == 1
        alone = _waits(1, tmp_path / "run", agents[:1])
        agents[0].terminate()
        assert agents[0].wait(120) == 1
    finally:
        for agent in agents:
            agent.kill()
    state = read_state(tmp_path / "run")
    assert state["state"] == "requeue" and state["step"] >= alone >= joined > 1
    steps = [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_program_that_runs_an_agent_inside_itself_is_left_alone(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("this test's parent is no torchrun"))
    torchrun.end()
