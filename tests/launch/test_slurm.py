"""Launching on a real SLURM: every command of docs/cluster.md, as written but for names and sizes, and what ends a job.

Each test says which lines of the page it runs; the last one holds them against the page. Runs are a small network on real
speech, 2 nodes x 1 rank where the page has 4 x 8.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import starts, status, submit
from launch.jobs import living_owner
from spknet.train.run_folder import read_state
from tests.launch.page import (
    ROOT,
    RUN,
    SPEECH,
    STEPS,
    documented,
    job_of,
    log_of,
    losses,
    page_commands,
    run_words,
    shell,
    wait_until_gone,
)
from tools import cluster_trials as trials

SANDBOX = ROOT.parent / "shared" / "cluster" / "slurm-sandbox"
ANSWERS = shutil.which("sinfo") and not subprocess.run(["sinfo", "-h"], capture_output=True).returncode

pytestmark = [
    pytest.mark.skipif(not ANSWERS, reason="no SLURM here: sinfo does not answer"),
    pytest.mark.skipif(not SPEECH.is_dir(), reason="no recordings beside the repository (shared/speech)"),
]
needs_the_nodes_processes = pytest.mark.skipif(
    not SANDBOX.exists(), reason="only where the nodes' processes are at hand: shared/cluster/slurm-sandbox"
)
FREE_SECONDS = 30  # from a death to the moment at which the nodes are free


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder in which the page's commands run as written: the code, data under the page's names, a small recipe."""
    where = tmp_path_factory.mktemp("slurm")
    (where / "slurm").symlink_to(ROOT / "slurm")
    shutil.copy(SPEECH / "train_list.txt", where)
    trials.few_trials(SPEECH, where).rename(where / "veri_test.txt")
    options: dict = {}
    for word in run_words(where / "x", where / "veri_test.txt"):
        key, value = word.removeprefix("--").split("=", 1)
        group, _, name = key.rpartition(".")
        if group and not key.startswith("data.train"):
            options.setdefault(group, {})[name] = yaml.safe_load(value)
    options["data"]["train_shards"], options["log"]["tensorboard"] = "data/vox2", False
    (where / "RECIPE.yaml").write_text(yaml.safe_dump(options))
    pack = shell(where, documented("job=$(sbatch --parsable --array=0-15 slurm/pack.sbatch") + "; echo $job").strip()
    merge = shell(where, documented("sbatch --dependency=afterok:$job slurm/pack.sbatch"), job=pack)
    wait_until_gone(merge.split()[-1])
    assert (where / "data" / "vox2" / "index" / "index.json").exists(), read_logs(where, pack)
    return where


def read_logs(checkout: Path, job: str) -> str:
    return "".join(path.read_text() for path in checkout.glob(f"*-{job}*.log"))


@pytest.fixture(scope="module")
def reference(checkout) -> Path:
    """runs/g: the run that nothing interrupts, two ranks of a torchrun on this machine."""
    line = documented("torchrun --signals-to-handle").replace(
        "torchrun ", "python -m torch.distributed.run --nproc-per-node 2 "
    )
    shell(checkout, line)
    assert len(losses(checkout / "runs" / "g")) == STEPS
    return checkout / "runs" / "g"


