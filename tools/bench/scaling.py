"""What ranks cost: one process beside W ranks, exact training beside everything local to a rank, meetings and bytes of a step.

    spknet bench scaling [--ranks 2] [--speakers 64] [--precision bf16]
    spknet bench scaling --paper docs/scaling.md       a model of 8, 64 and 512 GPUs; nothing is run

Each rank has one thread. Exact and local networks take steps in turn, so the machine's drift hits both; batches are the same
random waves. The processor's seconds of a step beside local training's are what exactness computes; the rest of what it costs is
waiting for the other ranks. Meetings and bytes are counted where ranks call torch.distributed (a rank's own part of a gather), and stand beside

    prototypes  2 directions: (N/W) D b out, N D b back        BatchNorm  2 meetings, 4 C b a layer (moments; sums back)
    gradients   P b in buckets of 25 MiB, sent while the backward pass runs (the same in both ways)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from spknet import rng
from spknet.config import LossConfig, ModelConfig, OptimConfig
from spknet.losses import build_loss
from spknet.models import build_model
from spknet.parallel import batchnorm, gather
from spknet.parallel.batchnorm import globalize
from spknet.parallel.gather import all_reduce_sum
from spknet.parallel.gradients import AveragedGradients
from spknet.parallel.ranks import Ranks
from spknet.train.optim import build_optimizer
from spknet.train.step import SpeakerTask, step_at_once
from tools.bench import paper
from tools.bench.ranks import on_ranks
from tools.bench.table import Row
from tools.exactness import local_losses


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="processes beside one (2)")
    parser.add_argument("--model", default="ResNetSE34L", help="network (ResNetSE34L)")
    parser.add_argument("--speakers", type=int, default=64, help="N, of the global batch; two utterances each")
    parser.add_argument("--steps", type=int, default=10, help="rounds of steps that are timed")
    parser.add_argument("--frames", type=int, default=200, help="length of a crop, 10 ms each (200)")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="arithmetic (float32)")
    parser.add_argument("--groups", type=int, default=0, help="train.batchnorm_groups of a third way; 0: the ranks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (cpu)")
    parser.add_argument("--paper", metavar="FILE", help="write the model of many GPUs and run nothing")


def rows(chosen: argparse.Namespace) -> Iterator[Row]:
    if chosen.paper:
        yield from paper.write(chosen.paper)
        return
    chosen.groups = chosen.groups or chosen.ranks
    what = f"{chosen.model}, N={chosen.speakers}, {chosen.precision}"
    many = on_ranks(chosen.ranks, measure, chosen, device=chosen.device)[0]
    threads = chosen.ranks if chosen.device == "cpu" else 1
    one = on_ranks(1, measure, chosen, device=chosen.device, threads=threads)[0]
    speeds = [2 * chosen.speakers / statistics.median(found["seconds"]["exact"]) for found in (many, one)]
    yield Row(f"{what}, {chosen.ranks} ranks", speeds[0], "utterances/s", speeds[0] / speeds[1], "one process")
    seconds = many["seconds"]
    for way in ("exact", "groups"):
        ratios = [a / b for a, b in zip(seconds[way], seconds["local"])]
        step = statistics.median(seconds[way])
        yield Row(f"{what}, a step, {way}", step, "s", statistics.median(ratios), "local to the rank")
    busy = {way: statistics.median(found) for way, found in many["busy"].items()}
    ratio = busy["exact"] / busy["local"]
    yield Row(f"{what}, a step, exact, a rank's processor", busy["exact"], "s", ratio, "local to the rank")
    local, alone = statistics.median(seconds["local"]), statistics.median(many["alone"])
    yield Row(
        "BatchNorm's meetings alone, nothing computed",
        alone,
        "s a step",
        1 + alone / local,
        "local to the rank, at the least",
    )
    for way, kinds in many["counted"].items():
        for kind, (meetings, size) in kinds.items():
            yield Row(f"{way}: {kind}, meetings a step", meetings, "")
            formula = many["formula"].get(kind)
            yield Row(
                f"{way}: {kind}, a rank's part", size, "bytes", size / formula if formula else None, "the formula"
            )


def task(me: Ranks, chosen: argparse.Namespace, way: str) -> tuple:
    model = build_model(ModelConfig(name=chosen.model))
    loss = build_loss(LossConfig(), ModelConfig(name=chosen.model).embedding_size, 1, 2)
    rng.initialize(model, 0)
    if way != "local" and me.world_size > 1:
        model = globalize(model, chosen.groups if way == "groups" else 1)
    made = SpeakerTask(model, loss, 2, chosen.precision).to(me.device)
    made.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(OptimConfig(), model.parameters(), loss.parameters(), half=made.half is not None)
    return made, AveragedGradients(made.parameters()), optimizer


def measure(me: Ranks, chosen: argparse.Namespace) -> dict:
    """Seconds of each round for each way, and of them the processor's; what was counted, and what the formulas say."""
    n = chosen.speakers // me.world_size
    generator = torch.Generator().manual_seed(me.rank)
    waves = torch.randn(2 * n, 160 * chosen.frames + 240, generator=generator).to(me.device) / 10
    draws = torch.zeros(n, 2, dtype=torch.float64, device=me.device)
    inputs = (waves, None, torch.arange(n, device=me.device), draws)
    names = ("exact", "groups", "local") if me.world_size > 1 else ("exact",)
    ways = {way: task(me, chosen, way) for way in names}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    busy: dict[str, list[float]] = {way: [] for way in ways}
    counted = {}
    for i in range(chosen.steps + 2):
        for way, parts in ways.items():
            with counting() as counted[way]:
                wait(me)
                begun, busy_before = time.perf_counter(), time.process_time()
                one_step(*parts, inputs, way)
                wait(me)
            if i >= 2:  # the first ones warm up
                seconds[way].append(time.perf_counter() - begun)
                busy[way].append(time.process_time() - busy_before)
    d, layers = shape_of(ways["exact"][0])
    made = ways["exact"][0]
    prototypes = 4 * d * (n + chosen.speakers)
    gradients = sum(p.numel() * p.element_size() for p in made.parameters() if p.requires_grad)
    formula = {"prototypes": prototypes, "BatchNorm": 16 * sum(layers), "gradients": gradients}
    alone = [meetings_alone(me, layers) for _ in range(chosen.steps)] if me.world_size > 1 else []
    return {"seconds": seconds, "busy": busy, "counted": counted, "formula": formula, "alone": alone}


