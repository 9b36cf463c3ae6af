"""The same run on any number of ranks and workers."""

import pytest
import torch

from tests.ranks import run_ranks, train

LOSSES = ["angleproto", "ge2e", "softmax", "aamsoftmax", "triplet", "contrastive"]
SLOW = pytest.mark.slow


def newest(folder):
    return max(folder.glob("checkpoints/step-*.pt"))


def losses(world, words, folder, **options):
    return [line["loss"] for line in train(world, [*words, "--run_dir", str(folder)], **options)]


@pytest.mark.parametrize("loss", [LOSSES[0], *(pytest.param(name, marks=SLOW) for name in LOSSES[1:])])
def test_losses_of_20_adam_steps_are_equal_on_1_2_and_4_ranks(loss, options, tmp_path):
    words = [*options, "--loss.name", loss, "--train.max_steps", "20"]
    one = losses(1, words, tmp_path / "1")
    assert len(one) == 20 and len(set(one)) == 20
    for world in (2, 4):
        assert losses(world, words, tmp_path / str(world)) == pytest.approx(one, rel=1e-8)


@SLOW
@pytest.mark.parametrize(
    ("model", "encoder"), [("ResNetSE34", "SAP"), ("ResNetSE34V2", "ASP"), ("VGGVox", "TAP"), ("RawNet3", "ECA")]
)
def test_every_network_gives_equal_losses_on_1_and_2_ranks(model, encoder, options, tmp_path):
    words = [
        *options,
        "--model.name",
        model,
        "--model.encoder",
        encoder,
        "--model.width",
        "0.125",
        "--train.max_steps",
        "4",
    ]
    assert losses(2, words, tmp_path / "2") == pytest.approx(losses(1, words, tmp_path / "1"), rel=1e-8)


@SLOW
def test_the_full_network_gives_equal_losses_on_1_2_and_4_ranks(options, tmp_path):
    words = [*options, "--model.width", "1.0", "--model.embedding_size", "512", "--train.max_steps", "20"]
    one = losses(1, words, tmp_path / "1")
    for world in (2, 4):
        assert losses(world, words, tmp_path / str(world)) == pytest.approx(one, rel=1e-8)


def test_groups_of_batchnorm_are_the_same_on_1_2_and_4_ranks_and_not_the_whole_batch(options, tmp_path):
    words = [*options, "--train.max_steps", "5"]
    grouped = [*words, "--train.batchnorm_groups", "4"]
    one = losses(1, grouped, tmp_path / "1")
    assert one[0] != losses(1, words, tmp_path / "whole")[0]
    for world in (2, 4):
        assert losses(world, grouped, tmp_path / str(world)) == pytest.approx(one, rel=1e-8)
    state = [torch.load(newest(tmp_path / name), weights_only=True)["model"] for name in ("1", "4")]
    for name, value in state[0].items():  # running statistics among them
        torch.testing.assert_close(state[1][name], value, rtol=1e-7, atol=1e-9)


def test_any_number_of_workers_gives_the_same_bits(options, corpus, tmp_path):
    noisy = ["--augment.spec_augment", "true", "--augment.speed", "[0.9, 1.0, 1.1]", "--train.max_steps", "5"]
    base = losses(1, [*options, *noisy], tmp_path / "0")
    for workers in ("1", "3"):
        assert losses(1, [*options, *noisy, "--data.workers", workers], tmp_path / workers) == base


def test_augmentation_is_the_same_on_1_and_2_ranks(options, noise_and_rir, tmp_path):
    noise, rir = noise_and_rir
    words = [
        *options,
        "--augment.noise_shards",
        str(noise),
        "--augment.rir_shards",
        str(rir),
        "--augment.speed",
        "[0.9, 1.1]",
    ]
    words += ["--augment.spec_augment", "true", "--augment.probability", "0.9", "--train.max_steps", "5"]
    one = losses(1, words, tmp_path / "1")
    assert one != losses(1, [*options, "--train.max_steps", "5"], tmp_path / "clean")
    assert losses(2, words, tmp_path / "2") == pytest.approx(one, rel=1e-8)


def gradients(rank, world, words, chunk):
    """Gradient of the first step's global loss, network frozen in its statistics, with or without chunks."""
    from spknet.data.batches import Batches
    from spknet.options import parse
    from spknet.parallel.ranks import here
    from spknet.train.step import prepare, step_at_once, step_in_chunks
    from spknet.train.trainer import Trainer

    c = parse(words)
    me = here()
    trainer = Trainer(c, me)
    trainer.task.eval()  # BatchNorm frozen: then chunks are exact
    with Batches(c, trainer.corpus, me, 0, 1) as batches:
        inputs = prepare(next(batches), trainer.samples, trainer.dtype, me.device)
    trainer.gradients.clear()
    if chunk:
        loss, _ = step_in_chunks(trainer.task, inputs, lambda x: x, trainer.gradients, chunk)
    else:
        loss, _ = step_at_once(trainer.task, inputs, lambda x: x, trainer.gradients)
    return float(loss), {name: p.grad.numpy() for name, p in trainer.task.named_parameters()}


@pytest.mark.parametrize("world", [1, 2])
def test_chunks_give_the_gradient_of_the_whole_batch(world, options, tmp_path):
    words = [*options, "--run_dir", str(tmp_path), "--loss.name", "angleproto"]
    _, whole = run_ranks(1, gradients, words, 0)[0]
    every = run_ranks(world, gradients, [*words, "--train.chunk", "3"], 3)
    for _, chunked in every:
        assert set(chunked) == set(whole)
        for name in whole:
            torch.testing.assert_close(
                torch.from_numpy(chunked[name]), torch.from_numpy(whole[name]), rtol=1e-8, atol=1e-12
            )


def test_chunks_count_running_statistics_once(options, tmp_path):
    words = [*options, "--train.max_steps", "2", "--train.chunk", "16", "--run_dir", str(tmp_path / "a")]
    train(1, words)
    train(1, [*options, "--train.max_steps", "2", "--run_dir", str(tmp_path / "b")])
    states = [torch.load(tmp_path / x / "checkpoints/step-00000002.pt", weights_only=True)["model"] for x in "ab"]
    for name in states[0]:  # one chunk holds the whole batch: equal in every number
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-9, atol=1e-12)