def assert_as_undisturbed(run: Path, reference: Path) -> None:
    """Every step once with the same loss, and the same bits of network, loss and optimizer at the end."""
    assert read_state(run)["state"] == "done" and losses(run) == losses(reference)
    assert trials.equal_weights(run, reference, STEPS)


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
def test_run_is_submitted_watched_cancelled_and_continued_and_no_second_one_touches_it(checkout, reference):
    """First launch, then launch and sbatch: both are refused. Cancelled and submitted again, it ends as if nothing had been."""
    run = checkout / "runs" / "a"
    first = documented("spknet submit --nodes 4 --gpus-per-node 8 --partition gpu --hours 48")
    shell(checkout, first)
    job = job_of(run)
    said = refusal(checkout, first)
    assert f"{run} belongs to job {job} (" in said and re.search(r"\((PENDING|CONFIGURING|RUNNING)\)", said)
    second = shell(
        checkout,
        documented("sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 48 slurm/train.sbatch").replace(
            "runs/e", "runs/a"
        ),
    )
    trials.wait_for("training", 180, lambda: trials.last_step(run) >= 8)
    wait_until_gone(second.split()[-1])
    assert trials.lives(second.split()[-1]) == ["FAILED"]
    assert f"belongs to job {job} (RUNNING)" in read_logs(checkout, second.split()[-1])
    assert read_state(run)["state"] == "running"
    follower = subprocess.Popen(
        [sys.executable, "-m", "launch.logs", "runs/a", "--follow"], cwd=checkout, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    RUN.add("spknet logs runs/a --follow")
    shell(checkout, documented("spknet cancel runs/a"))
    wait_until_gone(job)
    assert trials.lives(job)[-1].startswith("CANCELLED") and len(trials.lives(job)) == 1
    found = status.statuses(run)[0]
    saved = trials.last_step(run)
    assert found.state == "cancelled" and f"continues it at step {saved}" in found.reason
    assert follower.wait(60) == 0 and "stopped by" in follower.stdout.read()
    shell(checkout, documented("spknet resubmit runs/a --hours 72"))
    assert job_of(run) != job
    assert "1 done" in shell(checkout, documented("spknet status runs/a --watch").replace("--watch", "--watch 1"))
    wait_until_gone(job_of(run))
    assert [s["step"] for s in json.loads((run / "launch.json").read_text())["starts"]] == [0, saved]
    assert_as_undisturbed(run, reference)


def refusal(checkout: Path, line: str) -> str:
    """What a command that must fail says."""
    with pytest.raises(AssertionError) as failed:
        shell(checkout, line)
    return str(failed.value)


@pytest.mark.slow
def test_sbatch_run_survives_a_signal_and_no_second_one_touches_it(checkout, reference):
    """First sbatch, then launch and sbatch: both are refused; USR2 is saved, and the end has the undisturbed run's bits."""
    run = checkout / "runs" / "e"
    first = documented("sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 48 slurm/train.sbatch")
    job = shell(checkout, first).split()[-1]
    submit_it = documented("spknet submit --nodes 4 --gpus-per-node 8 --partition gpu --hours 48").replace(
        "runs/a", "runs/e"
    )
    assert f"belongs to job {job} (" in refusal(checkout, submit_it)  # queued, or running for a moment
    trials.wait_for("training", 180, lambda: trials.last_step(run) >= 8)
    second = shell(checkout, first).split()[-1]
    wait_until_gone(second)
    assert f"belongs to job {job} (RUNNING)" in read_logs(checkout, second)
    trials.command("scancel", "--signal=USR2", job)
    wait_until_gone(job)
    assert trials.lives(job) == ["REQUEUED", "COMPLETED"], read_logs(checkout, job)
    assert_as_undisturbed(run, reference)
    assert json.loads((run / "launch.json").read_text())["starts"][0]["ended"] == "signal"
    job = shell(
        checkout,
        documented("sbatch --gpus-per-node 8 --cpus-per-task 24 slurm/evaluate.sbatch") + " --out out --no_pictures",
    ).split()[-1]
    wait_until_gone(job)
    assert trials.lives(job) == ["COMPLETED"] and (checkout / "out" / "report.json").exists(), read_logs(checkout, job)


@pytest.mark.slow
@needs_the_nodes_processes
def test_killed_torchrun_frees_the_nodes_at_once_and_shards_are_staged_at_each_start(checkout, reference):
    run = checkout / "runs" / "d"
    shell(checkout, documented("spknet submit --nodes 4 --gpus-per-node 8 --stage /local/cache"))
    job = job_of(run)
    trials.wait_for("training", 180, lambda: trials.last_step(run) >= trials.SAVE_EVERY)
    seconds = trials.kill_part("torchrun", 1)(job)
    assert seconds < FREE_SECONDS
    wait_until_gone(job)
    assert trials.lives(job) == ["REQUEUED", "COMPLETED"]
    started = json.loads((run / "launch.json").read_text())["starts"]
    assert [s["step"] for s in started] == [0, trials.SAVE_EVERY] and started[0]["ended"] == "died"
    assert log_of(run, ".out").count("cache: ") == 2  # shards.stage's last line, once a start
    assert_as_undisturbed(run, reference)


@pytest.mark.slow
def test_setup_dependency_and_a_following_evaluation(checkout, reference):
    earlier = trials.command("sbatch", "--parsable", "--output=/dev/null", "--wrap=true")
    line = documented("spknet submit --gpus-per-node 4 --setup").replace("812", earlier)
    shell(checkout, line + " --train.max_steps 4")
    line = documented("spknet submit --gpus-per-node 8 --evaluate").replace("--root", "--no_pictures --root")
    said = shell(checkout, line + " --train.max_steps 4")
    evaluation = re.search(r"then its evaluation: (\d+)", said)[1]
    wait_until_gone(job_of(checkout / "runs" / "b"))
    shown = trials.command("scontrol", "show", "job", job_of(checkout / "runs" / "b"))
    assert "MailUser=me@site.org" in shown and "MailType=" in shown
    assert (
        "export LOADED=cuda"
        in (checkout / "runs" / "b").joinpath("jobs").glob("*/*_submission.sh").__next__().read_text()
    )
    wait_until_gone(evaluation)
    assert trials.lives(evaluation) == ["COMPLETED"]
    report = json.loads((checkout / "runs" / "c" / "evaluation" / "report.json").read_text())
    assert report["checkpoint"]["step"] == 4 if "checkpoint" in report else report


@pytest.mark.slow
def test_srun_with_one_task_a_rank_is_the_same_run(checkout, reference):
    shell(
        checkout,
        documented("srun --nodes 4 --ntasks-per-node 8").replace("--nodes 4", "--nodes 1") + " --train.max_steps 10",
    )
    assert losses(checkout / "runs" / "f") == losses(reference)[:10]


@pytest.mark.slow
def test_shares_of_a_pack_are_run_again_shards_staged_and_errors_never_requeued(checkout):
    job = shell(checkout, documented("TASKS=16 sbatch")).split()[-1]
    wait_until_gone(job)
    assert trials.lives(job) == ["COMPLETED"], read_logs(checkout, job)
    refused = shell(checkout, documented("TASKS=16 sbatch").replace("TASKS=16 ", "")).split()[-1]
    line = documented("sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 48 slurm/train.sbatch").replace(
        "runs/e", "runs/bad"
    )
    bad = shell(checkout, line.replace("--nodes 4", "--nodes 1") + " --data.train_shards data/none").split()[-1]
    job = shell(
        checkout,
        documented("sbatch --nodelist 'gpu[01-04]'")
        .replace("slurm/stage", "--cpus-per-task 1 slurm/stage")
        .replace("/local/cache", "staged"),
    ).split()[-1]
    wait_until_gone(refused)
    assert "to run some shares again give TASKS=n" in read_logs(checkout, refused)
    wait_until_gone(job)
    assert trials.lives(job) == ["COMPLETED"] and list((checkout / "staged").rglob("*.tar")), read_logs(checkout, job)
    wait_until_gone(bad)  # an error of the run: failed, with its reason, and never requeued
    assert trials.lives(bad) == ["FAILED"] and "data/none" in read_state(checkout / "runs" / "bad")["reason"]


@pytest.mark.slow
def test_sweep_of_twelve_with_every_kind_of_end(checkout, monkeypatch):
    """Some done, one failing, one killed as for memory, the rest cancelled: only these are submitted again."""
    text = re.search(r"```yaml\n(# my_sweep.yaml.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)[1]
    for name, here in {
        **{
            "recipe: fast_resnet34_angleproto": "recipe: RECIPE.yaml",
            "voxceleb1/test/wav": f"{SPEECH}, train.max_steps: 3",
        },
        **{
            "gpus-per-node: 1, hours: 24, partition: gpu": "hours: 0.2, signal-delay: 60, cpus-per-rank: 1, max-restarts: 0"
        },
    }.items():
        assert name in text
        text = text.replace(name, here)
    (checkout / "my_sweep.yaml").write_text(text)
    folder = checkout / "runs" / "my_sweep"
    assert shell(checkout, documented("spknet sweep my_sweep.yaml --dry-run")).count("missing  submit") == 12
    failing, killed = "loss=angleproto,M=2,lr=0.001,seed=0", "loss=angleproto,M=2,lr=0.001,seed=1"
    (folder / failing / "metrics.jsonl").mkdir(parents=True)
    shell(checkout, documented("spknet sweep my_sweep.yaml"))
    number = job_of(folder / failing).split("_")[0]
    trials.wait_for("the second run", 120, lambda: living_owner(folder / killed))
    os.kill(living_owner(folder / killed)["pid"], signal.SIGKILL)
    ended = lambda state: [s.name for s in status.statuses(folder) if s.state == state]  # noqa: E731
    trials.wait_for("some that are done", 120, lambda: len(ended("done")) >= 2 and failing in ended("failed"))
    shell(checkout, documented("spknet cancel runs/my_sweep"))
    wait_until_gone(number)
    # The killed run's lock is on another node: it counts as living until 35 s have passed without a sign of life.
    trials.wait_for("locks that are stale", 90, lambda: not ended("running"))
    states = {s.name: s for s in status.statuses(folder)}
    done = ended("done")
    assert states[failing].state == "failed" and "metrics.jsonl" in states[failing].reason
    assert {s.state for s in states.values()} <= {"done", "failed", "cancelled"} and len(states) == 12
    (folder / failing / "metrics.jsonl").rmdir()
    said = shell(checkout, documented("spknet sweep my_sweep.yaml --runs-per-job 4"))
    assert f"{12 - len(done)} of 12 runs submitted" in said
    assert "Packed" not in said and "nothing to submit" in shell(
        checkout, documented("spknet sweep my_sweep.yaml --runs-per-job 4")
    )
    wait_until_gone(job_of(folder / failing).split("_")[0])
    assert len(ended("done")) == 12
    shutil.rmtree(folder / killed)
    assert "1 of 12 runs submitted" in shell(checkout, documented("spknet resubmit runs/my_sweep"))
    wait_until_gone(job_of(folder / killed))
    shutil.rmtree(folder / failing)
    assert "1 of 12 runs submitted" in shell(checkout, documented("spknet sweep my_sweep.yaml --executor local"))
    trials.wait_for("the run on this machine", 120, lambda: len(ended("done")) == 12)
    assert "12 done" in shell(checkout, documented("spknet status runs/my_sweep"))
    table = shell(checkout, documented("spknet results runs/my_sweep"))
    assert len([line for line in table.splitlines() if "| 3 |" in line]) == 4  # settings, three seeds each
    for setting in {name.rsplit(",seed=", 1)[0] for name in states}:
        logs = [(folder / f"{setting},seed={s}" / "metrics.jsonl").read_text() for s in range(3)]
        eers = [json.loads(line)["eval"]["eer"] for log in logs for line in log.splitlines() if "eval" in line]
        loss, utterances, rate = (part.split("=")[1] for part in setting.split(","))
        assert f"| {loss} | {utterances} | {rate} | 3 | {sum(eers) / 3:.4g} |" in table


@pytest.mark.slow
@needs_the_nodes_processes
def test_2_nodes_of_2_ranks_go_on_bit_equal_after_a_signal_and_after_a_lost_node(checkout):
    whole, run = checkout / "runs" / "four", checkout / "runs" / "i"
    words = run_words(run, checkout / "veri_test.txt")
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [*agent, "-m", "spknet.train", *words[:-1], f"--run_dir={whole}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    job = trials.submit_run(words, "--ranks-per-node", "2", "--hours", "0.5", "--signal-delay", "60")
    trials.wait_for("training", 180, lambda: trials.last_step(run) >= 5)
    trials.command("scancel", "--signal=USR2", job)
    trials.wait_for("a second start", 120, lambda: len(starts_of(run)) == 2)
    trials.wait_for("a checkpoint", 180, lambda: trials.last_step(run) >= trials.SAVE_EVERY + 1)
    lost = starts_of(run)[-1]["nodes"][0]  # and with it the batch script, which asks for the requeue
    assert trials.fail_node(SANDBOX, lost)(job) < FREE_SECONDS
    wait_until_gone(job)
    first, second, _ = starts_of(run)
    assert (first["ended"], first["blamed"]) == ("signal", [])
    assert second["blamed"] == [lost] and second["ended"] in ("lost", "died")  # whether SLURM saw it first
    assert_as_undisturbed(run, whole)


@pytest.mark.slow
@needs_the_nodes_processes
def test_node_on_which_a_rank_died_twice_is_left_out_and_named(checkout):
    """Of two ranks on one node one is killed in each life, until some node has been blamed twice."""
    run = checkout / "runs" / "h"
    words = [*run_words(run, checkout / "veri_test.txt", steps=40), "--train.save_every_steps=2", f"--run_dir={run}"]
    usual = ["--nodes", "1", "--ranks-per-node", "2", "--hours", "0.5", "--signal-delay", "60", "--max-restarts", "0"]
    job, blamed = trials.submit_run(words, *usual), []
    while len(blamed) == len(set(blamed)):
        life = len(blamed) + 1
        trials.wait_for(f"start {life}", 120, lambda n=life: len(starts_of(run)) == n)
        begun = starts_of(run)[-1]
        trials.wait_for("a checkpoint of it", 120, lambda at=begun["step"]: starts.newest_checkpoint_step(run) > at)
        os.kill(trials.victim(job, "rank", 0), signal.SIGKILL)
        trials.wait_for("its end", 60, lambda n=life: "ended" in starts_of(run)[n - 1])
        assert starts_of(run)[-1]["blamed"] == begun["nodes"] and starts_of(run)[-1]["ended"] == "died"
        blamed += begun["nodes"]
    wait_until_gone(job)
    assert starts_of(run)[-1]["nodes"] != blamed[-1:] and read_state(run)["state"] == "done"
    assert f"leaves out {blamed[-1]}: blamed for two ends of this run" in log_of(run)


def starts_of(run: Path) -> list[dict]:
    return starts.read_starts(run)


def test_installed_sweep_of_the_page_is_accepted(checkout):
    line = documented("spknet sweep paper_grid").replace("--gpus-per-node 1", "--dry-run --skip-data-check")
    assert "63 of 63 runs would be submitted" in shell(checkout, line)


@pytest.mark.slow
def test_trials_of_the_page_print_their_table(checkout, tmp_path):
    line = documented("python -m tools.cluster_trials").replace("--out trials", f"--out {tmp_path}/trials --only none")
    line = line.replace("../shared", str(SPEECH.parent)).replace("--steps 80", "--steps 5")
    assert "| none | COMPLETED | 0 | done | yes | equal | equal |" in shell(checkout, line)


@pytest.mark.slow
def test_every_command_of_the_page_is_run_above():
    assert [line for line in page_commands() if line not in RUN] == []
