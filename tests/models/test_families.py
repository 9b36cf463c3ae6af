"""Each family of networks, reduced: trains on one and two ranks, in halves, in chunks, on real speech; takes any length."""

import copy

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
from spknet.parallel.gradients import AveragedGradients
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
    "ReDimNet": ModelConfig(name="ReDimNet-B2", width=0.25, embedding_size=32),
    "ReDimNet, gated": ModelConfig(name="ReDimNet-B5", width=0.25, embedding_size=32),
    "ReDimNet2": ModelConfig(name="ReDimNet2-B0", embedding_size=32, agg_gnorm=True),
    "GE2E-LSTM": ModelConfig(name="GE2E-LSTM", width=0.25, embedding_size=32),
}
FIRST = [name for name in FAMILIES if "," not in name]  # one of each family


def task(config: ModelConfig, precision: str, loss: str, classes: int, world: int = 1) -> SpeakerTask:
    model = build_model(config)
    loss = build_loss(LossConfig(name=loss), config.embedding_size, classes, 2)
    rng.initialize(model, 1)
    rng.initialize(loss, 1)
    made = SpeakerTask(globalize(model) if world > 1 else model, loss, 2, precision)
    return made.to(torch.float64 if precision == "float64" else torch.float32).train()


class Training:
    """A task, its optimizer, and one step at a time."""

    def __init__(self, made: SpeakerTask, lr: float):
        self.task, self.gradients = made, AveragedGradients(made.parameters())
        self.optimizer = torch.optim.Adam(made.parameters(), lr=lr)

    def step(self, waves: torch.Tensor, labels: torch.Tensor, chunk: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """waves (speakers, 2, samples) -> (loss, accuracy)."""
        rows = (waves.flatten(0, 1), None, labels, torch.zeros(len(labels), 2, dtype=torch.float64))
        self.gradients.clear()
        if chunk:
            result = step_in_chunks(self.task, rows, lambda x: x, self.gradients, chunk)
        else:
            result = step_at_once(self.task, rows, lambda x: x, self.gradients)
        self.optimizer.step()
        return result

    def last_gradient(self) -> torch.Tensor:
        """Of the network's last matrix, flat."""
        return [p.grad for p in self.task.model.parameters() if p.dim() > 1 and p.grad is not None][-1].flatten()


# At a quarter of its width a few of its channels die at random, and BatchNorm, which follows the ReLU, makes thirty times as much of
# rounding in every step: 1e-14 becomes 3e-8.
ALIKE = [name for name in FAMILIES if name != "ReDimNet, gated"]


def five_steps(rank: int, world: int, names: list[str]) -> dict[str, list[float]]:
    """The global batch's loss in 5 Adam steps in float64, 4 speakers x 2 crops of 0.4 s over the ranks."""
    waves = 0.1 * torch.randn(5, 4, 2, 6400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    losses = {}
    for name in names:
        training = Training(task(FAMILIES[name], "float64", "angleproto", 4, world), lr=1e-3)
        results = [training.step(batch[mine], torch.arange(4)[mine])[0] for batch in waves]
        losses[name] = [float(all_reduce_sum(loss.clone()) / world) for loss in results]
    return losses


def test_two_ranks_train_like_one():
    alone = run_ranks(1, five_steps, ALIKE)[0]
    for losses in run_ranks(2, five_steps, ALIKE):
        for name in ALIKE:
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
@pytest.mark.parametrize("name", FIRST)
def test_overfits_eight_speakers_of_real_speech(name, shared):
    waves, labels = crops(shared, 8, 4, 0.5), torch.arange(8)
    unit = name == "GE2E-LSTM"  # its embeddings have length 1: logits without a scale would stay small
    training, losses = Training(task(FAMILIES[name], "float32", "aamsoftmax" if unit else "softmax", 8), lr=2e-3), []
    for step in range(200 if unit else 120):
        loss, accuracy = training.step(waves[:, 2 * (step % 2) :][:, :2], labels)
        losses.append(float(loss))
        if max(losses[-4:]) < 0.1:
            break
    assert losses[0] > 1.5  # chance: log 8 = 2.08
    assert max(losses[-4:]) < 0.1 and accuracy == 100


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_bfloat16_trains_like_float32(name, shared):
    """20 steps of both; every other step begins from float32's weights and moments.

    Left alone, two runs part by themselves: other samples by 3e-7 move ReDimNet2's mean loss of 20 steps by 2 %.
    """
    every = crops(shared, 160, 2, 0.5)
    full, half = (Training(task(FAMILIES[name], kind, "aamsoftmax", 160), lr=1e-4) for kind in ("float32", "bf16"))
    losses, alike = [], []
    for step in range(20):  # 8 new speakers in each step
        rows, again = slice(8 * step, 8 * step + 8), step % 2 == 0
        if again:
            half.task.load_state_dict(full.task.state_dict())
            half.optimizer.load_state_dict(copy.deepcopy(full.optimizer.state_dict()))
        losses.append([float(one.step(every[rows], torch.arange(160)[rows])[0]) for one in (full, half)])
        if again:
            alike.append(float(torch.cosine_similarity(full.last_gradient(), half.last_gradient(), dim=0)))
    float32, bf16 = np.mean(losses, axis=0)
    assert abs(bf16 / float32 - 1) < 0.02
    # Below the last layer gradients of such narrow networks turn as far when float32's weights are rounded once.
    assert np.mean(alike) > 0.7


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_and_memory_layout_do_not_change_the_gradient(name):
    samples = (
        27200 if name == "GE2E-LSTM" else 6400
    )  # in eval mode zeros would fill its window, and be all it remembers
    waves = 0.1 * torch.randn(4, 2, samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for chunk, layout in ((0, torch.contiguous_format), (3, torch.channels_last)):
        made = task(FAMILIES[name], "float64", "angleproto", 4).to(memory_format=layout)
        made.model.eval()  # BatchNorm's statistics would be those of a chunk
        Training(made, lr=0.0).step(waves, torch.arange(4), chunk)
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-9 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_train_with_the_statistics_of_a_chunk(name):
    waves = 0.1 * torch.randn(4, 2, 6400, generator=torch.Generator().manual_seed(0))
    made = task(FAMILIES[name], "bf16", "angleproto", 4)
    loss, _ = Training(made, lr=0.0).step(waves, torch.arange(4), chunk=4)
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)


@pytest.mark.slow
def test_the_compiler_captures_forward_and_backward():
    torch.compiler.reset()
    waves = 0.1 * torch.randn(2, 2, 6400, generator=torch.Generator().manual_seed(0))
    losses = []
    for compiled in (False, True):
        made = task(FAMILIES["ECAPA"], "float32", "angleproto", 2)
        if compiled:
            made.model.compile(backend="aot_eager")
        training = Training(made, lr=1e-4)
        for _ in range(2):
            loss, _ = training.step(waves, torch.arange(2))
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
    for samples in (1600, 4800, 320000):
        with torch.no_grad():
            assert model(0.1 * torch.randn(1, samples)).isfinite().all()


FEWEST = {"ResNet34": 9, "ResNet50, two layers": 9, "Res2Net34": 9, "ERes2NetV2": 9, "SimAM-ResNet34": 1}
FEWEST |= {
    "DF-ResNet60": 3,
    "ECAPA": 2,
    "ECAPA, speechbrain": 5,
    "CAM++": 3,
    "ReDimNet": 2,
    "ReDimNet, gated": 2,
    "ReDimNet2": 4,
    "GE2E-LSTM": 1,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_are_repeated_where_too_few(name):
    model, fewest = build_model(FAMILIES[name]).double().eval(), FEWEST[name]
    x = torch.randn(2, 12, model.bands, dtype=torch.float64)
    assert model.fewest_frames == fewest
    with torch.no_grad():
        assert model.embed_features(x[:, :fewest]).isfinite().all()
        for frames in range(1, fewest):
            repeated = torch.stack([x[:, i % frames] for i in range(fewest)], dim=1)
            assert torch.equal(model.embed_features(x[:, :frames]), model.embed_features(repeated))


@pytest.mark.parametrize("name", FIRST)
def test_padding_is_refused_or_left_out(name):
    model, lengths = build_model(FAMILIES[name]).eval(), torch.tensor([1.0, 0.8])
    with pytest.raises(ConfigError, match="cannot leave padding out; embed utterances of one length together"):
        model.embed_features(torch.randn(2, 50, model.bands), lengths)


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


@pytest.mark.parametrize("name", [name for name in FAMILIES if name[:3] in ("ECA", "CAM", "ReD") or "two" in name])
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
