"""`spknet bench`: one table for all benchmarks, the same as JSON, and what each prints in a setting that takes seconds."""

import argparse
import json
import re
from pathlib import Path

import pytest

from spknet import cli
from spknet.errors import run
from tools.bench import step, table
from tools.bench.__main__ import BENCHMARKS, main
from tools.bench.table import Row

FEW = {
    "embed": "--files 3 --rounds 1 --threads 1 --only speed",
    "eval": "--utterances 3 --crops 2 --runs 1",
    "end_to_end": "--steps 2 --speakers 2 --words --model.width 0.25 --data.crop_seconds 0.5 --train.device cpu",
    "beside": "--speakers 2 --threads 1 --steps 1",
    "loader": "--only index --index-rows 40000 --seconds 0.1",
    "score": "--only crops --loop_trials 20 --threads 1",
}


def test_a_row_has_its_figure_and_what_it_is_beside(capsys):
    table.show(Row("reader", 12345.6, "crops/s", 2.5, "whole files"))
    table.show(Row("memory", 0.12345, "MiB"))
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["reader", "12,346", "crops/s", "2.5", "x", "whole", "files"]
    assert second.split() == ["memory", "0.1235", "MiB"]
    rows = list(table.beside({"a": 8.0, "b": 2.0}, "/s"))
    assert rows == [Row("a", 8.0, "/s"), Row("a", 8.0, "/s", 4.0, "b (2)")]


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_a_benchmark_shows_its_rows_and_writes_them(name, tmp_path, capsys):
    assert run(main, [name, *f"--json {tmp_path}/rows.json {FEW[name]}".split()]) == 0
    said, content = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    assert content["benchmark"] == name and content["machine"]["cores"] >= 1 and "json" in content["options"]
    assert len(content["rows"]) == len(said.splitlines()) > 1
    assert all(row["figure"] >= 0 for row in content["rows"])
    assert any(row["ratio"] is not None for row in content["rows"]) or name == "loader"


def test_a_network_of_more_and_larger_maps_takes_more_than_the_baseline():
    chosen = argparse.Namespace(models="ResNet18", precisions=["float32"], device="cpu", batch=2)
    chosen.seconds, chosen.steps, chosen.threads = 0.3, 1, 1
    rows = list(step.rows(chosen))
    assert [(row.what, row.unit) for row in rows[::2]] == [
        (f"{name}, float32", "utterances/s") for name in ("ResNetSE34L", "ResNet18")
    ]
    assert rows[1].ratio == 1 and rows[3].ratio > 1 and rows[3].unit == "MiB"
    assert "VGGVox40" not in step.chosen_names("all") and "CAM++" in step.chosen_names("all")


def test_the_page_has_the_speed_of_every_network():
    page = (Path(__file__).resolve().parents[2] / "docs/variants.md").read_text()
    rows = set(re.findall(r"^\| ([\w+-]+)(?: \(\*\))?(?: \| \d+\.\d+){4} \|$", page, re.M))
    assert rows == set(step.chosen_names("all")) - {step.BASELINE}


@pytest.mark.slow
def test_all_for_a_gpu_runs_on_a_cpu_and_keeps_to_its_time(tmp_path, capsys):
    small = "--device cpu --models ResNetSE34L --batch 2 --crop_seconds 0.4 --steps 3 --precisions bf16 compile"
    assert main(["--gpu", *small.split(), "--seconds", "0", "--json", str(tmp_path / "late.json")]) == 0
    late = json.loads((tmp_path / "late.json").read_text())["rows"]
    assert [row["what"] for row in late[:4]] == ["float32", "tf32", "bf16", "copy"]
    assert all("left out" in row["what"] for row in late[4:]) and len(late) == 4 + 2 + 3
    words = [word for word in small.split() if word != "compile"]
    assert main(["--gpu", *words, "--seconds", "400", "--json", str(tmp_path / "all.json")]) == 0
    rows = {row["what"]: row for row in json.loads((tmp_path / "all.json").read_text())["rows"]}
    assert rows["losses on cpu and the CPU, float64"]["figure"] == 0
    assert rows["losses on cpu and two ranks, float64"]["figure"] < 1e-8
    assert [row["figure"] for what, row in rows.items() if what.startswith("killed after")] == [1]
    assert rows["ResNetSE34L, bf16"]["beside"] == "copy ceiling" and rows["training, bf16"]["figure"] > 0


def test_names_and_places_that_cannot_be_are_told(tmp_path, capsys):
    assert main(["lauder"]) == 2 and "did you mean loader?" in capsys.readouterr().err
    assert cli.main(["bench", "score", "--json", str(tmp_path)]) == 2
    assert "a folder, where a file is to be written" in capsys.readouterr().err
    assert main(["--help"]) == 0 and all(name in capsys.readouterr().out for name in list(BENCHMARKS)[:1])
    assert cli.main(["bench", "step", "--models", "ResNet18,ResNet35"]) == 2
    assert "--models ResNet35: no such network; networks: " in capsys.readouterr().err
