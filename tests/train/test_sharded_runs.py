"""Runs whose head is cut over the ranks: equal on any number of them, continued on another number, after kills."""

import json
import os
import random
import resource
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
from spknet.train.run_folder import read_state
from tests.ranks import free_port, run_ranks, set_environment, train
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


def _rank(rank: int, world: int, port: int, words: list[str], die_at: int | None, statuses) -> None:
    set_environment(rank, world, port)
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


def start(world: int, words: list[str], die_at: int | None = None, die_after: int | None = None) -> list[int]:
    """Trains on so many ranks until they end, one of them dies in its die_at-th write of a file, or die_after steps are
    logged. The exit statuses, -1 of a rank that was killed."""
    statuses, port = FORK.Array("i", [-1] * world), free_port()
    dies = (die_at or 0) % world
    processes = [
        FORK.Process(target=_rank, args=(rank, world, port, words, die_at if rank == dies else None, statuses))
        for rank in range(world)
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
        process.join(600)
    return list(statuses)


def killed_again_and_again(worlds: list[int], words: list[str], apart: int = 8) -> None:
    """Starts a run on these numbers of ranks in turn, kills each start but the last; every second one inside a write.

    apart: steps of the run for each kill.
    """
    generator, inside = random.Random(SEED), 0
    for kill, world in enumerate(worlds[:-1]):
        # A checkpoint is 8 pieces, shared by the ranks, and rank 0's .pt.
        place = {"die_at": generator.randint(1, 8 // world + 1)}
        place = place if kill % 2 else {"die_after": apart * kill + generator.randint(1, apart - 1)}
        assert 0 not in start(world, words, **place), "over before it was killed"
        inside += kill % 2
    assert set(start(worlds[-1], words)) == {0}
    print(f"seed {SEED}: {len(worlds) - 1} kills, {inside} of them inside a checkpoint")


def test_sigkills_on_2_ranks_some_inside_a_checkpoint_continue_to_the_same_bits(sharded, tmp_path):
    steps = 8 * KILLS + 8
    words = [*sharded, "--train.max_steps", str(steps), "--train.save_every_steps", "5"]
    folder = tmp_path / "killed"
    assert start(2, [*words, "--run_dir", str(tmp_path / "whole")]) == [0, 0]
    killed_again_and_again([2] * (KILLS + 1), [*words, "--run_dir", str(folder)])
    assert_same_run(folder, tmp_path / "whole", steps)
    for ours, theirs in zip(rows_of(folder, steps), rows_of(tmp_path / "whole", steps)):
        assert np.array_equal(ours, theirs)
    assert not list((folder / "checkpoints").rglob(".*"))  # nothing half-written is left


@pytest.mark.slow
def test_10_sigkills_on_4_2_1_and_4_ranks_in_turn_continue_as_one_run(sharded, tmp_path):
    words, folder = [*sharded, "--train.max_steps", "44", "--train.save_every_steps"], tmp_path / "killed"
    one = train(1, [*words, "44", "--run_dir", str(tmp_path / "one")], timeout=600)
    killed_again_and_again([4, 2, 1] * 3 + [4, 4], [*words, "3", "--run_dir", str(folder)], apart=4)
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 45))
    assert losses(lines) == pytest.approx(losses(one), rel=1e-8)
    (ranges, *ours), (expected, *theirs) = rows_of(folder, 44), rows_of(tmp_path / "one", 44)
    assert ranges == expected
    assert all(np.abs(a - b).max() < 1e-8 for a, b in zip(ours, theirs))
    assert not list((folder / "checkpoints").rglob(".*"))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES = {
    "cut": (lambda content: content[:-100], "has"),
    "a flipped bit": (flipped, "is damaged: its checksum does not fit"),
    "missing": (None, "has 0 bytes"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_checkpoint_with_a_damaged_piece_is_named_and_the_one_before_it_used(case, sharded, tmp_path, capfd):
    words, (damage, expected) = [*sharded, "--train.save_every_steps", "2"], DAMAGES[case]
    folder, world = tmp_path / "damaged", 2 if case == "a flipped bit" else 1
    train(world, [*words, "--run_dir", str(folder), "--train.max_steps", "4"])
    piece = folder / "checkpoints/step-00000004/rows-000000001-000000003.pt"  # with two ranks, rank 1 looks at it
    piece.write_bytes(damage(piece.read_bytes())) if damage else piece.unlink()
    capfd.readouterr()
    named = ["--train.resume", str(folder / "checkpoints/step-00000004.pt")]
    assert set(start(world, [*words, *named, "--run_dir", str(tmp_path / "other")])) == {2}
    assert f"rows-000000001-000000003.pt {expected}" in capfd.readouterr().err
    train(world, [*words, "--run_dir", str(folder), "--train.max_steps", "6"])
    said = capfd.readouterr().err
    assert f"rows-000000001-000000003.pt {expected}" in said and "step-00000002.pt at step 2" in said
    train(world, [*words, "--run_dir", str(tmp_path / "whole"), "--train.max_steps", "6"])
    assert_same_run(folder, tmp_path / "whole", 6)


def test_a_full_disk_while_rows_are_written_keeps_the_checkpoint_before(sharded, tmp_path, capfd):
    words = [*sharded, "--run_dir", str(tmp_path), "--loss.sub_centers", "256", "--train.save_every_steps", "2"]
    train(1, [*words, "--train.max_steps", "2"])
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert before.keys() >= {tmp_path / "checkpoints/step-00000002/rows-000000000-000000001.pt"}

    def limited():
        # Stands for the full disk: the kernel refuses bytes beyond this size in any file.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        status.value = main([*words, "--train.max_steps", "4"])

    status = FORK.Value("i", -1)
    process = FORK.Process(target=limited)
    process.start()
    process.join(120)
    said = capfd.readouterr().err
    assert status.value == 2 and "cannot write checkpoint" in said and "earlier checkpoints are intact" in said
    assert "step-00000004" in said and read_state(tmp_path)["state"] == "failed"
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == before
    train(1, [*words, "--train.max_steps", "4"])  # with room again, the same command goes on
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_network_is_loaded_and_exported_without_the_head(sharded, tmp_path):
    train(1, [*sharded, "--run_dir", str(tmp_path / "a"), "--train.max_steps", "2"])
    (tmp_path / "b/checkpoints").mkdir(parents=True)
    alone = tmp_path / "b/checkpoints/step-00000002.pt"
    alone.write_bytes((tmp_path / "a/checkpoints/step-00000002.pt").read_bytes())
    for path in (tmp_path / "b", alone):
        network, config, meta = load_network(path)
        assert meta["step"] == 2 and network(torch.zeros(1, 8000, dtype=torch.float64)).shape == (1, 32)


AVERAGES = {"mean": ["--train.average_epochs", "2"], "ema": ["--train.ema", "0.9"]}


def averages_of(folder, step: int) -> tuple[list[int], np.ndarray]:
    """The steps of a checkpoint's averages, and the averaged rows of its head: sums of them for a mean."""
    base = folder / f"checkpoints/step-{step:08d}"
    names = [entry["name"] for entry in json.loads((base / "index.json").read_text())["files"]]
    rows = [torch.load(base / name, weights_only=True)["averages"]["weight"] for name in names]
    return torch.load(base.with_suffix(".pt"), weights_only=True)["averaging"]["steps"], torch.cat(rows).numpy()


@pytest.mark.parametrize(
    ("kind", "worlds"),
    [(kind, worlds) for kind in AVERAGES for worlds in ((1, 1), (2, 2))]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("mean", (4, 4)), ("ema", (4, 4)), ("mean", (4, 2)))],
)
def test_a_kill_in_the_middle_of_averaging_continues_the_rows_averages_to_the_same_bits(
    kind, worlds, sharded, tmp_path
):
    words = [
        *sharded,
        *AVERAGES[kind],
        "--train.max_steps",
        "9",
        "--train.keep_checkpoints",
        "0",
    ]  # 3 epochs of 3 steps
    words += ["--train.save_every_steps", "1", "--run_dir"]
    (first, second), same = worlds, len(set(worlds)) == 1
    assert set(start(first if same else 1, [*words, str(tmp_path / "whole")])) == {0}
    assert 0 not in start(first, [*words, str(tmp_path / "killed")], die_after=7)
    assert set(start(second, [*words, str(tmp_path / "killed")])) == {0}
    (steps, ours), (expected, theirs) = averages_of(tmp_path / "killed", 9), averages_of(tmp_path / "whole", 9)
    assert steps == expected == ([6, 9] if kind == "mean" else [9])
    assert np.array_equal(ours, theirs) if same else np.abs(ours - theirs).max() < 1e-8
    by_step = [rows_of(tmp_path / "whole", step)[1] for step in range(1, 10)]
    if kind == "mean":
        assert np.array_equal(theirs, by_step[5] + by_step[8])
    else:
        hand = by_step[0]
        for step, rows in enumerate(by_step[1:], 2):
            decay = min(0.9, (1 + step) / (10 + step))
            hand = decay * hand + (1 - decay) * rows
        assert np.abs(theirs - hand).max() < 1e-12


def test_a_fine_tuned_run_starts_from_the_rows_averages(sharded, tmp_path):
    train(1, [*sharded, *AVERAGES["mean"], "--run_dir", str(tmp_path / "a"), "--train.max_steps", "9"])
    _, averages = averages_of(tmp_path / "a", 9)
    expected = {"averaged": averages / 2, "trained": rows_of(tmp_path / "a", 9)[1]}
    for weights, rows in expected.items():
        more = ["--train.initial_model", str(tmp_path / "a"), "--train.initial_weights", weights, "--optim.lr", "1e-12"]
        train(1, [*sharded, *more, "--run_dir", str(tmp_path / weights), "--train.max_steps", "1"])
        assert np.abs(rows_of(tmp_path / weights, 1)[1] - rows).max() < 1e-9


@pytest.mark.parametrize(("loss", "kind"), [("softmax", "ema"), ("sphereface2", "mean")])
def test_averages_of_a_whole_head_go_on_in_pieces(kind, loss, options, tmp_path):
    words = [*options, "--loss.name", loss, "--loss.shards", "8", *AVERAGES[kind], "--train.max_steps", "9"]
    words += ["--train.save_every_steps", "7", "--train.keep_checkpoints", "0", "--loss.sharded"]
    train(1, [*words, "false", "--run_dir", str(tmp_path / "whole")])
    (tmp_path / "both/checkpoints").mkdir(parents=True)
    middle = "checkpoints/step-00000007.pt"
    (tmp_path / "both" / middle).write_bytes((tmp_path / "whole" / middle).read_bytes())
    train(1, [*words, "true", "--run_dir", str(tmp_path / "both")])
    (steps, ours), last = averages_of(tmp_path / "both", 9), "checkpoints/step-00000009.pt"
    whole, both = (torch.load(tmp_path / run / last, weights_only=True)["averaging"] for run in ("whole", "both"))
    assert steps == whole["steps"]
    assert np.abs(ours - whole["weights"]["loss.weight"].numpy()).max() < 1e-8
    names = {name.replace("loss.rule.", "loss."): value for name, value in both["weights"].items()}
    assert names.keys() == whole["weights"].keys() - {"loss.weight", "loss.bias"}
    assert all((value - whole["weights"][name]).abs().max() < 1e-8 for name, value in names.items())


def test_a_whole_head_goes_on_in_pieces(options, tmp_path):
    words = [*options, "--loss.name", "softmax", "--loss.shards", "8", "--train.max_steps"]
    one = train(1, [*words, "8", "--run_dir", str(tmp_path / "one"), "--loss.sharded", "false"])
    train(1, [*words, "4", "--run_dir", str(tmp_path / "both"), "--loss.sharded", "false"])
    both = train(2, [*words, "8", "--run_dir", str(tmp_path / "both"), "--loss.sharded", "true"])
    assert losses(both) == pytest.approx(losses(one), rel=1e-8)


@pytest.fixture
def others(corpus, tmp_path) -> str:
    """Shards of 9 of the 12 speakers and one that is new."""
    lines = [line.split() for line in (corpus / "train_list.txt").read_text().splitlines()]
    entries = [(speaker, path.removesuffix(".wav"), corpus / path) for speaker, path in lines if int(speaker[2:]) % 4]
    entries += [("new", key.replace(speaker, "new"), path) for speaker, key, path in entries if speaker == "id00001"]
    pack(entries, tmp_path / "shards", progress=False)
    return str(tmp_path / "shards")


def test_a_run_goes_on_with_other_speakers_by_their_names_and_its_averages_begin_anew(sharded, others, tmp_path, capfd):
    words = [*sharded, *AVERAGES["ema"], "--run_dir", str(tmp_path / "a"), "--optim.lr", "1e-12"]
    train(1, [*words, "--train.max_steps", "3"])
    _, rows, moments = rows_of(tmp_path / "a", 3)
    words[words.index("--data.train_shards") + 1] = others
    assert start(1, [*words, "--train.max_steps", "4"]) == [2]
    assert "the training data" in capfd.readouterr().err
    train(1, [*words, "--train.max_steps", "4", "--train.resume_override", "true"])
    assert "the averages of weights begin anew: the speakers are others" in capfd.readouterr().err
    state = torch.load(tmp_path / "a/checkpoints/step-00000004.pt", weights_only=True)
    (_, found, found_moments), (steps, averages) = rows_of(tmp_path / "a", 4), averages_of(tmp_path / "a", 4)
    assert steps == [4] and np.array_equal(averages, found)  # the first of its kind
    for speaker, label in zip(state["speakers"], state["labels"]):
        if speaker != "new":
            assert np.abs(found[label] - rows[int(speaker[2:])]).max() < 1e-9
            kept = moments[int(speaker[2:])]  # and a tenth of a gradient comes to nine tenths of it
            assert np.corrcoef(found_moments[label], kept)[0, 1] > 0.5


def test_fine_tuning_keeps_the_rows_of_known_speakers(sharded, others, tmp_path):
    train(1, [*sharded, "--run_dir", str(tmp_path / "a"), "--train.max_steps", "3"])
    _, rows, _ = rows_of(tmp_path / "a", 3)
    words = [*sharded, "--train.max_steps", "1", "--train.initial_model", str(tmp_path / "a"), "--optim.lr", "1e-12"]
    words[words.index("--data.train_shards") + 1] = others
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
