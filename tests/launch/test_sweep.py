"""Sweeps: what they submit."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from launch import status, sweep
from launch.submit import SubmitError
from tests.launch.run_folders import note_job, write_run

HERE = ["--executor", "local", "--skip-data-check"]
GRID = {
    "recipe": "fast_resnet34_angleproto",
    "grid": {
        "loss": [{"loss.name": "angleproto"}, {"loss.name": "ge2e", "data.utterances_per_speaker": 3}],
        "train.seed": [0, 1],
    },
}


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


def test_dry_run_quotes_words_with_spaces(tmp_path, capsys):
    path = sweep_file(tmp_path, {"runs": [{"data.train_shards": ["a b/x", "c"]}]})
    assert sweep.main([str(path), "--dir", str(tmp_path / "out"), "--dry-run", *HERE]) == 0
    assert """python -m spknet.train '--data.train_shards=["a b/x", "c"]'""" in capsys.readouterr().out
