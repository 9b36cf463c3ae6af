"""launch.submit and launch.task without a SLURM: what is refused before submitting, and what a task decides."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cluster, node, starts, submit
from launch.node import Node
from launch.processes import descendants
from launch.starts import newest_checkpoint_step
from launch.task import Place, RunFailed, Task, grace_seconds
from spknet import errors
from spknet.train.run_folder import read_state, write_state

ROOT = Path(__file__).resolve().parents[2]


NO_DATA = ["--skip-data-check"]


def submitted(capsys, *words) -> tuple[int, str]:
    """Exit status and what was said on stderr."""
    return submit.main([str(w) for w in words]), capsys.readouterr().err


def test_words_before_and_after_the_dashes_are_told_apart():
    assert cluster.split_words(["--nodes", "2", "--", "--config", "a", "--", "b"]) == (
        ["--nodes", "2"],
        ["--config", "a", "--", "b"],
    )
    assert cluster.split_words(["--nodes", "2"]) == (["--nodes", "2"], [])


def test_no_run_options_is_an_error_that_shows_where_they_go(capsys):
    status, said = submitted(capsys, "--nodes", 2)
    assert status == 2 and "give them after `--`" in said


def test_unknown_option_of_the_run_is_found_before_submitting(capsys, tmp_path):
    status, said = submitted(capsys, "--executor", "local", "--", "--run_dir", tmp_path / "run", "--optim.lrr", "0.1")
    assert status == 2 and "unknown option --optim.lrr; did you mean optim.lr?" in said
    assert not (tmp_path / "run").exists()


def test_unknown_recipe_is_found_before_submitting(capsys, tmp_path):
    status, said = submitted(
        capsys, "--executor", "local", "--", "--config", "fast_resnet43", "--run_dir", tmp_path / "run"
    )
    assert status == 2 and "fast_resnet43: no such file and no such recipe" in said


def test_missing_run_dir_is_an_error(capsys):
    status, said = submitted(capsys, "--executor", "local", "--", "--optim.lr", "0.1")
    assert status == 2 and "--run_dir is missing" in said


def test_batch_that_the_ranks_cannot_share_is_an_error_naming_both(capsys, tmp_path):
    words = ["--nodes", 3, "--gpus-per-node", 8, "--", "--run_dir", tmp_path, "--data.speakers_per_batch", 40]
    status, said = submitted(capsys, *words)
    assert (
        status == 2 and "data.speakers_per_batch=40 is not divisible by 24 ranks (3 nodes x 8); give 24 or 48" in said
    )


def test_signal_that_would_come_as_the_run_starts_is_an_error(capsys, tmp_path):
    status, said = submitted(capsys, "--hours", 0.04, "--signal-delay", 180, "--", "--run_dir", tmp_path)
    assert status == 2 and "--signal-delay 180 s does not fit in a time limit of 120 s" in said


def test_unwritable_run_folder_is_an_error(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, said = submitted(capsys, "--executor", "local", *NO_DATA, "--", "--run_dir", tmp_path / "file" / "run")
    assert status == 2 and f"cannot write to {tmp_path / 'file' / 'run'}: Not a directory" in said


def test_several_nodes_need_slurm(capsys, tmp_path):
    status, said = submitted(capsys, "--executor", "local", "--nodes", 2, *NO_DATA, "--", "--run_dir", tmp_path)
    assert status == 2 and "--executor local has one node, not 2" in said


def test_option_of_sbatch_without_a_value_is_an_error():
    import argparse

    parser = argparse.ArgumentParser()
    cluster.add_cluster_options(parser)
    options = parser.parse_args(["--slurm", "qos"])
    with pytest.raises(cluster.SubmitError, match="--slurm qos: expected KEY=VALUE"):
        cluster.slurm_parameters(options, "a", 0, 1)


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


def test_missing_submitit_is_an_error_with_the_command_that_installs_it(tmp_path):
    code = f"import sys; sys.modules['submitit'] = None\nfrom launch.submit import main\nmain(['--executor', 'local', '--skip-data-check', '--', '--run_dir', {str(tmp_path)!r}])"
    assert "submitit is not installed; `pip install 'spknet[launch]'`" in run_python(code).stderr


def test_machine_without_slurm_is_told_about_the_local_executor(tmp_path):
    code = f"from launch.submit import main; main(['--skip-data-check', '--', '--run_dir', {str(tmp_path)!r}])"
    said = run_python(code, PATH=str(tmp_path)).stderr
    assert "no SLURM here (sinfo, sbatch or srun not found); --executor local runs on this machine" in said


def test_slurm_parameters_ask_for_what_the_run_needs():
    import argparse

    parser = argparse.ArgumentParser()
    cluster.add_cluster_options(parser)
    words = "--nodes 4 --gpus-per-node 8 --partition gpu --hours 48 --account lab --mem-gb 1.5 --slurm qos=high"
    asked = cluster.slurm_parameters(parser.parse_args(words.split()), "a", workers=5, at_once=3)
    assert asked["nodes"] == 4 and asked["ntasks_per_node"] == 1 and asked["gpus_per_node"] == 8
    assert asked["cpus_per_task"] == 8 * (5 + 1) and asked["time"] == 48 * 60 and asked["mem"] == "1536M"
    assert asked["partition"] == "gpu" and asked["account"] == "lab" and asked["array_parallelism"] == 3
    assert asked["additional_parameters"] == {"requeue": True, "qos": "high"}
    assert asked["signal_delay_s"] == 180
    # Without --cpus-per-task for srun, all ranks and loaders of a node share one CPU where CPUs are bound.
    assert asked["srun_args"] == ["--kill-on-bad-exit=0", "--wait=8", "--cpus-per-task=48"]


def test_torchrun_meets_at_the_first_node_and_handles_every_signal_of_a_cluster():
    task = Task(["--config", "a"], "/runs/a", nodes=4, ranks_per_node=8, signal_delay=180)
    words = task.command(Place(node=2, head="gpu07", job="123456", executor="slurm"))
    pairs = dict(zip(words, words[1:]))
    assert pairs["--nnodes"] == "4" and pairs["--nproc-per-node"] == "8"
    assert pairs["--rdzv-backend"] == "c10d" and pairs["--rdzv-endpoint"] == f"gpu07:{15000 + 123456 % 15000}"
    assert pairs["--rdzv-conf"] == "is_host=0"
    assert pairs["--signals-to-handle"] == "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
    assert pairs["--shutdown-timeout"] == "160" and pairs["--log-dir"].startswith("/runs/a/jobs/")
    assert words[-4:] == ["-m", "spknet.train", "--config", "a"]


def test_saving_gets_the_signal_delay_less_twenty_seconds():
    assert grace_seconds(180) == 160
    assert grace_seconds(30) == 15  # a short delay is halved


def test_step_of_the_newest_checkpoint_is_read_from_its_name(tmp_path):
    assert newest_checkpoint_step(tmp_path) == 0
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-00000020.pt", "step-00000100.pt", "step-00000120.pt.tmp", "best.pt"):
        (tmp_path / "checkpoints" / name).write_text("")
    assert newest_checkpoint_step(tmp_path) == 100


def start_and_end(run: Path, ended: str, job: str = "7", blamed=()) -> str:
    """One start of a job; why there should be no other, or an empty string."""
    starts.note_start(run, job, ["gpu1", "gpu2"], {}, 4)
    starts.note_end(run, ended, list(blamed))
    return starts.without_progress(run)


def test_three_deaths_at_one_step_are_a_failure(tmp_path):
    assert [start_and_end(tmp_path, "died") for _ in range(2)] == ["", ""]
    assert start_and_end(tmp_path, "died") == "no progress: job 7 has started 3 times at step 0 and died each time"


@pytest.mark.parametrize(("ended", "limit"), [("signal", None), ("lost", None), ("stalled", 6)])
def test_preemption_and_lost_nodes_never_count_and_stalls_late(tmp_path, ended, limit):
    refused = [n for n in range(1, 8) if start_and_end(tmp_path, ended)]
    assert refused == ([] if limit is None else [n for n in range(1, 8) if n >= limit])


def test_progress_or_a_new_submission_counts_anew(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for step in (0, 0, 20, 20, 40):
        if step:
            (tmp_path / "checkpoints" / f"step-{step:08d}.pt").write_text("")
        assert start_and_end(tmp_path, "died") == ""
    assert start_and_end(tmp_path, "died") == ""
    assert start_and_end(tmp_path, "died", job="8") == ""
    noted = [s["step"] for s in json.loads((tmp_path / "launch.json").read_text())["starts"]]
    assert noted == [0, 0, 20, 20, 40, 40, 40]


def test_death_after_a_new_checkpoint_is_progress(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for _ in range(2):
        start_and_end(tmp_path, "died")
    starts.note_start(tmp_path, "7", ["gpu1"], {})
    (tmp_path / "checkpoints" / "step-00000010.pt").write_text("")
    starts.note_end(tmp_path, "died")
    assert starts.without_progress(tmp_path) == ""


def test_node_blamed_twice_is_bad(tmp_path):
    start_and_end(tmp_path, "died", blamed=["gpu2"])
    start_and_end(tmp_path, "lost", blamed=["gpu1"])
    assert starts.bad_nodes(tmp_path) == []
    start_and_end(tmp_path, "stalled", blamed=["gpu2"])
    assert starts.bad_nodes(tmp_path) == ["gpu2"]


@pytest.mark.parametrize(
    ("said", "ended"),
    [
        (None, "died"),
        ({"state": "running", "reason": ""}, "died"),
        ({"state": "requeue", "reason": "SIGUSR2"}, "signal"),
        ({"state": "requeue", "reason": "another rank is gone; the run continues (Connection reset by peer)"}, "died"),
        (
            {"state": "requeue", "reason": "no step finished within train.timeout_seconds=600; rank 3 is behind"},
            "stalled",
        ),
    ],
)
def test_why_a_start_ended_is_read_from_the_runs_last_word(said, ended):
    assert starts.cause(said) == ended


def test_variables_that_shape_communication_are_recorded_and_no_others(tmp_path):
    starts.note_start(tmp_path, "7", ["gpu1"], {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "ib0", "SECRET": "x"})
    assert starts.read_starts(tmp_path)[0]["environment"] == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "INFO"}


def test_what_an_earlier_start_left_in_state_json_does_not_count(tmp_path):
    write_state(tmp_path, "failed", 7, "a flat tyre")
    task = Task([], str(tmp_path))
    task._node = Node(str(tmp_path))
    assert task._state()["state"] == "running"
    write_state(tmp_path, "done", 9)
    assert task._state()["state"] == "done"


def test_signal_before_torchrun_has_started_requeues_the_task_as_it_was(tmp_path):
    task = Task(["--config", "a"], str(tmp_path), nodes=2, ranks_per_node=3, signal_delay=40)
    delayed = task.checkpoint()
    assert delayed.function == task and delayed.function is not task


def test_descendants_are_found_across_sessions():
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60'], start_new_session=True); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        assert descendants(parent.pid) == [child]
        assert child in descendants(os.getpid())
    finally:
        os.kill(child, signal.SIGKILL)
        parent.wait()


def test_a_run_that_cannot_start_fails_with_where_to_look(tmp_path):
    """Debug executor: torchrun's worker refuses its options before it has written any state."""
    task = Task(["--no.such", "option"], str(tmp_path), max_restarts=0)
    with pytest.raises(
        RunFailed, match="torchrun ended with status [12] before the run started; the job's log says why"
    ):
        task()
    assert read_state(tmp_path)["state"] == "failed"


