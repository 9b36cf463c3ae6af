"""Launching on a real SLURM: wherever `sinfo` answers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import status, submit, sweep
from spknet.train.run_folder import read_state
from tools import cluster_trials as trials

ROOT = Path(__file__).resolve().parents[2]
SPEECH = ROOT.parent / "shared" / "speech"
ANSWERS = shutil.which("sinfo") and not subprocess.run(["sinfo", "-h"], capture_output=True).returncode

pytestmark = [
    pytest.mark.skipif(not ANSWERS, reason="no SLURM here: sinfo does not answer"),
    pytest.mark.skipif(not SPEECH.is_dir(), reason="no recordings beside the repository (shared/speech)"),
]
STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    """A run of 2 nodes x 1 rank that nothing interrupts, submitted by launch.submit."""
    words = run_words(folder / "undisturbed")
    outcome = trials.run_trial("none", ["--hours", "0.5"], None, words, folder / "undisturbed")
    assert outcome.states == ["COMPLETED"] and outcome.good
    return folder / "undisturbed"


def run_words(run: Path, steps: int = STEPS) -> list[str]:
    return trials.words(SPEECH, run, steps, trials.few_trials(SPEECH, run.parent))


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["accuracy"]) for line in trials.trained(run)]


def wait_until_gone(job: str, seconds: float = 180) -> None:
    trials.wait_for(f"the end of job {job}", seconds, lambda: not trials.in_queue(job))
    # What sacct says lags behind the queue.
    trials.wait_for("sacct", 30, lambda: trials.lives(job)[-1] not in ("RUNNING", "PENDING", "COMPLETING"))


def submitted(capsys, *words) -> tuple[int, str]:
    return submit.main([str(w) for w in words]), capsys.readouterr().err


def test_unknown_partition_is_an_error_naming_those_there_are(tmp_path, capsys):
    status_, said = submitted(capsys, "--partition", "gpuu", "--skip-data-check", "--", "--run_dir", tmp_path)
    assert status_ == 2 and "unknown partition gpuu; this cluster has high, low, main" in said


def test_slurm_that_does_not_answer_is_an_error_with_its_words(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.conf").write_text("")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "empty.conf"))
    status_, said = submitted(capsys, "--skip-data-check", "--", "--run_dir", tmp_path)
    assert status_ == 2 and "SLURM does not answer: " in said and "--executor local" in said


def test_what_sbatch_refuses_is_shown(tmp_path, capsys):
    status_, said = submitted(capsys, "--mem-gb", 9999, "--skip-data-check", "--", "--run_dir", tmp_path)
    assert status_ == 2 and "sbatch refused: " in said and "node configuration is not available" in said


@pytest.mark.slow
def test_two_nodes_log_the_losses_of_torchrun_on_one_machine_and_evaluate(folder, undisturbed):
    run = folder / "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, "-m", "spknet.train", *run_words(run)], cwd=ROOT, check=True, capture_output=True)
    assert losses(undisturbed) == losses(run) and len(losses(run)) == STEPS
    report = json.loads((undisturbed / "eval" / f"step-{STEPS:08d}" / "report.json").read_text())
    assert report == json.loads((run / "eval" / f"step-{STEPS:08d}" / "report.json").read_text())
    record = json.loads((undisturbed / "record.json").read_text())
    assert record["hosts"] == ["node1", "node2"] and record["job"] and record["command"] and record["packages"]["torch"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["signal USR2", "scontrol requeue"])
def test_interrupted_run_ends_as_if_nothing_had_happened(folder, undisturbed, kind):
    cluster, interrupt = trials.interruptions(None)[kind]
    outcome = trials.run_trial(kind, cluster, interrupt, run_words(folder / kind.replace(" ", "-")), undisturbed)
    assert outcome.states == ["REQUEUED", "COMPLETED"]
    # Every step done before the signal was saved: the second life begins where the first stopped, not at a multiple of 20.
    assert outcome.starts[0] == 0 and outcome.starts[1] >= trials.SAVE_EVERY // 2
    assert outcome.good


@pytest.mark.slow
def test_cancelled_run_has_saved_and_is_not_requeued(folder):
    run = folder / "cancelled"
    job = trials.submit_run(run_words(run, steps=10**4), "--hours", "0.5", "--signal-delay", "60")
    trials.wait_for("training", 180, lambda: trials.last_step(run) >= 5)
    trials.command("scancel", job)
    wait_until_gone(job)
    assert trials.lives(job)[-1].startswith("CANCELLED") and len(trials.lives(job)) == 1
    said = read_state(run)
    assert said["state"] == "requeue" and (run / "checkpoints" / f"step-{said['step']:08d}.pt").exists()
    found = status.run_status(run, status.slurm_jobs())
    assert found.state == "failed" and "CANCELLED" in found.reason


@pytest.mark.slow
def test_sweep_of_four_with_one_failure_runs_only_that_one_again(folder, capsys):
    """The failing run's list of training files is not there at first."""
    later = folder / "later.txt"
    common = [word for word in run_words(folder / "x", steps=10) if not word.startswith("--run_dir")]
    runs = [{"loss.name": name, "train.seed": seed} for name in ("angleproto", "softmax") for seed in (0, 1)]
    runs[3]["data.train_list"] = str(later)
    path = folder / "four.yaml"
    cluster = {"cpus-per-rank": 1, "hours": 0.5, "signal-delay": 60, "max-restarts": 0}
    path.write_text(yaml.safe_dump({"runs": runs, "at-once": 2, "cluster": cluster}, sort_keys=False))
    command = [str(path), "--dir", str(folder / "four"), "--", *common]
    bad = "loss=softmax,seed=1,train_list=later.txt"
    good = ["loss=angleproto,seed=0", "loss=angleproto,seed=1", "loss=softmax,seed=0"]

    assert sweep.main(command) == 0
    assert "4 of 4 runs submitted, 2 at once" in capsys.readouterr().out
    assert {s.state for s in status.statuses(folder / "four")} <= {"queued", "running"}
    assert sweep.main(command) == 0
    assert "nothing to submit" in capsys.readouterr().out  # while they are queued
    job = json.loads((folder / "four" / bad / "job.json").read_text())["job"]
    wait_until_gone(job.split("_")[0])
    found = {s.name: s for s in status.statuses(folder / "four")}
    assert [found[name].state for name in good] == ["done"] * 3 and found[good[0]].eer is not None
    assert found[bad].state == "failed" and "later.txt" in found[bad].reason
    assert "later.txt" in status.last_lines(found[bad].log)
    trials.wait_for("sacct", 30, lambda: trials.lives(job)[-1] != "RUNNING")
    assert trials.lives(job) == ["FAILED"]  # and never requeued

    shutil.copy(SPEECH / "train_list.txt", later)
    capsys.readouterr()
    assert sweep.main(command) == 0
    assert "1 of 4 runs submitted" in capsys.readouterr().out
    wait_until_gone(json.loads((folder / "four" / bad / "job.json").read_text())["job"])
    assert {s.state for s in status.statuses(folder / "four")} == {"done"}


