"""A training step of ResNetSE34L beside voxceleb_trainer's, in one run: features, network, angular prototypical loss, Adam.

    spknet bench beside [--speakers 40] [--threads 2] [--steps 5]

Theirs is written anew after voxceleb_trainer's ResNetSE34L.py, ResNetBlocks.py and angleproto.py (2020): torchaudio's MelSpectrogram, NCHW,
float32, as its code trains on a CPU. Ours is what `spknet train` does in a step, float32 and bf16, channels last. Steps alternate on the same
crops, so that the machine's drift hits all; with one thread the process's own time counts. The ratio is the median of those of the pairs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spknet.config import LossConfig, ModelConfig, OptimConfig, TrainConfig
from spknet.data.mixing import mix
from spknet.losses import build_loss
from spknet.models import build_model
from spknet.parallel.gradients import AveragedGradients
from spknet.train import kernels
from spknet.train.optim import build_optimizer, total_norm
from spknet.train.step import SpeakerTask, step_at_once
from tools.bench.table import Row

FRAMES, M = 200, 2


class TheirGate(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 8), nn.ReLU(inplace=True), nn.Linear(channels // 8, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        return x * self.fc(y).view(b, c, 1, 1)


class TheirBlock(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = TheirGate(channels)
        self.downsample = None
        if stride != 1 or inputs != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.se(self.bn2(self.conv2(self.bn1(F.relu(self.conv1(x), inplace=True)))))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


class TheirNetwork(nn.Module):
    """(batch, samples) -> (batch, 512), with self-attentive pooling."""

    def __init__(self):
        super().__init__()
        import torchaudio

        self.instancenorm = nn.InstanceNorm1d(40)
        self.torchfb = torchaudio.transforms.MelSpectrogram(
            sample_rate=16000, n_fft=512, win_length=400, hop_length=160, window_fn=torch.hamming_window, n_mels=40
        )
        self.conv1 = nn.Conv2d(1, 16, 7, (2, 1), 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, inputs = [], 16
        for count, channels, stride in ((3, 16, 1), (4, 32, 2), (6, 64, 2), (3, 128, 1)):
            for k in range(count):
                blocks.append(TheirBlock(inputs, channels, stride if k == 0 else 1))
                inputs = channels
        self.layers = nn.Sequential(*blocks)
        self.sap_linear = nn.Linear(128, 128)
        self.attention = nn.Parameter(nn.init.xavier_normal_(torch.empty(128, 1)))
        self.fc = nn.Linear(128, 512)

    def forward(self, waves: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.instancenorm((self.torchfb(waves) + 1e-6).log()).unsqueeze(1)
        x = self.layers(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = torch.mean(x, dim=2).permute(0, 2, 1)
        h = torch.tanh(self.sap_linear(x))
        w = F.softmax(torch.matmul(h, self.attention).squeeze(2), dim=1).view(x.size(0), x.size(1), 1)
        return self.fc(torch.sum(x * w, dim=1))


def theirs(crops: Tensor) -> Callable[[], None]:
    """A step of theirs on int16 crops, speaker by speaker, which its loader has made floats of."""
    waves = crops.float() / 32768
    network, w, b = TheirNetwork(), nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-5.0))
    optimizer = torch.optim.Adam([*network.parameters(), w, b], lr=0.001)

    def step() -> None:
        optimizer.zero_grad()
        x = network(waves).reshape(-1, M, 512)
        positive, anchor = torch.mean(x[:, 1:, :], 1), x[:, 0, :]
        n = len(anchor)
        cosines = F.cosine_similarity(
            anchor.unsqueeze(-1).expand(-1, -1, n), positive.unsqueeze(-1).expand(-1, -1, n).transpose(0, 2)
        )
        with torch.no_grad():
            w.clamp_(min=1e-6)
        F.cross_entropy(cosines * w + b, torch.arange(n)).backward()
        optimizer.step()

    return step


def ours(crops: Tensor, precision: str) -> Callable[[], None]:
    """A step of ours on the same."""
    kernels.choose(TrainConfig(), torch.device("cpu"))
    model, loss = build_model(ModelConfig()), build_loss(LossConfig(), 512, 1, M)
    task = SpeakerTask(model, loss, M, precision).to(memory_format=torch.channels_last)
    gradients = AveragedGradients(task.parameters())
    optimizer = build_optimizer(OptimConfig(), model.parameters(), loss.parameters(), half=task.half is not None)
    labels, draws = torch.arange(len(crops) // M), torch.zeros(len(crops) // M, 2, dtype=torch.float64)

    def step() -> None:
        gradients.clear()
        inputs = (mix(crops, {}, crops.shape[1], torch.float32), None, labels, draws)
        step_at_once(task, inputs, lambda value: value, gradients)
        torch.isfinite(total_norm(task.parameters()))
        optimizer.step()
        loss.clamp_()

    return step


WAYS = {
    "theirs, float32": theirs,
    "ours, float32": partial(ours, precision="float32"),
    "ours, bf16": partial(ours, precision="bf16"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--speakers", type=int, default=40, help="N of a batch; M is 2, crops have 200 frames")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (2)")
    parser.add_argument("--steps", type=int, default=5, help="steps of each that are timed, after one that is not")


def rows(chosen: argparse.Namespace) -> Iterator[Row]:
    context, ways = multiprocessing.get_context("spawn"), {}
    for name in WAYS:
        ways[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(name, chosen, theirs), daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(chosen.steps + 1):
        for name, pipe in ways.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for pipe in ways.values():
        pipe.send(False)
    first, *others = WAYS
    yield Row(first, M * chosen.speakers / statistics.median(seconds[first][1:]), "utterances/s")
    for name in others:
        ratios = [a / b for a, b in zip(seconds[first][1:], seconds[name][1:])]
        speed = M * chosen.speakers / statistics.median(seconds[name][1:])
        yield Row(name, speed, "utterances/s", statistics.median(ratios), "theirs")


def _serve(name: str, chosen: argparse.Namespace, pipe) -> None:
    """In a process of its own, since memory is kept in another way: a step whenever asked, and its seconds."""
    torch.set_num_threads(chosen.threads)
    clock = time.process_time if chosen.threads == 1 else time.perf_counter
    shape, generator = (M * chosen.speakers, 160 * FRAMES + 240), torch.Generator().manual_seed(0)
    step = WAYS[name]((3000 * torch.randn(shape, generator=generator)).to(torch.int16))
    while pipe.recv():
        begun = clock()
        step()
        pipe.send(clock() - begun)
