"""All that can be known before a run is queued is said before it is queued."""

import fcntl
import json
import os
import socket
from pathlib import Path

import pytest
import yaml

from launch import checks, submit, sweep
from launch.cluster import SubmitError
from spknet.options import parse, recipe_names

HERE = ["--executor", "local"]
ROOT = Path(__file__).resolve().parents[2]


def refused(capsys, cluster: list, *run_words) -> str:
    """What launch.submit says on stderr of what it does not submit."""
    assert submit.main([*map(str, cluster), "--", *map(str, run_words)]) == 2
    return capsys.readouterr().err


def test_missing_data_are_found_before_submitting(capsys, tmp_path, options):
    run = ["--run_dir", tmp_path / "run"]
    assert "give the training data as --data.train_shards" in refused(capsys, HERE, *run)
    assert str(tmp_path / "none") in refused(capsys, HERE, *options, *run, "--data.train_shards", tmp_path / "none")
    loose = ["--data.train_list", tmp_path / "no_list.txt", "--data.train_root", tmp_path]
    assert "no_list.txt" in refused(capsys, HERE, *run, *loose)
    assert not (tmp_path / "run").exists()


def test_trial_lists_are_read_before_submitting(capsys, tmp_path, options, corpus):
    words = [*options, "--run_dir", tmp_path / "run", "--eval.root", corpus]
    assert "veri.txt" in refused(capsys, HERE, *words, "--eval.trials", tmp_path / "veri.txt")
    (tmp_path / "veri.txt").write_text("1 id00000/session0/00000.wav id00000/session9/00000.wav\n0 a.wav b.wav\n")
    said = refused(capsys, HERE, *words, "--eval.trials", tmp_path / "veri.txt")
    assert "line 1: id00000/session9/00000.wav not found" in said
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "list.txt").write_text((corpus / "test_list.txt").read_text())
    lists = f"[{tmp_path}/a/list.txt, {tmp_path}/b/list.txt]"
    assert "two lists are called 'list'" in refused(capsys, HERE, *words, "--eval.trials", lists)


def test_loss_that_does_not_take_so_many_utterances_is_found_before_submitting(capsys, tmp_path, options):
    words = [*options, "--run_dir", tmp_path / "run", "--loss.name", "ge2e", "--data.utterances_per_speaker", 1]
    assert "data.utterances_per_speaker 1: ge2e takes" in refused(capsys, HERE, *words)


def test_sweep_is_checked_run_by_run_dry_or_not(capsys, tmp_path, options):
    path = tmp_path / "my.yaml"
    losses = [{"loss.name": "angleproto"}, {"loss.name": "ge2e", "data.utterances_per_speaker": 1}]
    path.write_text(yaml.safe_dump({"grid": {"loss": losses}}, sort_keys=False))
    for dry in ([], ["--dry-run"]):
        assert sweep.main([str(path), "--dir", str(tmp_path / "out"), *HERE, *dry, "--", *options]) == 2
        assert "run loss=ge2e,M=1: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dry_run_of_one_run_checks_and_prints_its_command(capsys, tmp_path, options):
    words = ["--dry-run", *HERE, "--", *options, "--run_dir", str(tmp_path / "a run")]
    assert submit.main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("would be submitted to local: spknet train --data.train_shards ")
    assert f"--run_dir '{tmp_path}/a run'" in said and not (tmp_path / "a run").exists()


@pytest.mark.parametrize(
    ("cluster", "run_words", "said"),
    [
        (["--slurm", "time=5"], [], "--slurm time=5: launch sets time itself; use --hours"),
        (["--slurm", "gpus_per_task=1"], [], "launch sets gpus-per-task itself; use --gpus-per-node"),
        (["--slurm", "qos"], [], "--slurm qos: expected KEY=VALUE"),
        (["--env", "NCCL_DEBUG"], [], "--env NCCL_DEBUG: expected KEY=VALUE"),
        (["--gpus-per-node", 4, "--ranks-per-node", 8], [], "8 ranks a node on 4 GPUs"),
        ([], ["--train.device", "cuda"], "--train.device cuda without --gpus-per-node"),
        (["--cpus-per-rank", 2], ["--train.threads", 4], "--train.threads 4 on --cpus-per-rank 2"),
        ([], ["--run_dir", "/tmp/run-%j"], "--run_dir /tmp/run-%j holds a %"),
    ],
)
def test_what_does_not_fit_the_cluster_is_named(capsys, tmp_path, cluster, run_words, said):
    words = ["--run_dir", tmp_path / "run", "--data.speakers_per_batch", 64, *run_words]
    assert said in refused(capsys, ["--skip-data-check", *cluster], *words)


@pytest.mark.parametrize("option", ["--nodes", "--ranks-per-node", "--cpus-per-rank", "--signal-delay"])
def test_zero_is_refused_where_at_least_one_is_needed(capsys, option):
    with pytest.raises(SystemExit):
        submit.main([option, "0", "--", "--run_dir", "a"])
    assert "expected a whole number, at least 1, found '0'" in capsys.readouterr().err


def test_run_that_a_living_process_trains_is_refused_and_left_as_it_is(capsys, tmp_path, options):
    me = {"host": socket.gethostname(), "pid": os.getpid(), "job": None}
    (tmp_path / "lock").write_text(json.dumps(me))
    before = sorted(p.name for p in tmp_path.iterdir())
    said = refused(capsys, HERE, *options, "--run_dir", tmp_path)
    assert f"{tmp_path} belongs to a run on {me['host']} (pid {me['pid']}, job None)" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    (tmp_path / "lock").write_text(json.dumps({**me, "pid": 4194304}))  # above the largest pid: dead
    checks.check_free(tmp_path)


def test_of_two_submissions_at_one_moment_the_second_is_refused(tmp_path):
    with open(tmp_path / "submit.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(SubmitError, match="is being submitted by another process"),
            submit.only_submission(tmp_path),
        ):
            pass
    with submit.only_submission(tmp_path):
        pass


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name != "small_corpus"])
def test_recipes_fit_8_to_64_ranks(recipe, tmp_path):
    config = parse(["--config", recipe])
    fitting = [ranks for ranks in (8, 16, 32, 64) if config.data.speakers_per_batch % ranks == 0]
    # A network's recipe leaves the batch to that of the loss.
    assert fitting == [8, 16, 32, 64] or config.data.speakers_per_batch == parse([]).data.speakers_per_batch
