"""Runs whose head is cut over the ranks: equal on any number of them, continued on another number, after kills."""

import json
import os
import random
import signal
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.pack import pack
from spknet.checkpoints.network import load_network
from spknet.losses.sharded import Sharded
from spknet.train.__main__ import main
from spknet.train.metrics_log import read_metrics
from tests.ranks import free_port, run_ranks, train
from tests.train.test_kill import FORK, KILLS, SEED, assert_same_run


@pytest.fixture
def sharded(options):
    """Words of a tiny run with 12 classes in 8 pieces, four of them with one class."""
    words = "--loss.name aamsoftmax --loss.sharded true --loss.shards 8 --optim.clip_norm 1 --optim.weight_decay 0.001"
    return [*options, *words.split()]


def rows_of(folder, step: int) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """Ranges, weights and first moments of a checkpoint's head, read without spknet."""
    base = folder / f"checkpoints/step-{step:08d}"
    index = json.loads((base / "index.json").read_text())
    files = [torch.load(base / entry["name"], weights_only=True) for entry in index["files"]]
    ranges = [(file["first"], file["last"]) for file in files]
    weights = torch.cat([file["values"]["weight"] for file in files])
    moments = torch.cat([file["moments"]["weight"]["exp_avg"] for file in files])
    return ranges, weights.numpy(), moments.numpy()


def losses(lines) -> list[float]:
    return [line["loss"] for line in lines]


def test_a_run_on_2_and_4_ranks_is_that_of_one_and_its_rows_lie_in_class_order(sharded, tmp_path):
    words = [*sharded, "--train.max_steps", "6", "--train.save_every_steps", "3"]
    one = train(1, [*words, "--run_dir", str(tmp_path / "1")])
    for world in (2, 4):
        lines = train(world, [*words, "--run_dir", str(tmp_path / str(world))])
        assert losses(lines) == pytest.approx(losses(one), rel=1e-8)
        assert [line["accuracy"] for line in lines] == [line["accuracy"] for line in one]
    ranges, weights, moments = rows_of(tmp_path / "1", 6)
    assert ranges == [(0, 1), (1, 3), (3, 4), (4, 6), (6, 7), (7, 9), (9, 10), (10, 12)]
    for world in (2, 4):
        their_ranges, their_weights, their_moments = rows_of(tmp_path / str(world), 6)
        assert their_ranges == ranges
        assert np.abs(their_weights - weights).max() < 1e-8 and np.abs(their_moments - moments).max() < 1e-8


def test_4_to_2_to_1_to_4_ranks_continue_as_one_run(sharded, tmp_path):
    words = [*sharded, "--run_dir", str(tmp_path / "elastic"), "--train.save_every_steps", "2"]
    for world, steps in ((4, 3), (2, 6), (1, 9), (4, 12)):
        train(world, [*words, "--train.max_steps", str(steps)])
    one = train(1, [*sharded, "--run_dir", str(tmp_path / "one"), "--train.max_steps", "12"])
    elastic = read_metrics(tmp_path / "elastic/metrics.jsonl")
    assert [line["step"] for line in elastic] == list(range(1, 13))
    assert losses(elastic) == pytest.approx(losses(one), rel=1e-8)
    kept = {path.stem for path in (tmp_path / "elastic/checkpoints").glob("*.pt")}
    assert {path.name for path in (tmp_path / "elastic/checkpoints").iterdir() if path.is_dir()} == kept


def _rank(rank: int, port: int, words: list[str], die_at: int | None, statuses) -> None:
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    if die_at is not None:
        real, left = torch.save, [die_at]

        def save_and_die(state, file):
            left[0] -= 1
            if left[0] > 0:
                return real(state, file)
            real(list(state)[:2], file)  # some bytes are there, but not all
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save_and_die
    statuses[rank] = main(words)


def two_ranks(words: list[str], die_at: int | None = None, die_after: int | None = None) -> list[int]:
    """Trains on 2 ranks until they end, one of them dies in its die_at-th write of a file, or die_after steps are logged."""
    statuses, port = FORK.Array("i", [-1, -1]), free_port()
    dies = (die_at or 0) % 2
    processes = [
        FORK.Process(target=_rank, args=(rank, port, words, die_at if rank == dies else None, statuses))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    lines = Path(words[words.index("--run_dir") + 1]) / "metrics.jsonl"
    while not wait([process.sentinel for process in processes], timeout=0.02):
        if die_after is not None and lines.exists() and lines.read_bytes().count(b"\n") >= die_after:
            break
    if die_at is not None or die_after is not None:
        for process in processes:
            process.kill()
    for process in processes:
        process.join(240)
    return list(statuses)


def test_sigkills_on_2_ranks_some_inside_a_checkpoint_continue_to_the_same_bits(sharded, tmp_path):
    steps = 8 * KILLS + 8
    words = [*sharded, "--train.max_steps", str(steps), "--train.save_every_steps", "5"]
    assert two_ranks([*words, "--run_dir", str(tmp_path / "whole")]) == [0, 0]
    generator, folder, inside = random.Random(SEED), tmp_path / "killed", 0
    for kill in range(KILLS):
        # Every second kill comes inside the writing of a file: rank 0 writes four pieces and the .pt, rank 1 four pieces.
        place = {"die_at": generator.randint(1, 8)} if kill % 2 else {"die_after": 8 * kill + generator.randint(1, 7)}
        assert 0 not in two_ranks([*words, "--run_dir", str(folder)], **place), "over before it was killed"
        inside += kill % 2
    assert two_ranks([*words, "--run_dir", str(folder)]) == [0, 0]
    print(f"seed {SEED}: {KILLS} kills, {inside} of them inside a checkpoint")
    assert_same_run(folder, tmp_path / "whole", steps)
    for ours, theirs in zip(rows_of(folder, steps), rows_of(tmp_path / "whole", steps)):
        assert np.array_equal(ours, theirs)
    assert not list((folder / "checkpoints").rglob(".*"))  # nothing half-written is left


def test_a_checkpoint_with_a_cut_or_missing_piece_is_passed_over_with_a_word(sharded, tmp_path, capfd):
    words = [*sharded, "--run_dir", str(tmp_path), "--train.save_every_steps", "2"]
    train(1, [*words, "--train.max_steps", "4"])
    piece = tmp_path / "checkpoints/step-00000004/rows-000000001-000000003.pt"
    piece.write_bytes(piece.read_bytes()[:-100])
    capfd.readouterr()
    train(1, [*words, "--train.max_steps", "6"])
    said = capfd.readouterr().err
    assert "rows-000000001-000000003.pt has" in said and "step-00000002.pt at step 2" in said
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 7))


