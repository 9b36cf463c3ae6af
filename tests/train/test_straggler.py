"""A rank that keeps the others waiting is named once."""

import time

from spknet.train.metrics_log import read_metrics
from spknet.train.straggler import Straggler
from tests.ranks import exit_statuses


def test_a_rank_that_is_slow_three_times_in_a_row_is_named_once():
    slow = Straggler()
    readings = [[0.2, 0.2, 0.31]] * 2 + [[0.2, 0.2, 0.29]] + [[0.2, 0.21, 0.31]] * 4
    assert [slow.look(seconds) for seconds in readings] == [None] * 5 + [2, None]


def test_two_that_take_turns_and_a_rank_alone_are_no_stragglers():
    slow = Straggler()
    assert [slow.look(seconds) for seconds in [[0.4, 0.2], [0.2, 0.4]] * 4] == [None] * 8
    assert [slow.look([5.0]) for _ in range(4)] == [None] * 4


def _slow_on_rank_1(rank: int, words: list[str]) -> int:
    from spknet.train import sidelines, trainer
    from spknet.train.__main__ import main

    sidelines.FIRST_STEPS, real = 1, trainer.prepare
    if rank == 1:
        trainer.prepare = lambda *arguments: (time.sleep(1), real(*arguments))[1]
    return main(words)


def test_a_run_names_its_slow_rank_once_and_notes_the_seconds_of_each(options, tmp_path, capfd):
    words = [*options, "--train.max_steps", "7", "--run_dir", str(tmp_path)]
    assert exit_statuses(2, _slow_on_rank_1, words) == [0, 0]
    said = capfd.readouterr().err
    assert said.count("keeps the others waiting") == 1 and "rank 1 (" in said
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        first, second = line["rank_seconds"]
        assert second > 1 and second > first