@pytest.mark.parametrize("file", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda file: file.name)
def test_sbatch_files_are_clean(file):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    assert subprocess.run(["shellcheck", str(file)], capture_output=True, text=True).stdout == ""


def test_train_sbatch_asks_for_the_run_dir():
    done = subprocess.run(["bash", ROOT / "slurm" / "train.sbatch", "--config", "a"], capture_output=True, text=True)
    assert done.returncode == 2 and "train.sbatch: --run_dir DIR is missing" in done.stderr


@pytest.mark.parametrize(
    ("variables", "status", "said"),
    [
        (
            {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MAX": "3"},
            0,
            "--task 2/4 --out o",
        ),
        (
            {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MAX": "3"},
            2,
            "0-N without gaps",
        ),
        ({"SLURM_ARRAY_TASK_ID": "3", "TASKS": "16"}, 0, "--task 3/16 --out o"),
        ({"SLURM_ARRAY_TASK_ID": "16", "TASKS": "16"}, 2, "share 16 of TASKS=16: shares are counted from 0"),
        ({}, 0, "-m shards.pack --workers 4 --out o"),
    ],
)
def test_share_of_a_pack_task_is_never_guessed(variables, status, said):
    environment = {"PATH": os.environ["PATH"], "PYTHON": "echo", "SLURM_CPUS_PER_TASK": "4", **variables}
    command = ["bash", ROOT / "slurm/pack.sbatch", "--out", "o"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status and said in done.stdout + done.stderr


@pytest.mark.slow
def test_local_executor_goes_on_after_a_signal(tmp_path, options, capsys):
    """submitit's controller takes the place of SLURM: its task asks for another start by its exit status."""
    run = tmp_path / "run"
    cluster = ["--executor", "local", "--ranks-per-node", "2", "--hours", "0.5", "--signal-delay", "60"]
    assert submit.main([*cluster, "--", *options, "--run_dir", str(run), "--train.max_steps", "60"]) == 0
    controller = int(json.loads((run / "job.json").read_text())["job"])
    wait_for(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 5)
    (task,) = [pid for pid in descendants(controller) if b"submitit.core._submit" in command_line(pid)]
    os.kill(task, signal.SIGUSR2)
    wait_for(lambda: (read_state(run) or {})["state"] in ("done", "failed"))
    assert read_state(run)["state"] == "done"
    starts = [s["step"] for s in json.loads((run / "launch.json").read_text())["starts"]]
    assert len(starts) == 2 and starts[0] == 0 < starts[1] < 60
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


@pytest.mark.slow
def test_task_that_is_killed_leaves_no_process_behind(tmp_path, options):
    run = tmp_path / "run"
    words = [*options, "--run_dir", str(run), "--train.max_steps", "10000"]
    code = f"from launch.task import Task; Task({words!r}, {str(run)!r}, ranks_per_node=2)()"
    task = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text())
    below = descendants(task.pid)
    task.kill()
    task.wait()
    wait_for(lambda: not any(str(run).encode() in command_line(pid) for pid in below))  # a zombie has no command line
    said = read_state(run)
    assert said["state"] == "requeue" and newest_checkpoint_step(run) == said["step"] > 0


@pytest.mark.slow
def test_debug_executor_runs_in_front_and_tells_how_it_ended(tmp_path, options, capsys):
    words = ["--executor", "debug", "--max-restarts", "0", "--", *options, "--train.max_steps", "3"]
    assert submit.main([*words, "--run_dir", str(tmp_path / "good")]) == 0
    assert read_state(tmp_path / "good")["state"] == "done"
    words = ["--skip-data-check", *words, "--data.train_shards", str(tmp_path / "none")]
    assert submit.main([*words, "--run_dir", str(tmp_path / "bad")]) == 1
    assert f"{tmp_path / 'bad'} failed at step 0: " in capsys.readouterr().err


def wait_for(reached, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


@pytest.mark.parametrize("words", [[], ["runs/a"], ["--help"]])
def test_node_without_a_command_says_how_it_is_used(words, capsys):
    assert errors.run(node.main, words) == 2
    assert capsys.readouterr().err.startswith("error: usage: python -m launch.node RUN COMMAND")