def test_the_network_is_loaded_and_exported_without_the_head(sharded, tmp_path):
    train(1, [*sharded, "--run_dir", str(tmp_path / "a"), "--train.max_steps", "2"])
    (tmp_path / "b/checkpoints").mkdir(parents=True)
    alone = tmp_path / "b/checkpoints/step-00000002.pt"
    alone.write_bytes((tmp_path / "a/checkpoints/step-00000002.pt").read_bytes())
    for path in (tmp_path / "b", alone):
        network, config, meta = load_network(path)
        assert meta["step"] == 2 and network(torch.zeros(1, 8000, dtype=torch.float64)).shape == (1, 32)


def test_a_whole_head_goes_on_in_pieces(options, tmp_path):
    words = [*options, "--loss.name", "softmax", "--loss.shards", "8", "--train.max_steps"]
    one = train(1, [*words, "8", "--run_dir", str(tmp_path / "one"), "--loss.sharded", "false"])
    train(1, [*words, "4", "--run_dir", str(tmp_path / "both"), "--loss.sharded", "false"])
    both = train(2, [*words, "8", "--run_dir", str(tmp_path / "both"), "--loss.sharded", "true"])
    assert losses(both) == pytest.approx(losses(one), rel=1e-8)


def test_fine_tuning_keeps_the_rows_of_known_speakers(sharded, corpus, tmp_path):
    train(1, [*sharded, "--run_dir", str(tmp_path / "a"), "--train.max_steps", "3"])
    _, rows, _ = rows_of(tmp_path / "a", 3)
    lines = [line.split() for line in (corpus / "train_list.txt").read_text().splitlines()]
    entries = [(speaker, path.removesuffix(".wav"), corpus / path) for speaker, path in lines if int(speaker[2:]) % 4]
    entries += [("new", key.replace(speaker, "new"), path) for speaker, key, path in entries if speaker == "id00001"]
    pack(entries, tmp_path / "shards", progress=False)
    words = [*sharded, "--train.max_steps", "1", "--train.initial_model", str(tmp_path / "a"), "--optim.lr", "1e-12"]
    words[words.index("--data.train_shards") + 1] = str(tmp_path / "shards")
    for whole in ("true", "false"):
        words[words.index("--loss.sharded") + 1] = whole
        train(1, [*words, "--run_dir", str(tmp_path / whole)])
    state = torch.load(tmp_path / "true/checkpoints/step-00000001.pt", weights_only=True)
    _, found, _ = rows_of(tmp_path / "true", 1)
    dense = torch.load(tmp_path / "false/checkpoints/step-00000001.pt", weights_only=True)["loss"]["weight"].numpy()
    known = dict(zip(state["speakers"], state["labels"]))
    assert len(known) == 10
    for speaker, label in known.items():
        if speaker != "new":
            assert np.abs(found[label] - rows[int(speaker[2:])]).max() < 1e-9
            assert np.abs(dense[label] - rows[int(speaker[2:])]).max() < 1e-9


def _overflowing(rank: int, _world: int, words: list[str]) -> tuple[int, float]:
    """Trains with a gradient that overflows in one rank's pieces alone, at step 1; (status, a weight of the network)."""
    from spknet.train import trainer

    real, seen = Sharded.pull, []

    def pull(head, *arguments):
        gradients = list(real(head, *arguments))
        if rank == 1 and head.step == 1:
            gradients[-1] = gradients[-1] * torch.inf
        return gradients

    update = trainer.Trainer._update

    def watched(self, *arguments):
        before = next(self.task.model.parameters()).detach().clone()
        head = [p.detach().clone() for p in self.task.loss.shards()]
        total = update(self, *arguments)
        moved = any(not torch.equal(a, b) for a, b in zip(head, self.task.loss.shards()))
        seen.append((bool((before != next(self.task.model.parameters())).any()), moved, self.scaler.get_scale()))
        return total

    Sharded.pull, trainer.Trainer._update = pull, watched
    assert main(words) == 0
    return seen


def test_an_overflow_in_one_ranks_pieces_makes_every_rank_skip_the_fp16_step(sharded, tmp_path):
    words = [*sharded, "--run_dir", str(tmp_path), "--train.max_steps", "3"]
    words[words.index("float64")] = "fp16"
    zero, one = run_ranks(2, _overflowing, words, join=False)
    assert zero == one and [moved for moved, *_ in zero] == [head for _, head, _ in zero]
    assert not zero[1][0] and zero[1][2] == zero[0][2] / 2