def meetings_alone(me: Ranks, layers: list[int]) -> float:
    """Seconds of what BatchNorm gathers in a step, with nothing between: the least that the transport takes for it."""
    parts = [torch.zeros(2 * channels, device=me.device) for channels in layers]
    wait(me)
    begun = time.perf_counter()
    for part in [*parts, *reversed(parts)]:
        batchnorm.gather_detached(part)
    wait(me)
    return time.perf_counter() - begun


def shape_of(made: SpeakerTask) -> tuple[int, list[int]]:
    """Dimensions of an embedding, and channels of each BatchNorm."""
    kinds = (nn.modules.batchnorm._BatchNorm,)
    with torch.no_grad():
        made.eval()
        d = made.model(torch.zeros(1, 16000, device=next(made.parameters()).device)).shape[1]
        made.train()
    return d, [part.num_features for part in made.modules() if isinstance(part, kinds)]


def wait(me: Ranks) -> None:
    if me.device.type == "cuda":
        torch.cuda.synchronize()
    if me.world_size > 1:
        dist.barrier()


def one_step(made, gradients, optimizer, inputs, way: str) -> None:
    gradients.clear()
    if way == "local":
        with local_losses():
            step_at_once(made, inputs, lambda x: x, gradients)
    else:
        loss, accuracy = step_at_once(made, inputs, lambda x: x, gradients)
        all_reduce_sum(torch.stack([loss, accuracy, loss, loss, loss]).double())
    optimizer.step()


@contextmanager
def counting() -> Iterator[dict[str, tuple[int, int]]]:
    """kind -> (calls, bytes) of the collectives in the block: BatchNorm's, the gradients' (sent asynchronously), prototypes'
    and the rest's; bytes of what a rank gives."""
    total: dict[str, tuple[int, int]] = {}
    real = {
        (batchnorm, "gather_detached"): lambda rows, **_: ("BatchNorm", rows),
        (gather, "_all_gather"): lambda out, rows, **_: ("prototypes", rows),
        (dist, "all_reduce"): lambda x, async_op=False, **_: (
            "gradients" if async_op else "prototypes" if x.dim() > 1 else "flags, running statistics",
            x,
        ),
    }
    inside = [False]  # BatchNorm's gather is one of gather's

    def wrap(function, tell):
        def counted(*tensors, **options):
            outer, inside[0] = inside[0], True
            kind, x = tell(*tensors, **options)
            if not outer:
                calls, size = total.get(kind, (0, 0))
                total[kind] = calls + 1, size + x.numel() * x.element_size()
            try:
                return function(*tensors, **options)
            finally:
                inside[0] = outer

        return counted

    kept = {place: getattr(*place) for place in real}
    for (module, name), tell in real.items():
        setattr(module, name, wrap(kept[module, name], tell))
    try:
        yield total
    finally:
        for (module, name), function in kept.items():
            setattr(module, name, function)
