"""Augmented runs are the same on any number of ranks; speeds as classes; noise data that change are noticed."""

import itertools
import shutil

import numpy as np
import pytest

from spknet.data.batches import Steps
from spknet.data.corpus import Corpus
from spknet.data.presets import PRESETS
from spknet.losses import LOSSES
from spknet.options import parse
from spknet.parallel.ranks import Ranks
from tests.ranks import train

EVERYTHING = {
    "both": "0.4",
    "telephone": "0.2",
    "lowpass": "0.3",
    "dither": "1",
    "gain_db": "[-18,6]",
    "spec_augment": "true",
    "spec_probability": "0.7",
    "speed": "[1.0,0.9,1.1]",
}
FEWEST = {name: max(2, kind.fewest) if kind.most is None else kind.most for name, kind in LOSSES.items()}


def losses(world, words, folder):
    return [line["loss"] for line in train(world, [*words, "--run_dir", str(folder), "--train.max_steps", "3"])]


def noisy(noise_and_rir, preset: str, **more: str) -> list[str]:
    noise, rir = noise_and_rir
    chosen = {"noise_shards": str(noise), "rir_shards": str(rir), "preset": preset, "probability": "0.9"} | more
    return [word for name, value in chosen.items() for word in (f"--augment.{name}", value)]


def test_every_augmentation_is_the_same_on_1_and_2_ranks(options, noise_and_rir, tmp_path):
    words = [*options, *noisy(noise_and_rir, "kaldi", **EVERYTHING)]
    one = losses(1, words, tmp_path / "1")
    assert one != losses(1, options, tmp_path / "clean")
    assert losses(2, words, tmp_path / "2") == pytest.approx(one, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "preset"), list(zip(LOSSES, itertools.cycle(sorted(set(PRESETS) - {"none"}, reverse=True))))
)
def test_each_loss_with_every_augmentation_is_the_same_on_1_and_2_ranks(loss, preset, options, noise_and_rir, tmp_path):
    words = [*options, *noisy(noise_and_rir, preset, **EVERYTHING, speed_labels="true")]
    words += ["--loss.name", loss, "--data.utterances_per_speaker", str(FEWEST[loss])]
    one = losses(1, words, tmp_path / "1")
    assert losses(2, words, tmp_path / "2") == pytest.approx(one, rel=1e-8)


@pytest.mark.parametrize("utterances", [1, 2])
def test_the_class_of_a_speed_is_the_speaker_plus_s_times_its_index(options, utterances):
    words = ["--augment.speed", "[1.0, 0.9, 1.1]", "--data.utterances_per_speaker", str(utterances)]
    plain = parse([*options, *words])
    classes = parse([*options, *words, "--augment.speed_labels", "true"])
    corpus = Corpus.open(classes.data, 0, classes.augment)
    assert corpus.n_labels == 12 and corpus.n_classes == 36
    steps, before = Steps(classes, corpus, Ranks()), Steps(plain, Corpus.open(plain.data, 0, plain.augment), Ranks())
    assert before.corpus.n_classes == 12 and corpus.sampler.steps == before.corpus.sampler.steps
    seen = set()
    for step in range(2 * corpus.sampler.steps):
        batch, unlabelled = steps[step], before[step]
        speakers = unlabelled.labels
        assert np.array_equal(batch.labels % 12, speakers) and np.array_equal(batch.rows, unlabelled.rows)
        percent = batch.augment["speed"].reshape(-1, utterances)
        assert (percent == percent[:, :1]).all()  # one class, one speed
        assert np.array_equal(np.array([100, 90, 110])[batch.labels // 12], percent[:, 0])
        seen |= set((batch.labels // 12).tolist())
    assert seen == {0, 1, 2}


def test_noise_data_that_change_are_refused_and_another_path_to_the_same_is_not(
    options, noise_and_rir, tmp_path, capfd
):
    words = [*options, *noisy(noise_and_rir, "none"), "--run_dir", str(tmp_path / "run"), "--train.max_steps"]
    train(1, [*words, "2"])
    shutil.copytree(noise_and_rir[0], tmp_path / "moved")
    train(1, [*words, "3", "--augment.noise_shards", str(tmp_path / "moved")])
    from spknet.train.__main__ import main

    capfd.readouterr()
    assert main([*words, "4", "--augment.noise_shards", "null"]) == 2
    said = capfd.readouterr().err
    assert "the noise data" in said and "the training data" not in said
    assert main([*words, "4", "--augment.noise_shards", "null", "--train.resume_override", "true"]) == 0
