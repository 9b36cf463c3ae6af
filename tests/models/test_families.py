"""What every family of networks must do, at a reduced size: train on one and two ranks, in halves, in chunks, on real speech; take
utterances of any length."""

import numpy as np
import pytest
import soundfile
import torch

from spknet import rng
from spknet.config import ConfigError, LossConfig, ModelConfig
from spknet.losses import build_loss
from spknet.models import MODELS, build_model
from spknet.parallel.batchnorm import globalize
from spknet.parallel.gather import all_reduce_sum
from spknet.parallel.ranks import Ranks, data_parallel
from spknet.train.step import SpeakerTask, step_at_once, step_in_chunks
from tests.ranks import run_ranks

FAMILIES = {
    "ResNet34": ModelConfig(name="ResNet34", width=0.25, embedding_size=32),
    "ResNet50, two layers": ModelConfig(name="ResNet50", width=0.125, embedding_size=32, variant="3dspeaker"),
    "Res2Net34": ModelConfig(name="Res2Net34", width=0.25, embedding_size=32),
    "ERes2NetV2": ModelConfig(name="ERes2NetV2", width=0.125, embedding_size=32),
    "SimAM-ResNet34": ModelConfig(name="SimAM-ResNet34", width=0.125, embedding_size=32),
    "DF-ResNet60": ModelConfig(name="DF-ResNet60", width=0.25, embedding_size=32),
    "ECAPA": ModelConfig(name="ECAPA-512", width=0.125, embedding_size=32),
    "ECAPA, speechbrain": ModelConfig(name="ECAPA-512", width=0.125, embedding_size=32, variant="speechbrain"),
    "CAM++": ModelConfig(name="CAM++", width=0.25, embedding_size=32),
}
FIRST = {FAMILIES[name].name: name for name in reversed(FAMILIES)}.values()  # one of each family


def task(config: ModelConfig, precision: str, loss: str, classes: int, world: int = 1) -> SpeakerTask:
    model = build_model(config)
    loss = build_loss(LossConfig(name=loss), config.embedding_size, classes, 2)
    rng.initialize(model, 1)
    rng.initialize(loss, 1)
    made = SpeakerTask(globalize(model) if world > 1 else model, loss, 2, precision)
    return made.to(torch.float64 if precision == "float64" else torch.float32).train()


def inputs(waves: torch.Tensor, labels: torch.Tensor) -> tuple:
    return waves.flatten(0, 1), None, labels, torch.zeros(len(labels), 2, dtype=torch.float64)


def five_steps(rank: int, world: int, names: list[str]) -> dict[str, list[float]]:
    """The global batch's loss in 5 Adam steps in float64, 4 speakers x 2 crops of 0.4 s over the ranks."""
    me, generator = Ranks(rank, world, rank, world), torch.Generator().manual_seed(0)
    waves = 0.1 * torch.randn(5, 4, 2, 6400, dtype=torch.float64, generator=generator)
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    losses = {}
    for name in names:
        made = task(FAMILIES[name], "float64", "angleproto", 4, world)
        parallel, optimizer = data_parallel(made, me), torch.optim.Adam(made.parameters(), lr=1e-3)
        losses[name] = []
        for batch in waves:
            optimizer.zero_grad()
            loss, _ = step_at_once(parallel, inputs(batch[mine], torch.arange(4)[mine]), lambda x: x)
            losses[name].append(float(all_reduce_sum(loss.clone()) / world))
            optimizer.step()
    return losses


def test_two_ranks_train_like_one():
    alone = run_ranks(1, five_steps, list(FAMILIES))[0]
    for losses in run_ranks(2, five_steps, list(FAMILIES)):
        for name in FAMILIES:
            np.testing.assert_allclose(losses[name], alone[name], rtol=1e-8, err_msg=name)
    assert all(len(set(losses)) == 5 for losses in alone.values())


