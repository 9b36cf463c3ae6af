"""Results of sweeps, on run folders written by hand."""

import csv
import io
import json
from pathlib import Path

import yaml

from launch import results, status
from spknet.errors import run
from tests.launch.run_folders import write_run, write_sweep


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
