"""torchrun starts all ranks again after any error; a run that has ended for good makes it end, too."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spknet.parallel import torchrun
from spknet.train.run_folder import read_state

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


def test_a_program_that_runs_an_agent_inside_itself_is_left_alone(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("this test's parent is no torchrun"))
    torchrun.end()
