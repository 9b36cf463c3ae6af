"""Sweeps, their status and their results, on run folders written by hand."""

import csv
import io
import json
import os
import time
from pathlib import Path

import pytest
import yaml

from launch import results, status, sweep
from launch.submit import SubmitError
from spknet.errors import run
from spknet.train.run_folder import write_state

HERE = ["--executor", "local", "--skip-data-check"]
GRID = {
    "recipe": "fast_resnet34_angleproto",
    "grid": {
        "loss": [{"loss.name": "angleproto"}, {"loss.name": "ge2e", "data.utterances_per_speaker": 3}],
        "train.seed": [0, 1],
    },
}


def write_run(folder: Path, state: str, steps=(), evaluation=None, reason="") -> None:
    """A run folder as the trainer leaves it: 8 x 2 utterances a step, 50 steps an epoch, 4 epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    write_state(folder, state, steps[-1] if steps else 0, reason)
    lines = [{"step": s, "epoch": s / 50, "loss": 1.0, "utterances_per_second": 32.0} for s in steps]
    lines += [{"step": steps[-1], "epoch": steps[-1] / 50, "eval": evaluation}] if evaluation else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"train": {"epochs": 4, "max_steps": None}, "data": {"speakers_per_batch": 8, "utterances_per_speaker": 2}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def note_job(folder: Path, job: str, executor: str = "slurm", log: Path | None = None, age: float = 0.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    note = {"job": job, "executor": executor, "log": str(log), "time": time.time() - age}
    (folder / "job.json").write_text(json.dumps(note))


def write_sweep(folder: Path, runs: dict[str, dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    said = {name: {"overrides": overrides, "words": []} for name, overrides in runs.items()}
    (folder / "sweep.json").write_text(json.dumps({"runs": said}))


def sweep_file(tmp_path: Path, content: dict) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_grid_is_every_combination_and_names_say_what_varies():
    runs = sweep.plan(GRID, [])
    assert [run.name for run in runs] == [
        "loss=angleproto,seed=0",
        "loss=angleproto,seed=1",
        "loss=ge2e,M=3,seed=0",
        "loss=ge2e,M=3,seed=1",
    ]
    assert runs[3].words == [
        *("--config=fast_resnet34_angleproto", "--loss.name=ge2e"),
        *("--data.utterances_per_speaker=3", "--train.seed=1"),
    ]


def test_listed_runs_get_the_grid_and_constant_options_are_not_named():
    listed = [{"optim.lr": 0.01, "optim.name": "sgd"}, {"optim.lr": -1, "optim.name": "sgd"}]
    runs = sweep.plan(
        {"runs": listed, "grid": {"train.seed": [4]}, "options": {"train.epochs": 2}}, ["--log.every_steps=1"]
    )
    assert [run.name for run in runs] == ["lr=0.01,seed=4", "lr=-1,seed=4"]
    assert runs[0].words[:2] == ["--train.epochs=2", "--log.every_steps=1"]


def test_recipes_as_axes_come_before_every_other_option():
    grid = {"train.seed": [1], "recipe.network": ["vgg_m_40"], "recipe.loss": ["loss_ge2e"]}
    (one,) = sweep.plan({"recipe": "base", "grid": grid, "options": {"train.epochs": 2}}, [])
    assert one.name == "seed=1,network=vgg_m_40,loss=loss_ge2e"
    recipes = ["--config=base", "--config=vgg_m_40", "--config=loss_ge2e"]
    assert one.words == [*recipes, "--train.epochs=2", "--train.seed=1"]


def test_values_of_any_type_reach_the_command_line():
    (one,) = sweep.plan(
        {"runs": [{"train.compile": True, "data.train_shards": ["a/x", "b/y"], "eval.trials": None}]}, []
    )
    assert one.words == ["--train.compile=true", '--data.train_shards=["a/x", "b/y"]', "--eval.trials=null"]


def test_runs_that_no_name_tells_apart_are_an_error():
    with pytest.raises(SubmitError, match="two runs are called b=veri.txt"):
        sweep.plan({"grid": {"b.name": ["x/veri.txt", "y/veri.txt"]}}, [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"recipe": "a"}, "expected `grid:`"),
        ({"grid": {"train.seed": 3}}, "grid: train.seed: expected a list of values"),
        ({"grid": {"train.seed": [3]}, "reciep": "a"}, "unknown key 'reciep'; expected recipe, options"),
        ({"grid": {"train.sed": [3]}}, "run sed=3: unknown option --train.sed; did you mean train.seed?"),
    ],
)
def test_mistakes_in_a_sweep_file_are_named(tmp_path, capsys, content, said):
    path = sweep_file(tmp_path, content)
    assert sweep.main([str(path), "--dir", str(tmp_path / "out"), *HERE]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        ({"nods-per-rank": 2}, "my.yaml, cluster: unknown option 'nods-per-rank'; expected executor, nodes"),
        ({"executor": "slrum"}, "invalid choice: 'slrum'"),
    ],
)
def test_mistakes_in_the_cluster_options_of_a_sweep_are_named(tmp_path, capsys, cluster, said):
    path = sweep_file(tmp_path, {"grid": {"train.seed": [3]}, "cluster": cluster})
    try:
        assert sweep.main([str(path)]) == 2
    except SystemExit as left:
        assert left.code == 2
    assert said in capsys.readouterr().err


def test_command_line_beats_the_cluster_options_of_a_sweep(tmp_path, capsys):
    path = sweep_file(tmp_path, {**GRID, "cluster": {"nodes": 3, "slurm": ["qos=a", "nice=1"]}, "at-once": 2})
    words = [str(path), "--dir", str(tmp_path / "out"), "--dry-run", *HERE]
    assert sweep.main(words) == 2
    assert "--executor local has one node, not 3" in capsys.readouterr().err
    assert sweep.main([*words, "--nodes", "1", "--at-once", "5"]) == 0
    assert "5 at once" in capsys.readouterr().out


def test_unknown_sweep_names_those_installed(capsys):
    assert sweep.main(["paper_gird"]) == 2
    assert "installed sweeps: paper_grid" in capsys.readouterr().err


def test_dry_run_says_what_would_be_submitted_and_writes_nothing(tmp_path, capsys):
    path = sweep_file(tmp_path, {**GRID, "at-once": 3})
    assert sweep.main([str(path), "--dir", str(tmp_path / "out"), "--dry-run", *HERE]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 runs would be submitted, 3 at once" in said and "--loss.name=angleproto --train.seed=0" in said
    assert not (tmp_path / "out").exists()


def test_only_missing_and_failed_runs_would_be_submitted_again(tmp_path, capsys):
    out = tmp_path / "out"
    write_run(out / "loss=angleproto,seed=0", "done", [200])
    write_run(out / "loss=angleproto,seed=1", "failed", [100], reason="a flat tyre")
    write_run(out / "loss=ge2e,M=3,seed=0", "running", [100])
    note_job(out / "loss=ge2e,M=3,seed=0", job=str(os.getpid()), executor="local", age=60)
    assert sweep.main([str(sweep_file(tmp_path, GRID)), "--dir", str(out), "--dry-run", *HERE]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if "seed=" in line}
    assert lines["loss=angleproto,seed=0"] == ["done"]
    assert lines["loss=angleproto,seed=1"] == ["failed", "submit"]
    assert lines["loss=ge2e,M=3,seed=0"] == ["running"]
    assert lines["loss=ge2e,M=3,seed=1"] == ["missing", "submit"]


def test_installed_sweep_of_the_paper_fits_the_options(tmp_path):
    content = sweep.read_sweep(sweep.sweep_path("paper_grid"))
    runs = sweep.plan(content, [])
    seeds = len(content["grid"]["train.seed"])
    assert seeds == 3 and len(runs) == 3 * len(content["grid"]["recipe.loss"]) * seeds
    from spknet.options import parse

    for one in runs[::seeds]:
        parse(one.words)


@pytest.mark.slow
def test_sweep_on_this_machine_runs_one_after_another(tmp_path, options):
    path = sweep_file(tmp_path, {"grid": {"train.seed": [0, 1]}, "cluster": {"executor": "local", "hours": 0.5}})
    out = tmp_path / "out"
    assert sweep.main([str(path), "--dir", str(out), "--at-once", "1", "--", *options, "--train.max_steps=2"]) == 0
    deadline = time.monotonic() + 120
    while any(s.state in status.ACTIVE for s in status.statuses(out)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [s.state for s in status.statuses(out)] == ["done", "done"]
    first_end = json.loads((out / "seed=0" / "state.json").read_text())["time"]
    assert json.loads((out / "seed=1" / "launch.json").read_text())["starts"][0]["time"] > first_end


@pytest.mark.parametrize(
    ("in_slurm", "said", "expected"),
    [
        ("PENDING", None, "queued"),
        ("RUNNING", None, "running"),
        ("RUNNING", "running", "running"),
        ("PENDING", "requeue", "requeued"),
        ("COMPLETING", "requeue", "requeued"),
        ("PENDING", "running", "requeued"),  # a node died
        (None, "done", "done"),
        ("RUNNING", "failed", "failed"),
    ],
)
def test_state_comes_from_the_run_and_from_slurm(tmp_path, in_slurm, said, expected):
    note_job(tmp_path, "12_3", age=60)
    if said:
        write_run(tmp_path, said, [50])
    assert status.run_status(tmp_path, {"12_3": in_slurm} if in_slurm else {}).state == expected


def test_reason_that_will_not_pass_by_itself_is_shown(tmp_path):
    note_job(tmp_path, "12_3", age=60)
    assert "queued (PartitionConfig)" in status.table(
        [status.run_status(tmp_path, {"12_3": "PENDING|PartitionConfig"})]
    )
    assert "queued (" not in status.table([status.run_status(tmp_path, {"12_3": "PENDING|Resources"})])


def test_failure_of_an_earlier_submission_is_not_that_of_the_new_one(tmp_path):
    write_run(tmp_path, "failed", [50], reason="a flat tyre")
    note_job(tmp_path, "12_3", age=-1)
    assert status.run_status(tmp_path, {"12_3": "PENDING"}).state == "queued"


def test_job_that_ended_without_a_word_is_a_failure_that_says_so(tmp_path):
    write_run(tmp_path, "running", [50])
    note_job(tmp_path, "4194304", executor="local", age=60)  # above the largest pid
    found = status.run_status(tmp_path, {})
    # No checkpoint was written: it would begin anew, whatever step it had reached.
    said = f"job 4194304 ended (gone); `spknet resubmit {tmp_path}` continues it at step 0"
    assert found.state == "failed" and found.reason == said


def test_run_without_a_launcher_lives_while_its_lock_is_fresh(tmp_path):
    write_run(tmp_path, "running", [50])
    assert "no sign of life; the same command continues it at step 0" in status.run_status(tmp_path, None).reason
    (tmp_path / "lock").write_text("{}")
    assert status.run_status(tmp_path, None).state == "running"


@pytest.mark.parametrize(
    ("word", "expected", "reason"),
    [
        ("CANCELLED by 1000|", "cancelled", "job 12_3 was cancelled"),
        ("FAILED|exit code 1:0", "failed", "job 12_3 ended (FAILED, exit code 1:0)"),
        ("OUT_OF_MEMORY|exit code 0:125", "failed", "ended (OUT_OF_MEMORY, exit code 0:125)"),
        ("TIMEOUT|", "failed", "ended (TIMEOUT)"),
        ("NODE_FAIL|", "failed", "ended (NODE_FAIL)"),
    ],
)
def test_ends_are_told_apart_by_slurms_own_word(tmp_path, word, expected, reason):
    write_run(tmp_path, "requeue", [50], reason="SIGTERM")
    note_job(tmp_path, "12_3", age=60)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000040.pt").write_text("")
    found = status.run_status(tmp_path, {"12_3": word})
    assert found.state == expected and reason in found.reason
    assert found.reason.endswith(f"`spknet resubmit {tmp_path}` continues it at step 40")  # of the checkpoint, not 50


def test_rank_killed_by_the_kernel_is_named_with_its_signal(tmp_path):
    write_run(tmp_path, "running", [50])
    log = tmp_path / "log.err"
    log.write_text("  exitcode  : -9 (pid: 77)\n")
    note_job(tmp_path, "12", log=log, age=60)
    assert (
        "a rank was killed by signal 9 (often: out of memory)" in status.run_status(tmp_path, {"12": "FAILED|"}).reason
    )


def test_living_run_whose_controller_is_gone_is_running(tmp_path):
    write_run(tmp_path, "running", [50])
    note_job(tmp_path, "4194304", executor="local", age=60)
    (tmp_path / "lock").write_text("{}")
    assert status.run_status(tmp_path, None).state == "running"


def test_job_that_has_not_reached_the_accounting_yet_is_queued(tmp_path):
    note_job(tmp_path, "12")
    assert status.run_status(tmp_path, {}).state == "queued"
    note_job(tmp_path, "12", age=60)
    assert status.run_status(tmp_path, {}).state == "failed"


def test_run_started_by_hand_and_stopped_is_cancelled_and_watching_it_ends(tmp_path, capsys):
    write_run(tmp_path / "a", "requeue", [50], reason="SIGINT")
    assert status.main([str(tmp_path / "a"), "--watch", "0.1"]) == 0
    assert "stopped by SIGINT; the same command continues it at step 0" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"done"'])
def test_damaged_files_of_a_run_are_no_traceback(tmp_path, content):
    write_run(tmp_path, "running", [50])
    for name in ("state.json", "config.yaml", "launch.json"):
        (tmp_path / name).write_text(content)
    found = status.run_status(tmp_path, None)
    assert found.state == "failed" and found.reason == "state.json cannot be read" and found.step == 50
    (tmp_path / "job.json").write_text(content)
    assert status.run_status(tmp_path, None).state == "failed"


def test_runs_made_by_hand_have_status_and_results(tmp_path, capsys):
    for name, rate in (("a", 0.1), ("b", 0.01)):
        write_run(tmp_path / name, "done", [200], {"eer": 100 * rate})
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        config |= {"optim": {"lr": rate, "name": "adam"}, "run_dir": name}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    assert [s.name for s in status.statuses(tmp_path)] == ["a", "b"]
    assert results.main([str(tmp_path), "--format", "csv", "--metrics", "eer"]) == 0
    assert capsys.readouterr().out.splitlines() == ["lr,runs,eer,sd", "0.1,1,10,", "0.01,1,1,"]
    assert results.main([str(tmp_path / "a"), "--format", "csv", "--metrics", "eer"]) == 0
    assert capsys.readouterr().out.splitlines() == ["runs,eer,sd", "1,10,"]


def test_dry_run_quotes_words_with_spaces(tmp_path, capsys):
    path = sweep_file(tmp_path, {"runs": [{"data.train_shards": ["a b/x", "c"]}]})
    assert sweep.main([str(path), "--dir", str(tmp_path / "out"), "--dry-run", *HERE]) == 0
    assert """python -m spknet.train '--data.train_shards=["a b/x", "c"]'""" in capsys.readouterr().out


def test_table_shows_step_speed_time_left_and_newest_eer(tmp_path):
    write_run(tmp_path / "a", "running", [10, 50], {"eer": 12.345})
    (tmp_path / "a" / "lock").write_text("{}")
    write_sweep(tmp_path, {"a": {}, "b": {}})
    text = status.table(status.statuses(tmp_path))
    # 150 steps of 16 utterances at 32 a second: 75 s
    assert text.splitlines()[1].split() == ["a", "running", "50/200", "32", "1", "min", "12.35"]
    assert text.splitlines()[-1] == "1 running, 1 missing"


def test_failed_run_shows_its_reason_and_the_end_of_its_own_log(tmp_path, capsys):
    log = tmp_path / "log.err"
    log.write_text(
        "old\n" * 50 + "FloatingPointError: loss is nan\nE1122 api.py:1] failed (exitcode: 1)\nmore\nsubmitit ERROR x\n"
    )
    write_run(tmp_path / "a", "failed", [50], reason="loss is nan at step 51")
    note_job(tmp_path / "a", "12", log=log, age=60)
    write_sweep(tmp_path, {"a": {}})
    assert status.main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "a: loss is nan at step 51" in said and "more" not in said
    assert said.rstrip().endswith("FloatingPointError: loss is nan") and said.count("old") == status.LOG_LINES - 1


def test_folder_without_runs_is_an_error(tmp_path, capsys):
    assert run(status.main, [str(tmp_path)]) == 2
    assert "is neither a sweep (no sweep.json) nor a run" in capsys.readouterr().err


def four_runs(tmp_path: Path) -> Path:
    """Two settings, two seeds; one run has failed. EERs 10 and 13: mean 11.5, deviation sqrt(4.5) = 2.1213."""
    overrides = {f"loss={n},seed={s}": {"loss.name": n, "train.seed": s} for n in ("proto", "ge2e") for s in (0, 1)}
    write_sweep(tmp_path, overrides)
    for name, eer in zip(overrides, (10.0, 13.0, 20.0)):
        write_run(tmp_path / name, "done", [100, 200], {"eer": eer, "min_dcf_p01": 0.5, "dev_eer": 5.0})
    write_run(tmp_path / "loss=ge2e,seed=1", "failed", [100], {"eer": 99.0})
    return tmp_path


def test_results_are_mean_and_deviation_over_the_seeds_of_finished_runs(tmp_path, capsys):
    assert results.main([str(four_runs(tmp_path)), "--format", "csv", "--metrics", "eer"]) == 0
    said = capsys.readouterr()
    assert list(csv.reader(io.StringIO(said.out))) == [
        ["loss", "runs", "eer", "sd"],
        ["proto", "2", "11.5", "2.1"],
        ["ge2e", "1", "20", ""],
    ]
    assert "left out: loss=ge2e,seed=1 (failed)" in said.err


def test_results_as_markdown_and_as_text(tmp_path, capsys):
    folder = str(four_runs(tmp_path))
    assert results.main([folder, "--format", "markdown", "--metrics", "eer"]) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == ["| --- | --- | --- | --- |", "| proto | 2 | 11.5 | 2.1 |"]
    assert results.main([folder, "--metrics", "eer"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["proto", "2", "11.5", "2.1"]


def test_best_evaluation_is_chosen_on_development_trials(tmp_path, capsys):
    folder = four_runs(tmp_path)
    lines = [{"step": s, "eval": {"eer": e, "dev_eer": d}} for s, e, d in ((50, 30.0, 4.0), (100, 10.0, 5.0))]
    (folder / "loss=proto,seed=0" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert results.main([str(folder), "--metrics", "eer", "--choose", "best", "--format", "csv"]) == 0
    assert "proto,2,21.5,12" in capsys.readouterr().out  # 30 and 13


def test_figure_of_one_of_several_trial_lists_is_found():
    found = {"eer": 4.0, "lists": {"veri_test": {"eer": 4.0}, "hard": {"eer": 9.0}}}
    assert results.figure(found, "eer") == 4.0 and results.figure(found, "hard:eer") == 9.0
    assert results.figure(found, "easy:eer") is None


def test_picture_of_the_results_is_a_png(tmp_path):
    picture = tmp_path / "eer.png"
    assert results.main([str(four_runs(tmp_path)), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_tensorboard_finds_options_and_figures_of_every_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    folder = four_runs(tmp_path)
    for _ in range(2):  # written anew, not added to
        assert results.main([str(folder), "--tensorboard"]) == 0
    assert sorted(p.name for p in (folder / "hparams").iterdir()) == [
        *("loss=ge2e,seed=0", "loss=proto,seed=0", "loss=proto,seed=1"),
    ]
    board = EventAccumulator(str(folder / "hparams" / "loss=proto,seed=1"))
    board.Reload()
    assert board.Scalars("result/eer")[0].value == 13.0
    content = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    options = HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["loss.name"].string_value == "proto" and options["train.seed"].number_value == 1


def test_results_of_what_is_no_sweep_or_has_none_yet(tmp_path, capsys):
    assert run(results.main, [str(tmp_path)]) == 2
    assert "is neither a sweep (no sweep.json) nor a run" in capsys.readouterr().err
    write_sweep(tmp_path, {"a": {}})
    assert results.main([str(tmp_path)]) == 1
    assert "no run has finished with an evaluation yet" in capsys.readouterr().err
