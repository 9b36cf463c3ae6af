"""A whole classification head on every rank against one cut over the ranks: time of a step and memory of a rank.

    spknet bench head --classes 100000 1000000 [--ranks 1 2 4] [--batch 128] [--steps 3]

A step is forward, backward, the gradients' all-reduce where the head is whole (what DDP does), and SGD with momentum. The
embeddings are random; there is no network. Each rank is a process with one thread, fresh for each line. Memory is the
largest resident set during the steps, less that of the process before it made the head; freed blocks go back to the
system at once (MALLOC_MMAP_THRESHOLD_), so that it is what is in use and not what the allocator keeps. What is expected:

    whole    N (weights + gradients + momentum), 4 more of (N, D) for normalised weights and their gradient, and 5 of (B / W, N):
             cosines, with margin, scaled, and two gradients
    pieces   N / W (weights + gradients + momentum), 4 of (N / P, D), 5 of (B, N / P)
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from spknet.config import LossConfig
from spknet.losses import build_loss
from spknet.parallel.ranks import Ranks
from tools.bench.ranks import on_ranks
from tools.bench.step import resident
from tools.bench.table import Row

BLOCKS = 5  # of logits' size that a step holds at once


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[100_000, 1_000_000], help="speakers (100000 1000000)"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes that share the head (1 2 4)")
    parser.add_argument("--batch", type=int, default=128, help="utterances of the global batch")
    parser.add_argument("--size", type=int, default=192, help="dimensions of an embedding")
    parser.add_argument("--shards", type=int, default=64, help="pieces of the head")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the classes in a step, in a third way")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, after one that is not")
    parser.add_argument(
        "--whole_up_to", type=int, default=0, help="largest ranks x classes of a whole head; 0: no limit"
    )


def rows(chosen: argparse.Namespace) -> Iterator[Row]:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
    for classes in chosen.classes:
        for world in chosen.ranks:
            yield from compare(chosen, classes, world)


def compare(chosen: argparse.Namespace, classes: int, world: int) -> Iterator[Row]:
    ways = ["whole", "pieces"] + (["sample"] if chosen.sample < 1 else [])
    if chosen.whole_up_to and world * classes > chosen.whole_up_to:
        ways.remove("whole")
    results = {}
    for way in ways:
        told = on_ranks(world, measure, chosen, classes, way)
        results[way] = max(seconds for seconds, _ in told), max(memory for _, memory in told)
        seconds, memory = results[way]
        what, expected = f"{classes} classes, ranks: {world}, {way}", expectation(chosen, classes, world, way) / 2**20
        yield Row(what, memory, "MiB a rank", memory / expected, "the expected ones")
        if way == "whole":
            yield Row(what, seconds, "s a step")
        elif "whole" in results:
            yield Row(what, seconds, "s a step", seconds / results["whole"][0], "the whole head's")
            ratio = memory / results["whole"][1] if results["whole"][1] else None  # so small that no memory was taken
            yield Row(what, memory, "MiB a rank", ratio, "the whole head's")


def expectation(chosen: argparse.Namespace, classes: int, world: int, way: str) -> float:
    """Bytes that a rank needs, as said at the top; in a sample, momentum of all rows and the rest of the sample."""
    b, d, piece = chosen.batch, chosen.size, classes / chosen.shards
    if way == "whole":
        return 4 * (7 * classes * d + BLOCKS * b / world * classes)
    buffers = 4 * piece * d + BLOCKS * b * piece
    if way == "pieces":
        return 4 * (3 * classes / world * d + buffers)
    # weights and momentum of all rows; of the sampled ones, weights, gradients and momentum once more; when each was seen
    return 4 * ((2 + 3 * chosen.sample) * classes / world * d + buffers * chosen.sample) + 8 * classes / world


def measure(me: Ranks, chosen: argparse.Namespace, classes: int, way: str) -> tuple[float, float]:
    """(median seconds of a step, MiB at the peak)."""
    for small in (True, False):  # a small head first: libraries, threads and buffers of gloo are no part of the head
        before = resident("VmRSS")
        share = chosen.sample if way == "sample" else 1.0
        config = LossConfig(name="aamsoftmax", sharded=way != "whole", shards=chosen.shards, sample=share)
        loss = build_loss(config, chosen.size, 1000 if small else classes, 1)
        optimizer = torch.optim.SGD([*loss.parameters(), *loss.shards()], lr=0.1, momentum=0.9)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        seconds = timed(chosen, loss, optimizer, 1000 if small else classes, me)
    return statistics.median(seconds[1:]), (resident("VmHWM") - before) / 2**20


def timed(chosen: argparse.Namespace, loss, optimizer, classes: int, me: Ranks) -> list[float]:
    """Seconds of each step."""
    seconds = []
    for loss.step in range(chosen.steps + 1):
        generator = torch.Generator().manual_seed(loss.step)
        x = torch.randn(chosen.batch, 1, chosen.size, generator=generator).chunk(me.world_size)[me.rank]
        labels = torch.randint(classes, (chosen.batch,), generator=generator).chunk(me.world_size)[me.rank]
        if me.world_size > 1:
            dist.barrier()
        begun = time.perf_counter()
        one_step(loss, optimizer, x.requires_grad_(), labels, me)
        if me.world_size > 1:
            dist.barrier()
        seconds.append(time.perf_counter() - begun)
    return seconds


def one_step(loss, optimizer, x: torch.Tensor, labels: torch.Tensor, me: Ranks) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss(x, labels, None)[0].backward()
    for parameter in loss.parameters() if me.world_size > 1 else ():
        dist.all_reduce(parameter.grad)
        parameter.grad /= me.world_size
    with loss.updating(optimizer):
        optimizer.step()