def sbatch(checkout: Path, *words: str) -> str:
    """Submit from a checkout; the job's id."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sbatch", "--parsable", *words], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def log_of(checkout: Path, job: str) -> str:
    return "".join(path.read_text() for path in checkout.glob(f"*-{job}*.log"))


@pytest.fixture(scope="module")
def checkout(folder) -> Path:
    """A clean checkout of what is committed, with a small list and packed shards, all made through the sbatch files."""
    where = folder / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(where)], check=True)
    lines = (SPEECH / "train_list.txt").read_text().splitlines(keepends=True)
    (where / "list.txt").write_text("".join(lines[:120]))
    words = [
        "slurm/pack.sbatch",
        "--list",
        "list.txt",
        "--root",
        str(SPEECH),
        "--out",
        "shards-120",
        "--shard-bytes",
        "3000000",
    ]
    job = sbatch(where, "--array=0-1", "--cpus-per-task=1", *words)
    merge = sbatch(where, f"--dependency=afterok:{job}", "slurm/pack.sbatch", "--out", "shards-120", "--merge")
    wait_until_gone(merge)
    assert (where / "shards-120" / "index" / "index.json").exists(), log_of(where, job) + log_of(where, merge)
    return where


@pytest.mark.slow
def test_pack_and_stage_sbatch_run_from_a_clean_checkout(checkout):
    meta = json.loads((checkout / "shards-120" / "index" / "index.json").read_text())
    assert sum(entry["nsamples"] for entry in meta["shardlist"]) == 120 and len(meta["shardlist"]) > 1
    job = sbatch(checkout, "--nodes=2", "--cpus-per-task=1", "slurm/stage.sbatch", "shards-120", "cache")
    wait_until_gone(job)
    assert trials.lives(job) == ["COMPLETED"], log_of(checkout, job)
    assert len(list((checkout / "cache").rglob("*.tar"))) == len(meta["shardlist"])


@pytest.mark.slow
def test_train_sbatch_survives_a_signal_and_evaluate_sbatch_reads_its_run(checkout, undisturbed):
    run = checkout / "runs" / "a"
    job = sbatch(checkout, "--nodes=2", "--cpus-per-task=1", "slurm/train.sbatch", *run_words(run))
    trials.wait_for("training", 180, lambda: trials.last_step(run) >= 10)
    trials.command("scancel", "--signal=USR2", job)
    wait_until_gone(job)
    assert trials.lives(job) == ["REQUEUED", "COMPLETED"], log_of(checkout, job)
    assert read_state(run)["state"] == "done" and losses(run) == losses(undisturbed)
    assert trials.equal_weights(run, undisturbed, STEPS)
    listed = ["--trials", str(trials.few_trials(SPEECH, run.parent)), "--root", str(SPEECH), "--out", "out"]
    words = ["--checkpoint", "runs/a", "--crop_seconds", "0.5", "--threads", "1", "--no_pictures", *listed]
    job = sbatch(checkout, "--nodes=2", "--cpus-per-task=1", "slurm/evaluate.sbatch", *words)
    wait_until_gone(job)
    scores = (checkout / "out" / "scores.txt").read_bytes()
    assert scores == (undisturbed / "eval" / f"step-{STEPS:08d}" / "scores.txt").read_bytes(), log_of(checkout, job)


@pytest.mark.slow
def test_srun_with_one_task_a_rank_is_the_same_run(checkout, undisturbed):
    run = checkout / "runs" / "srun"
    job = sbatch(checkout, "--ntasks-per-node=2", "--cpus-per-task=1", "slurm/train.sbatch", *run_words(run, steps=10))
    wait_until_gone(job)
    assert trials.lives(job) == ["COMPLETED"], log_of(checkout, job)
    assert losses(run) == losses(undisturbed)[:10]


@pytest.mark.slow
def test_train_sbatch_does_not_requeue_a_run_that_failed(checkout):
    run = checkout / "runs" / "bad"
    job = sbatch(
        checkout, "--cpus-per-task=1", "slurm/train.sbatch", *run_words(run), "--data.train_list=no_such_list.txt"
    )
    wait_until_gone(job)
    assert trials.lives(job) == ["FAILED"] and "is 'failed'" in log_of(checkout, job)
    assert "no_such_list.txt" in read_state(run)["reason"]
