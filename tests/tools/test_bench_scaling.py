"""What the model of many GPUs counts is what ranks do, and its arithmetic is that of the formulas."""

import argparse
from pathlib import Path

import pytest

from spknet.parallel.ranks import here
from tests.ranks import run_ranks
from tools.bench import paper, scaling
from tools.bench.paper import Machine, Sizes


def _measured(rank, world):
    words = {"model": "ResNetSE34L", "speakers": 4, "steps": 0, "frames": 40, "precision": "float32", "groups": 2}
    return scaling.measure(here(), argparse.Namespace(**words))


def test_meetings_and_bytes_of_a_step_are_those_of_the_formulas():
    found = run_ranks(2, _measured)[0]
    sizes = Sizes.of("ResNetSE34L")
    exact, groups, local = (found["counted"][way] for way in ("exact", "groups", "local"))
    assert exact["BatchNorm"] == (2 * len(sizes.channels), 16 * sum(sizes.channels))
    assert exact["BatchNorm"][1] == found["formula"]["BatchNorm"]
    assert exact["prototypes"] == (2, found["formula"]["prototypes"]) == (2, 4 * 512 * (2 + 4))
    assert exact["gradients"][1] == local["gradients"][1] == found["formula"]["gradients"]
    assert "BatchNorm" not in groups and set(local) == {"gradients"}
    # One meeting for the running statistics of all layers, one for the flags.
    assert groups["flags, running statistics"] == (2, 8 * sum(sizes.channels) + 5 * 8)


def test_the_model_by_hand():
    machine = Machine(peak=1e12, reached=0.5, node=4, launch=1e-5, inside=1e-6, between=1e-5, fast=1e9, slow=1e8)
    assert paper.meeting(4, 1000, machine) == pytest.approx(1e-5 + 3e-6 + 3000 / 1e9)
    assert paper.meeting(16, 1000, machine) == pytest.approx(1e-5 + 3e-6 + 2e-5 + 15000 / 1e8)
    sizes = Sizes(multiply_adds=10**9, parameters=10**7, channels=(10, 20), dimensions=100)
    parts = paper.step(sizes, 4, 8, machine)
    assert parts["compute"] == pytest.approx(6e9 * 8 / 5e11)
    assert parts["BatchNorm"] == pytest.approx(4 * 1.3e-5 + 2 * 3 * (80 + 160) / 1e9)
    assert parts["loss"] == pytest.approx(2 * (1.3e-5 + 3 * 4 * 100 * 8 / 1e9))
    assert parts["gradients"] == pytest.approx(1.3e-5)  # 60 ms of sending beside 64 ms of backward pass
    assert paper.step(sizes, 16, 8, machine)["gradients"] > 0.5
    grouped = paper.step(sizes, 4, 8, machine, groups=True)
    assert grouped["BatchNorm"] < parts["BatchNorm"] and grouped["compute"] == parts["compute"]


def test_the_page_is_what_the_program_writes(tmp_path):
    page = tmp_path / "scaling.md"
    assert len(list(paper.write(str(page)))) == len(paper.NETWORKS) * len(paper.GPUS)
    assert page.read_text() == (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