def crops(shared, speakers: int, utterances: int, seconds: float) -> torch.Tensor:
    """(speakers, utterances, samples) of real speech, one second into the recordings."""
    recordings: dict[str, list[str]] = {}
    for line in (shared / "speech" / "train_list.txt").read_text().splitlines():
        speaker, path = line.split()
        recordings.setdefault(speaker, []).append(path)
    chosen = [paths[:utterances] for paths in recordings.values() if len(paths) >= utterances][:speakers]
    rows = [
        soundfile.read(shared / "speech" / path, start=16000, frames=round(16000 * seconds), dtype="float32")[0]
        for paths in chosen
        for path in paths
    ]
    return torch.from_numpy(np.stack(rows)).unflatten(0, (speakers, utterances))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_overfits_eight_speakers_of_real_speech(name, shared):
    waves, labels = crops(shared, 8, 4, 0.5), torch.arange(8)
    made = task(FAMILIES[name], "float32", "softmax", 8)
    optimizer, losses = torch.optim.Adam(made.parameters(), lr=1e-3), []
    for step in range(120):
        optimizer.zero_grad()
        loss, accuracy = step_at_once(made, inputs(waves[:, 2 * (step % 2) :][:, :2], labels), lambda x: x)
        optimizer.step()
        losses.append(float(loss))
        if max(losses[-4:]) < 0.1:
            break
    assert losses[0] > 1.5  # chance: log 8 = 2.08
    assert max(losses[-4:]) < 0.1 and accuracy == 100


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_bfloat16_trains_like_float32(name, shared):
    every = crops(shared, 160, 2, 0.5)
    means = {}
    for precision in ("float32", "bf16"):
        made = task(FAMILIES[name], precision, "aamsoftmax", 160)
        optimizer, losses = torch.optim.Adam(made.parameters(), lr=2e-4), []
        for step in range(20):  # 8 new speakers in each step
            rows = slice(8 * step, 8 * step + 8)
            optimizer.zero_grad()
            loss, _ = step_at_once(made, inputs(every[rows], torch.arange(160)[rows]), lambda x: x)
            optimizer.step()
            losses.append(float(loss))
        means[precision] = np.mean(losses)
    assert abs(means["bf16"] / means["float32"] - 1) < 0.02


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_and_memory_layout_do_not_change_the_gradient(name):
    waves = 0.1 * torch.randn(4, 2, 6400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for chunk, layout in ((0, torch.contiguous_format), (3, torch.channels_last)):
        made = task(FAMILIES[name], "float64", "angleproto", 4).to(memory_format=layout)
        made.model.eval()  # BatchNorm's statistics would be those of a chunk
        if chunk:
            step_in_chunks(made, inputs(waves, torch.arange(4)), lambda x: x, chunk, Ranks())
        else:
            step_at_once(made, inputs(waves, torch.arange(4)), lambda x: x)
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-9 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_train_with_the_statistics_of_a_chunk(name):
    waves = 0.1 * torch.randn(4, 2, 6400, generator=torch.Generator().manual_seed(0))
    made = task(FAMILIES[name], "bf16", "angleproto", 4)
    loss, _ = step_in_chunks(made, inputs(waves, torch.arange(4)), lambda x: x, 4, Ranks())
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("name", FIRST)
def test_the_compiler_captures_a_training_step(name):
    torch.compiler.reset()
    waves = 0.1 * torch.randn(2, 2, 6400, generator=torch.Generator().manual_seed(0))
    losses = []
    for compiled in (False, True):
        made = task(FAMILIES[name], "float32", "angleproto", 2)
        if compiled:
            made.model.compile(
                backend="aot_eager"
            )  # captures forward and backward; code is generated for ResNet34 below
        loss, _ = step_at_once(made, inputs(waves, torch.arange(2)), lambda x: x)
        losses.append((float(loss), float(sum(p.grad.square().sum() for p in made.parameters()))))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


@pytest.mark.slow
def test_compiled_ecapa_trains_like_the_plain_one():
    torch.compiler.reset()
    waves = 0.1 * torch.randn(2, 2, 6400, generator=torch.Generator().manual_seed(0))
    losses = []
    for compiled in (False, True):
        made = task(FAMILIES["ECAPA"], "float32", "angleproto", 2)
        if compiled:
            made.model.compile()
        optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss, _ = step_at_once(made, inputs(waves, torch.arange(2)), lambda x: x)
            optimizer.step()
        losses.append(float(loss))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_utterance_of_a_third_of_a_second_and_of_twenty(name):
    model = build_model(FAMILIES[name]).eval()
    generator = torch.Generator().manual_seed(0)
    for samples in (4800, 320000):
        waves = 0.1 * torch.randn(2, samples, generator=generator)
        with torch.no_grad():
            alone, together = model(waves[:1]), model(waves)
        assert alone.shape == (1, 32) and alone.isfinite().all()
        torch.testing.assert_close(alone, together[:1], rtol=1e-3, atol=1e-4 * float(together.abs().max()))


@pytest.mark.parametrize("name", ["ResNetSE34", "ResNetSE34L", "ResNetSE34V2", "VGGVox", "RawNet3"])
@pytest.mark.parametrize("encoder", ["ASP", "TSTP"])
def test_networks_of_2020_take_one_short_utterance(name, encoder):
    model = build_model(ModelConfig(name=name, encoder=encoder, width=0.25, embedding_size=8)).eval()
    for samples in (1600, 4800):
        with torch.no_grad():
            assert model(0.1 * torch.randn(1, samples)).isfinite().all()


FEWEST = {"ResNet34": 9, "ResNet50, two layers": 9, "Res2Net34": 9, "ERes2NetV2": 9, "SimAM-ResNet34": 1}
FEWEST |= {"DF-ResNet60": 3, "ECAPA": 2, "ECAPA, speechbrain": 5, "CAM++": 3}


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_are_repeated_where_too_few(name):
    model, fewest = build_model(FAMILIES[name]).double().eval(), FEWEST[name]
    x = torch.randn(2, 12, 80, dtype=torch.float64)
    assert model.fewest_frames == fewest
    with torch.no_grad():
        assert model.embed_features(x[:, :fewest]).isfinite().all()
        for frames in range(1, fewest):
            repeated = torch.stack([x[:, i % frames] for i in range(fewest)], dim=1)
            assert torch.equal(model.embed_features(x[:, :frames]), model.embed_features(repeated))


@pytest.mark.parametrize("name", FIRST)
def test_padding_is_refused_or_left_out(name):
    x, lengths = torch.randn(2, 50, 80), torch.tensor([1.0, 0.8])
    with pytest.raises(ConfigError, match="cannot leave padding out; embed utterances of one length together"):
        build_model(FAMILIES[name]).eval().embed_features(x, lengths)


def test_speechbrains_ecapa_leaves_padding_out_of_its_statistics():
    model = build_model(FAMILIES["ECAPA, speechbrain"]).double().eval()
    rng.initialize(model, 1)
    x = torch.randn(2, 100, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[1, 80:] = 0
    with torch.no_grad():
        alone, padded = model.embed_features(x[1:, :80]), model.embed_features(x[1:], torch.tensor([0.8]))
        unmasked = model.embed_features(x[1:])
        torch.testing.assert_close(model.embed_features(x, torch.ones(2)), model.embed_features(x))
    near, far = ((e - alone).norm() / alone.norm() for e in (padded, unmasked))
    assert 0 < near < far / 5  # the convolutions at the edge still see the padding


@pytest.mark.parametrize("name", [name for name in FAMILIES if "ECAPA" in name or name == "CAM++" or "two" in name])
def test_one_utterance_is_not_enough_for_a_norm_after_pooling(name):
    model = build_model(FAMILIES[name])
    with pytest.raises(ConfigError, match="trains on at least two utterances at once, found one; raise"):
        model(torch.randn(1, 8000))
    assert model(torch.randn(2, 8000)).shape == (2, 32)


def test_published_options_stand_where_none_are_given():
    assert (ModelConfig().encoder, ModelConfig().embedding_size, ModelConfig().n_mels) == ("SAP", 512, 40)
    ecapa = ModelConfig(name="ECAPA-1024", embedding_size=256)
    assert (ecapa.encoder, ecapa.embedding_size, ecapa.n_mels) == ("ASTP-GLOB", 256, 80)
    for name in MODELS:
        if name != "RawNet3":  # its encoder must be named, as before
            with torch.device("meta"):
                build_model(ModelConfig(name=name))
