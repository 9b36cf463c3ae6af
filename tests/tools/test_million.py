"""The programs behind docs/million.md, on sizes that take seconds."""

import argparse

import pytest

from tools import million
from tools.bench import head
from tools.bench.__main__ import main


def test_expected_memory_by_hand():
    chosen = argparse.Namespace(batch=64, size=192, shards=64, sample=0.1)
    rows = 1_000_000 * 192 * 4  # bytes of one copy of the head
    assert head.expectation(chosen, 1_000_000, 1, "whole") == 7 * rows + 5 * 64 * 1_000_000 * 4
    piece = 15_625
    buffers = 4 * piece * 192 * 4 + 5 * 64 * piece * 4
    assert head.expectation(chosen, 1_000_000, 4, "pieces") == 3 * rows / 4 + buffers
    assert head.expectation(chosen, 1_000_000, 4, "sample") == pytest.approx(2.3 * rows / 4 + 0.1 * buffers + 2e6)


@pytest.mark.slow
def test_the_benchmark_of_heads_prints_a_line_for_each_way(capfd):
    words = "--classes 640 --ranks 1 2 --batch 8 --size 16 --steps 1 --sample 0.5"
    assert main(["head", *words.split()]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "the expected ones" in line]
    expected = [f"640 classes, ranks: {w}, {way}" for w in "12" for way in ("whole", "pieces", "sample")]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


@pytest.mark.slow
def test_many_speakers_from_packing_to_a_continued_run(tmp_path, capfd):
    assert million.main(["--out", str(tmp_path), "--speakers", "200", "--ranks", "2", "--steps", "4"]) == 0
    said = capfd.readouterr().out
    for stage in (
        "list and pack",
        "open, dev speakers, first batch",
        "train, killed after 2 steps",
        "continue to the end",
    ):
        assert f"| {stage} | " in said
    assert "steps 4, losses" in said
