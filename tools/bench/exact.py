"""What exactness costs: global prototypes, BatchNorm and sampler against plain DDP with everything local to a rank.

    python -m tools.bench exact [--ranks 2] [--speakers 64] [--steps 10]

Each rank has one thread and both networks, and steps alternate between them: the machine's drift hits both. The batches are
the same random int16 crops. Bytes are what a rank hands to collectives in a step, counted at the call and by the formula

    prototypes  2 directions: (N/W) D b out, N D b back        BatchNorm  4 C b a layer (two moments out, two sums back)
    gradients   P b (the same in both ways)                    flags      5 numbers of 8 bytes
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from spknet import rng
from spknet.config import LossConfig, ModelConfig
from spknet.data.sampler import Sampler
from spknet.errors import run
from spknet.losses import build_loss
from spknet.models import build_model
from spknet.parallel.batchnorm import GlobalBatchNorm, globalize
from spknet.parallel.gather import all_reduce_sum
from spknet.parallel.gradients import AveragedGradients
from spknet.parallel.ranks import Ranks, ranks
from spknet.train.step import SpeakerTask, step_at_once
from tools.exactness import local_losses


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench exact", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--speakers", type=int, default=64, help="N, of the global batch")
    parser.add_argument("--steps", type=int, default=10, help="pairs of steps that are timed")
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    chosen = parser.parse_args(argv)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (chosen, port), nprocs=chosen.ranks)
    return 0


def _rank(rank: int, chosen: argparse.Namespace, port: int) -> None:
    place = {"RANK": rank, "WORLD_SIZE": chosen.ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": chosen.ranks}
    os.environ.update(
        {name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with ranks("cpu", threads=1) as me:
        measure(chosen, me)


def task(me: Ranks, precision: str, exact: bool) -> tuple[SpeakerTask, nn.Module, torch.optim.Optimizer]:
    model, loss = build_model(ModelConfig()), build_loss(LossConfig(), 512, 1, 2)
    rng.initialize(model, 0)
    made = SpeakerTask(globalize(model) if exact else model, loss, 2, precision)
    made.to(memory_format=torch.channels_last)
    return made, AveragedGradients(made.parameters()), torch.optim.Adam(made.parameters(), lr=1e-3)


def measure(chosen: argparse.Namespace, me: Ranks) -> None:
    n = chosen.speakers // me.world_size
    generator = torch.Generator().manual_seed(me.rank)
    waves = torch.randn(2 * n, 160 * chosen.frames + 240, generator=generator) / 10
    inputs = (waves, None, torch.arange(n), torch.zeros(n, 2, dtype=torch.float64))
    ways = {exact: task(me, chosen.precision, exact) for exact in (True, False)}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    counted: dict[bool, int] = {}
    for pair in range(chosen.steps + 2):
        for exact, (made, gradients, optimizer) in ways.items():
            with counting() as total:
                dist.barrier()
                begun = time.perf_counter()
                one_step(made, gradients, optimizer, inputs, exact)
                dist.barrier()
            if pair >= 2:  # the first ones warm up
                seconds[exact].append(time.perf_counter() - begun)
            counted[exact] = total[0]
    if me.first:
        report(chosen, me, ways[True][0], seconds, counted)


def one_step(made, gradients, optimizer, inputs, exact: bool) -> None:
    gradients.clear()
    if exact:
        loss, accuracy = step_at_once(made, inputs, lambda x: x, gradients)
        all_reduce_sum(torch.stack([loss, accuracy, loss, loss, loss]).double())
    else:
        with local_losses():
            step_at_once(made, inputs, lambda x: x, gradients)
    optimizer.step()


class counting:
    """Counts the bytes of tensors given to collectives, those of the gradients' buckets (sent asynchronously) excepted."""

    def __enter__(self) -> list[int]:
        from spknet.parallel import gather

        self.total = [0]
        self.modules = [(dist, "all_reduce"), (gather, "_all_gather")]
        self.real = [getattr(module, name) for module, name in self.modules]
        for (module, name), function in zip(self.modules, self.real):
            setattr(module, name, self._wrap(function, -1 if "gather" in name else 0))
        return self.total

    def _wrap(self, function, given: int):
        def counted(*tensors, **options):
            if not options.get("async_op"):
                self.total[0] += tensors[given].numel() * tensors[given].element_size()
            return function(*tensors, **options)

        return counted

    def __exit__(self, *_):
        for (module, name), function in zip(self.modules, self.real):
            setattr(module, name, function)


def report(chosen, me: Ranks, exact: SpeakerTask, seconds: dict, counted: dict) -> None:
    pairs = [a / b for a, b in zip(seconds[True], seconds[False])]
    n, w, d = chosen.speakers, me.world_size, 512
    layers = [m.num_features for m in exact.modules() if isinstance(m, GlobalBatchNorm)]
    formula = {"prototypes": 4 * d * (n // w + n), "BatchNorm": 16 * sum(layers), "flags": 5 * 8}
    gradients = 4 * sum(p.numel() for p in exact.parameters() if p.requires_grad)
    rows = np.concatenate([[0], np.cumsum(np.full(5994, 182))])
    sampler = Sampler(rows, speakers_per_batch=n, utterances_per_speaker=2, cap=500, seed=0)
    begun = time.perf_counter()
    sampler.plan(0)
    plan = (time.perf_counter() - begun) / sampler.steps
    local = statistics.median(seconds[False])
    print(f"ResNetSE34L, angleproto, N={n}, M=2, {chosen.frames} frames, {w} ranks of one thread, {chosen.precision}")
    print(f"exact / local, median of {len(pairs)} pairs of steps: {statistics.median(pairs):.3f}")
    print(f"  (quartiles {np.quantile(pairs, 0.25):.3f} to {np.quantile(pairs, 0.75):.3f}; a local step {local:.3f} s)")
    print(
        f"sampler's plan of 1.09 M utterances, a step's share: {1e6 * plan:.0f} us = {plan / local:.5f} of a local step"
    )
    parts = ", ".join(f"{name} {size}" for name, size in formula.items())
    print(f"bytes a rank gives to collectives in a step, by formula: {parts} = {sum(formula.values())}")
    print(f"  counted: exact {counted[True]}, local {counted[False]}; gradients in both: {gradients}")


if __name__ == "__main__":
    sys.exit(run(main))
