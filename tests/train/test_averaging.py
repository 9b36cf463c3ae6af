"""Averages of weights: against sums by hand, through a kill, and in what is loaded afterwards."""

import multiprocessing
import signal
import time

import pytest
import torch
from torch import nn

from spknet.checkpoints.averages import with_averages
from spknet.checkpoints.file import path_of
from spknet.checkpoints.network import load_network
from spknet.config import ConfigError, TrainConfig
from spknet.train.averaging import Averaging
from spknet.train.metrics_log import read_metrics
from tests.ranks import train

STEPS = 12  # 4 epochs of 3 steps: 12 speakers x 2 pairs in batches of 8
FORK = multiprocessing.get_context("fork")


def moving(module: nn.Linear, step: int) -> None:
    with torch.no_grad():
        module.weight.fill_(float(step))
        module.bias.fill_(float(step**2))


def test_the_mean_is_of_the_ends_of_the_last_epochs_counted_from_the_last_step():
    module = nn.Linear(2, 2).double()
    averaging = Averaging(TrainConfig(average_epochs=3), module, steps_per_epoch=4, total_steps=18)
    for step in range(1, 19):
        moving(module, step)
        averaging.update(step)
    assert averaging.steps == [10, 14, 18]
    with averaging.applied() as is_average:
        assert is_average and (module.weight == 14).all() and (module.bias == (100 + 196 + 324) / 3).all()
    assert (module.weight == 18).all()


def test_the_moving_average_is_its_formula():
    module = nn.Linear(2, 2).double()
    averaging = Averaging(TrainConfig(ema=0.5), module, steps_per_epoch=4, total_steps=18)
    expected = None
    for step in range(1, 13):
        moving(module, step)
        averaging.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = step if expected is None else decay * expected + (1 - decay) * step
    with averaging.applied():
        torch.testing.assert_close(module.weight, torch.full((2, 2), expected, dtype=torch.float64))


def test_statistics_are_averaged_and_counters_are_the_last():
    module = nn.BatchNorm1d(3)
    averaging = Averaging(TrainConfig(average_epochs=2), module, steps_per_epoch=1, total_steps=2)
    for step, mean in ((1, 1.0), (2, 3.0)):
        module.running_mean.fill_(mean)
        module.num_batches_tracked.fill_(step)
        averaging.update(step)
    with averaging.applied():
        assert (module.running_mean == 2).all() and module.num_batches_tracked == 2
        assert module.num_batches_tracked.dtype == torch.int64


def test_a_run_of_another_length_begins_its_mean_anew():
    module = nn.Linear(1, 1)
    short = Averaging(TrainConfig(average_epochs=2), module, steps_per_epoch=2, total_steps=6)
    for step in range(1, 7):
        short.update(step)
    long = Averaging(TrainConfig(average_epochs=2), module, steps_per_epoch=2, total_steps=10)
    long.load(short.state())
    for step in range(7, 11):
        long.update(step)
    assert short.steps == [4, 6] and long.steps == [8, 10]


def test_both_averages_at_once_are_an_error():
    with pytest.raises(ConfigError, match="train.average_epochs=2 and train.ema=0.9: give one of the two"):
        Averaging(TrainConfig(average_epochs=2, ema=0.9), nn.Linear(1, 1), 1, 1)


def state_of(folder, step=STEPS):
    return torch.load(path_of(folder, step), weights_only=True)


def killed(words, folder, step):
    """Trains in a process of its own and kills it once the checkpoint of `step` is there."""
    from spknet.train.__main__ import main

    process = FORK.Process(target=main, args=([*words, "--run_dir", str(folder)],))
    process.start()
    deadline = time.monotonic() + 120
    while not path_of(folder, step).exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"


@pytest.mark.parametrize("average", [["--train.average_epochs", "3"], ["--train.ema", "0.9"]])
def test_a_kill_in_the_middle_of_averaging_continues_to_the_same_bits(average, options, tmp_path, capfd):
    words = [*options, *average, "--train.max_steps", str(STEPS), "--train.save_every_steps", "1"]
    words += ["--train.keep_checkpoints", "0"]
    train(1, [*words, "--run_dir", str(tmp_path / "whole")])
    killed(words, tmp_path / "killed", 8)
    capfd.readouterr()
    train(1, [*words, "--run_dir", str(tmp_path / "killed")])
    assert "continuing" in capfd.readouterr().err
    whole, again = state_of(tmp_path / "whole"), state_of(tmp_path / "killed")
    assert whole["averaging"]["steps"] == again["averaging"]["steps"]
    for name, value in whole["averaging"]["weights"].items():
        assert torch.equal(value, again["averaging"]["weights"][name]), name
    assert [line["loss"] for line in read_metrics(tmp_path / "whole/metrics.jsonl")] == [
        line["loss"] for line in read_metrics(tmp_path / "killed/metrics.jsonl")
    ]
    means = with_averages(whole)
    if whole["averaging"]["kind"] == "mean":  # by hand, from the checkpoints of the epochs' ends
        spe = round(whole["step"] / whole["epoch"])
        ends = [state_of(tmp_path / "whole", STEPS - k * spe) for k in range(3)]
        for part in ("model", "loss"):
            for name, value in means[part].items():
                if value.is_floating_point():
                    hand = torch.stack([end[part][name] for end in ends]).mean(0)
                    torch.testing.assert_close(value, hand, rtol=1e-12, atol=1e-14)
    # What is loaded is the average unless told otherwise.
    network, _, _ = load_network(tmp_path / "whole")
    trained, _, _ = load_network(tmp_path / "whole", weights="trained")
    assert all(torch.equal(value, means["model"][name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, whole["model"][name]) for name, value in trained.state_dict().items())
    assert not all(torch.equal(a, b) for a, b in zip(network.parameters(), trained.parameters()))


def test_evaluation_during_training_takes_the_average(options, corpus, tmp_path):
    words = [*options, "--train.max_steps", "8", "--train.average_epochs", "2", "--eval.root", str(corpus)]
    words += ["--eval.trials", str(corpus / "test_list.txt"), "--eval.every_epochs", "0"]
    folder = tmp_path / "run"
    train(1, [*words, "--run_dir", str(folder)])
    from spknet.evaluate.__main__ import main

    scores = {}
    for weights in ("averaged", "trained"):
        out = tmp_path / weights
        more = ["--no_pictures", "--bootstrap", "0", "--weights", weights, "--out", str(out)]
        assert main(["--checkpoint", str(folder), *more]) == 0
        scores[weights] = (out / "scores.txt").read_text()
    during = (folder / "eval/step-00000008/scores.txt").read_text()
    assert during == scores["averaged"] != scores["trained"]
