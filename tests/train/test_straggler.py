"""A rank that keeps the others waiting is named once."""

from spknet.train.straggler import Straggler


def test_a_rank_that_is_slow_three_times_in_a_row_is_named_once():
    slow = Straggler()
    readings = [[0.2, 0.2, 0.31]] * 2 + [[0.2, 0.2, 0.29]] + [[0.2, 0.21, 0.31]] * 4
    assert [slow.look(seconds) for seconds in readings] == [None] * 5 + [2, None]


def test_two_that_take_turns_and_a_rank_alone_are_no_stragglers():
    slow = Straggler()
    assert [slow.look(seconds) for seconds in [[0.4, 0.2], [0.2, 0.4]] * 4] == [None] * 8
    assert [slow.look([5.0]) for _ in range(4)] == [None] * 4
