"""Exact continuation: kills at any moment, inside checkpoint writing too, and on other numbers of ranks."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from spknet.checkpoints import file as checkpoint
from spknet.train import __main__ as command  # before the ranks are forked: each would import it again
from spknet.train import sidelines, trainer
from spknet.train.metrics_log import read_metrics
from spknet.train.run_folder import read_state
from tests.ranks import exit_statuses, train

KEYS = ("step", "epoch", "loss", "accuracy", "lr")
FORK = multiprocessing.get_context("fork")
SEED = int(os.environ.get("SPKNET_KILL_SEED", "20"))
KILLS = int(os.environ.get("SPKNET_KILLS", "3"))


def _run(words, die_at_write, status):
    """Trains in this process; die_at_write: (checkpoint number, seconds after it has begun) to kill itself at."""
    if die_at_write is not None:
        real, left = torch.save, [die_at_write]

        def save_and_die(state, file):
            left[0] -= 1
            if left[0] > 0:
                return real(state, file)
            real({"half": state["model"]}, file)  # some bytes are there, but not all
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.torch.save = save_and_die
    status.value = command.main(words)


def start(words, die_at_write=None):
    status = FORK.Value("i", -1)
    process = FORK.Process(target=_run, args=(words, die_at_write, status))
    process.start()
    return process, status


def trace(folder):
    return [[line[key] for key in KEYS] for line in read_metrics(folder / "metrics.jsonl") if "eval" not in line]


def weights(folder, step):
    state = torch.load(folder / f"checkpoints/step-{step:08d}.pt", weights_only=True)
    return {f"{part}.{name}": v for part in ("model", "loss") for name, v in state[part].items()}


def assert_same_run(folder, undisturbed, step):
    assert trace(folder) == trace(undisturbed)
    ours, theirs = weights(folder, step), weights(undisturbed, step)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and set(ours) == set(theirs)
    assert read_state(folder)["state"] == "done"


def test_sigkill_at_random_moments_continues_to_the_same_bits(options, tmp_path):
    steps = 60
    words = [*options, "--train.max_steps", str(steps), "--train.save_every_steps", "7", "--optim.warmup_steps", "20"]
    words += ["--train.precision", "float32", "--augment.spec_augment", "true", "--augment.speed", "[0.9, 1.1]"]
    began = time.monotonic()
    train(1, [*words, "--run_dir", str(tmp_path / "whole")])
    seconds = time.monotonic() - began
    generator = random.Random(SEED)
    folder, kills, inside = tmp_path / "killed", 0, 0
    while kills < KILLS:
        # Every third kill comes inside the writing of a checkpoint, the others at a random moment.
        writing = generator.randint(1, 2) if kills % 3 == 2 else None
        process, status = start([*words, "--run_dir", str(folder)], writing)
        process.join(120 if writing else generator.uniform(0.1, seconds / (KILLS + 1)))
        if process.is_alive():
            process.kill()
            process.join()
        assert status.value == -1, "the run was over before it could be killed: too few steps for this many kills"
        inside += writing is not None
        kills += 1
    process, status = start([*words, "--run_dir", str(folder)])
    process.join(240)
    assert status.value == 0
    print(f"seed {SEED}: {kills} kills, {inside} of them inside a checkpoint")
    assert_same_run(folder, tmp_path / "whole", steps)
    assert not [p.name for p in (folder / "checkpoints").iterdir() if not p.name.endswith(".pt")]


def _is_killed(rank: int, place: str, victim: int, words: list[str]) -> int:
    """spknet.train, one rank of which is killed at `place`."""
    if rank == victim:
        owner, name, calls = {
            "training": (trainer, "prepare", 4),
            "saving": (checkpoint.torch, "save", 1),
            "evaluation": (sidelines.evaluation, "evaluate_network", 1),
        }[place]
        real, left = getattr(owner, name), [calls]

        def die(*arguments, **named):
            left[0] -= 1
            if left[0] > 0:
                return real(*arguments, **named)
            if place == "saving":
                arguments[1].write(b"half a checkpoint")
                arguments[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, die)
    return command.main(words)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_rank_killed_in_training_saving_and_evaluation_leaves_a_run_that_ends_with_the_same_bits(
    world, options, corpus, tmp_path
):
    words = [*options, "--train.precision", "float32", "--data.speakers_per_batch", "12", "--loss.name", "aamsoftmax"]
    words += ["--train.max_steps", "6", "--train.save_every_steps", "2", "--train.keep_checkpoints", "0"]
    words += ["--eval.trials", f"{corpus}/test_list.txt", "--eval.root", str(corpus), "--eval.every_epochs", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(world, [*words, "--run_dir", str(whole)])
    newest = []
    for place, victim in (("training", world - 1), ("saving", 0), ("evaluation", world - 1)):
        statuses = exit_statuses(world, _is_killed, place, victim, [*words, "--run_dir", str(killed)])
        assert statuses == [-signal.SIGKILL if rank == victim else 75 for rank in range(world)], place
        newest.append(max(path.name for path in killed.glob("checkpoints/step-*.pt")))
    assert newest == [
        f"step-0000000{step}.pt" for step in (2, 2, 4)
    ]  # killed in step 4: before, in and after its saving
    train(world, [*words, "--run_dir", str(killed)])
    assert_same_run(killed, whole, 6)
    scores = [
        [line["eval"]["eer"] for line in read_metrics(f / "metrics.jsonl") if "eval" in line] for f in (killed, whole)
    ]
    assert scores[0] == scores[1] and len(scores[0]) >= 2


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(options, tmp_path, capfd):
    words = [*options, "--train.save_every_steps", "4", "--run_dir", str(tmp_path / "a")]
    train(1, [*words, "--train.max_steps", "8"])
    path = tmp_path / "a/checkpoints/step-00000008.pt"
    content = bytearray(path.read_bytes())
    tensor = torch.load(path, weights_only=True)["optimizer"]["state"][0]["exp_avg"]
    content[content.index(tensor.numpy().tobytes()) + 5] ^= 4  # one bit of a number; the file still opens
    path.write_bytes(content)
    capfd.readouterr()
    train(1, [*words, "--train.max_steps", "12"])
    said = capfd.readouterr().err
    assert "step-00000008.pt is damaged" in said and "step-00000004.pt at step 4" in said
    train(1, [*options, "--train.max_steps", "12", "--run_dir", str(tmp_path / "b")])
    assert trace(tmp_path / "a") == trace(tmp_path / "b")


@pytest.mark.slow
def test_a_run_of_4_ranks_continues_on_2_and_then_1(options, tmp_path):
    words = [*options, "--run_dir", str(tmp_path / "elastic"), "--train.save_every_steps", "3"]
    for world, steps in ((4, 5), (2, 10), (1, 15), (2, 18)):
        train(world, [*words, "--train.max_steps", str(steps)])
    one = train(1, [*options, "--run_dir", str(tmp_path / "one"), "--train.max_steps", "18"])
    elastic = read_metrics(tmp_path / "elastic/metrics.jsonl")
    assert [line["step"] for line in elastic] == list(range(1, 19))
    assert [line["loss"] for line in elastic] == pytest.approx([line["loss"] for line in one], rel=1e-8)


def test_a_full_disk_while_saving_is_an_error_that_keeps_the_checkpoint_before(options, tmp_path, capfd):
    import resource

    words = [*options, "--train.save_every_steps", "5", "--run_dir", str(tmp_path)]
    train(1, [*words, "--train.max_steps", "5"])
    intact = (tmp_path / "checkpoints/step-00000005.pt").read_bytes()

    def limited():
        # Stands for the full disk: the kernel refuses bytes beyond this size in any file.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        _run([*words, "--train.max_steps", "20"], None, status)

    status = FORK.Value("i", -1)
    process = FORK.Process(target=limited)
    process.start()
    process.join(120)
    assert status.value == 2
    assert "cannot write checkpoint" in capfd.readouterr().err
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.pt"]
    assert (tmp_path / "checkpoints/step-00000005.pt").read_bytes() == intact
    assert read_state(tmp_path)["state"] == "failed"
    train(1, [*words, "--train.max_steps", "10"])  # with room again, the same command goes on
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 11))
