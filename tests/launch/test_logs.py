"""Logs of a run: which file, without progress bars, of one rank, followed; and what they say about killed ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import log_text, logs
from launch.status import last_lines
from spknet.train.run_folder import write_state

ROOT = Path(__file__).resolve().parents[2]
BARS = "\r".join(f"[rank 0]  {n}%|███▏      | {n}/60 [00:0{n % 9}<00:05,  4.89step/s, loss 2.7]" for n in range(9))
LOG = f"""launch: start of /runs/a, job 7, node 0
an earlier life
failed (exitcode: -9) local_rank: 0 (pid: 12) of binary: python
launch: start of /runs/a, job 7, node 0
{BARS}
[rank 0]
[rank 0] step 20: EER 12.00 %
[rank 1] error: x.tar is missing
failed (exitcode: -15) local_rank: 0 (pid: 13) of binary: python
failed (exitcode: -11) local_rank: 1 (pid: 14) of binary: python
       exitcode  : -9 (pid: 15)
"""


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of 2 nodes x 2 ranks in its second start."""
    folder = tmp_path / "jobs" / "7"
    for node in range(2):
        (folder / "ranks" / f"node{node}" / "7_x" / "attempt_0" / "1").mkdir(parents=True)
        (folder / "ranks" / f"node{node}" / "7_x" / "attempt_0" / "1" / "stderr.log").write_text(f"of node {node}\n")
    log = folder / "7_0_log.err"
    log.write_text(LOG)
    (tmp_path / "job.json").write_text(json.dumps({"job": "7", "executor": "local", "log": str(log), "time": 0}))
    starts = [{"job": "7", "step": 0, "nodes": ["a", "b"], "ranks_per_node": 2}]
    (tmp_path / "launch.json").write_text(json.dumps({"starts": starts}))
    return tmp_path


def test_progress_bars_are_left_out(run, capsys):
    assert logs.main([str(run)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "[rank 0] step 20: EER 12.00 %" in shown and not any("%|" in line or line == "[rank 0]" for line in shown)


def test_log_of_a_rank_is_that_of_its_node_and_process(run, capsys):
    assert logs.main([str(run), "--rank", "3"]) == 0
    assert capsys.readouterr().out == "of node 1\n"
    with pytest.raises(
        logs.LogError, match="rank 4 has written nothing yet, or there is none; the newest start has 4 ranks"
    ):
        logs.main([str(run), "--rank", "4"])


def test_folder_without_a_job_is_an_error(tmp_path):
    with pytest.raises(logs.LogError, match="no job of spknet submit or slurm/train.sbatch is noted here"):
        logs.main([str(tmp_path)])


def test_log_is_followed_until_the_run_has_ended(run):
    write_state(run, "running", 1)
    (run / "lock").write_text("{}")
    command = [sys.executable, "-m", "launch.logs", str(run), "--follow", "--lines", "1"]
    reader = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "exitcode" in reader.stdout.readline()
    with open(run / "jobs" / "7" / "7_0_log.err", "a") as log:
        log.write("[rank 0] one more\n")
    assert reader.stdout.readline() == "[rank 0] one more\n"
    write_state(run, "done", 2)
    assert reader.wait(60) == 0


def test_ranks_are_numbered_in_the_order_of_their_nodes_names(run, capsys):
    starts = [{"job": "7", "step": 0, "nodes": ["gpu9", "gpu10"], "ranks_per_node": 2}]  # SLURM's order
    (run / "launch.json").write_text(json.dumps({"starts": starts}))
    assert logs.main([str(run), "--rank", "3"]) == 0
    assert capsys.readouterr().out == "of node 0\n"


def test_signals_that_killed_ranks_of_the_newest_start_are_read_from_its_log(run):
    log = run / "jobs" / "7" / "7_0_log.err"
    assert log_text.killed_ranks(log) == [11]  # TERM is what torchrun sends to the rest
    assert log_text.error_line(log) == "x.tar is missing"


def test_end_of_a_failed_runs_log_is_of_its_newest_start(run):
    shown = last_lines(str(run / "jobs" / "7" / "7_0_log.err"), count=2).splitlines()[2:]
    assert [line.strip() for line in shown[:2]] == ["[rank 0] step 20: EER 12.00 %", "[rank 1] error: x.tar is missing"]
    assert "earlier life" not in last_lines(str(run / "jobs" / "7" / "7_0_log.err"))


def test_host_of_the_rank_that_began_it_is_read_from_the_reason():
    stalled = "no step finished within train.timeout_seconds=600; rank 13 (gpu2.lab) is behind, last seen at step 4"
    assert log_text.blamed_hosts(stalled) == ["gpu2.lab"]
    assert log_text.blamed_hosts("rank 1 (gpu1) is gone: its process has ended; the run continues") == ["gpu1"]
    assert log_text.blamed_hosts("ranks 8, 9 (gpu1, gpu2) are gone; the run continues") == ["gpu1", "gpu2"]
    assert log_text.blamed_hosts("SIGUSR2") == log_text.blamed_hosts("another rank is gone; the run continues") == []
