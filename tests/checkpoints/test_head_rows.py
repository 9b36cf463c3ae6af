"""Rows of a head find their speakers: at their speeds, with sub-centres, among fewer, more and other speakers."""

import pytest
import torch

from spknet.checkpoints import pieces
from spknet.checkpoints.head_rows import kept, load_head_by_speaker
from spknet.config import Config, from_dict, to_dict
from spknet.losses import build_loss

D = 3


def config(**options) -> Config:
    return from_dict({"loss": {"name": "aamsoftmax", **options.pop("loss", {})}, "augment": options})


def checkpoint(c: Config, speakers: list[str], labels: list[int], classes: int) -> dict:
    """A checkpoint whose row for centre k of class c is 100 c + k."""
    loss = build_loss(c.loss, D, classes, 1)
    k = c.loss.sub_centers
    rows = torch.arange(classes).repeat_interleave(k) * 100.0 + torch.arange(k).repeat(classes)
    weight = rows[:, None].expand(-1, D).clone()
    return {
        "config": to_dict(c),
        "speakers": speakers,
        "labels": labels,
        "loss": loss.state_dict() | {"weight": weight},
    }


SPEEDS = {"speed": [1.0, 0.9, 1.1], "speed_labels": True}


def test_rows_of_the_first_speed_are_kept_for_a_head_without_speeds():
    state = checkpoint(config(**SPEEDS), ["ann", "bob", "cid"], [0, 1, 2], 9)
    loss = build_loss(config().loss, D, 4, 1)
    fresh = loss.weight.detach().clone()
    moved = load_head_by_speaker(loss, state, ["cid", "dan", "ann", "eve"], [0, 1, 2, 3])["weight"]
    assert moved[0].tolist() == [200] * D and moved[2].tolist() == [0] * D
    assert torch.equal(moved[[1, 3]], fresh[[1, 3]])


def test_a_head_with_speeds_keeps_each_speed_of_a_known_speaker():
    state = checkpoint(config(**SPEEDS), ["ann", "bob", "cid"], [0, 1, 2], 9)
    loss = build_loss(config().loss, D, 6, 1)
    moved = load_head_by_speaker(loss, state, ["bob", "new"], [0, 1], speeds=3)["weight"]
    # bob: class 1 + 3 i before, 0 + 2 i now
    assert [moved[2 * i, 0].item() for i in range(3)] == [100, 400, 700]
    assert (moved[[1, 3, 5]] < 50).all()


def test_sub_centres_move_with_their_class():
    c = config(loss={"sub_centers": 2})
    state = checkpoint(c, ["ann", "bob"], [0, 1], 2)
    moved = load_head_by_speaker(build_loss(c.loss, D, 3, 1), state, ["x", "y", "bob"], [0, 1, 2])["weight"]
    assert moved[4:, 0].tolist() == [100, 101]
    one = build_loss(config().loss, D, 2, 1)  # another number of centres: nothing can be kept
    assert torch.equal(load_head_by_speaker(one, state, ["ann", "bob"], [0, 1])["weight"], one.weight)


def test_a_head_with_spare_rows_is_mapped_too_when_speakers_change():
    c = config(loss={"n_classes": 5})
    state = checkpoint(c, ["ann", "bob"], [0, 1], 5)
    loss = build_loss(c.loss, D, 5, 1)
    fresh = loss.weight.detach().clone()
    moved = load_head_by_speaker(loss, state, ["bob", "zoe", "ann"], [0, 1, 2])["weight"]
    assert moved[0, 0] == 100 and moved[2, 0] == 0 and torch.equal(moved[[1, 3, 4]], fresh[[1, 3, 4]])


def test_labels_with_gaps_count_up_to_the_largest():
    state = checkpoint(config(**SPEEDS), ["ann", "bob"], [0, 4], 15)
    moved = load_head_by_speaker(build_loss(config().loss, D, 1, 1), state, ["bob"], [0])["weight"]
    assert moved[0, 0] == 400


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("old", "why"),
    [
        ({"sub_centers": 2}, "the checkpoint has 2 rows a class (loss.sub_centers), this run 1"),
        ({"name": "angleproto"}, "the checkpoint's loss, angleproto, has none of its rows"),
        ({"name": "softmaxproto"}, "the checkpoint's loss, softmaxproto, has none of its rows"),
    ],
)
def test_a_head_of_which_no_row_can_be_kept_begins_anew_and_says_so(old, why, sharded):
    c = config(loss=old)
    state = {"config": to_dict(c), "speakers": ["ann", "bob"], "labels": [0, 1]}
    state["loss"] = build_loss(c.loss, D, 2, 2).state_dict()
    loss = build_loss(config(loss={"sharded": sharded}).loss, D, 2, 1)
    before = [p.detach().clone() for p in [*loss.parameters(), *loss.shards()]]
    if sharded:
        pieces.initialize(loss, "unread", state, ["ann", "bob"], [0, 1], 1)
    else:
        loss.load_state_dict(load_head_by_speaker(loss, state, ["ann", "bob"], [0, 1]))
    assert len(before) and all(torch.equal(a, b) for a, b in zip(before, [*loss.parameters(), *loss.shards()]))
    assert kept(loss, state, ["ann", "bob"]) == f"head: every row begins anew: {why}"


def test_rows_beyond_the_speakers_are_no_speeds_in_a_head_in_pieces():
    state = checkpoint(config(loss={"n_classes": 6}), ["ann", "bob", "cid"], [0, 1, 2], 6)
    assert pieces.classes_by_speaker(state, 6, ["bob", "new", "ann"], [0, 1, 2], 1).tolist() == [1, -1, 0, -1, -1, -1]
    state = checkpoint(config(**SPEEDS), ["ann", "bob", "cid"], [0, 1, 2], 9)
    assert pieces.classes_by_speaker(state, 6, ["bob", "new"], [0, 1], 3).tolist() == [1, -1, 4, -1, 7, -1]
