"""A model of a step's time against the number of GPUs: docs/scaling.md is written by it. Nothing in it is measured on a GPU.

    T(W) = compute + BatchNorm + loss + what of the gradients is left when the backward pass has ended

    compute    3 x multiply-adds x 2 operations x utterances of a rank / (peak x share that networks reach)
    meeting    launch + latency of a ring within a node + latency of a tree over nodes
    BatchNorm  2 meetings a layer, each gathers 2 C float32 numbers of every rank; with groups one meeting a step
    loss       2 meetings: embeddings gathered, their gradients scattered, float32
    gradients  2 (W - 1) / W x 4 P bytes over the slowest link, beside the backward pass (2/3 of compute), and a last meeting

Parameters, channels and multiply-adds are those of the networks as built; meetings and bytes of a step are the ones that
`spknet bench scaling` counts (tests/tools/test_bench_scaling.py holds both together).

    spknet bench scaling --paper docs/scaling.md
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from shards.format import write_file
from spknet.config import ModelConfig
from spknet.models import build_model
from spknet.models.describe import multiply_adds, parameters
from tools.bench.table import Row

NETWORKS = ("ResNetSE34L", "ResNet34", "ResNet221", "ECAPA-1024", "CAM++", "ReDimNet2-B6")
GPUS = (8, 64, 512)
SECONDS = 2.0  # of a crop


@dataclass(frozen=True)
class Machine:
    """What is assumed: an H100 of 2023 in nodes of 8 (vendor's figures; latencies as NCCL's tests usually show them)."""

    peak: float = 989e12  # operations a second, bf16
    reached: float = 0.3  # share of it; measure yours: spknet bench --gpu
    node: int = 8  # GPUs
    launch: float = 12e-6  # s, of a collective of few numbers on one GPU
    inside: float = 1.5e-6  # s, a step of a ring within the node
    between: float = 6e-6  # s, a level of a tree over nodes
    fast: float = 300e9  # bytes a second of a GPU within the node (NVLink)
    slow: float = 45e9  # between nodes (400 Gb/s a GPU)


@dataclass(frozen=True)
class Sizes:
    """What a network's step consists of."""

    multiply_adds: int  # of an utterance
    parameters: int
    channels: tuple[int, ...]  # of each BatchNorm
    dimensions: int

    @classmethod
    def of(cls, name: str) -> Sizes:
        model = build_model(ModelConfig(name=name))
        norms = [part.num_features for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        size = ModelConfig(name=name).embedding_size
        return cls(multiply_adds(model, SECONDS), parameters(model), tuple(norms), size)


def meeting(gpus: int, size: float, machine: Machine) -> float:
    """Seconds of an all-gather to which every GPU gives `size` bytes."""
    inside, nodes = min(gpus, machine.node), math.ceil(gpus / machine.node)
    latency = machine.launch + machine.inside * (inside - 1) + machine.between * math.log2(nodes)
    return latency + size * (gpus - 1) / (machine.fast if nodes == 1 else machine.slow)


def step(sizes: Sizes, gpus: int, utterances: int, machine: Machine, groups: bool = False) -> dict[str, float]:
    """Seconds of the parts of a step with so many utterances a GPU. groups: BatchNorm's groups are as many as the GPUs."""
    compute = 6 * sizes.multiply_adds * utterances / (machine.peak * machine.reached)
    statistics = 2 * sum(meeting(gpus, 8 * channels, machine) for channels in sizes.channels)
    if groups:  # a mean over ranks takes twice the way of a gather, of a W-th of the bytes each
        statistics = 2 * meeting(gpus, 8 * sum(sizes.channels) / gpus, machine) if sizes.channels else 0.0
    loss = 2 * meeting(gpus, 4 * sizes.dimensions * utterances, machine)
    link = machine.fast if gpus <= machine.node else machine.slow
    travel = 2 * (gpus - 1) / gpus * 4 * sizes.parameters / link
    rest = max(0.0, travel - compute * 2 / 3) + meeting(gpus, 0, machine)
    return {"compute": compute, "BatchNorm": statistics, "loss": loss, "gradients": rest}


def rows(utterances: int, machine: Machine) -> Iterator[tuple[str, int, Sizes, dict, dict]]:
    for name in NETWORKS:
        sizes = Sizes.of(name)
        for gpus in GPUS:
            plain = step(sizes, gpus, utterances, machine)
            yield name, gpus, sizes, plain, step(sizes, gpus, utterances, machine, groups=True)


def table(utterances: int, machine: Machine) -> str:
    lines = [
        "| network | GPUs | meetings a step | compute, ms | BatchNorm, ms | loss, ms | gradients left, ms | BatchNorm's share"
        " | efficiency | with groups |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, gpus, sizes, plain, grouped in rows(utterances, machine):
        parts = " | ".join(f"{1000 * seconds:.2f}" for seconds in plain.values())
        share, efficiency = plain["BatchNorm"] / sum(plain.values()), plain["compute"] / sum(plain.values())
        other = grouped["compute"] / sum(grouped.values())
        meetings = 2 * len(sizes.channels) + 2
        lines.append(f"| {name} | {gpus} | {meetings} | {parts} | {share:.0%} | {efficiency:.0%} | {other:.0%} |")
    return "\n".join(lines)


def write(path: str) -> Iterator[Row]:
    machine = Machine()
    units = {"peak": machine.peak / 1e12, "fast": machine.fast / 1e9, "slow": machine.slow / 1e9}
    units |= {name: 1e6 * getattr(machine, name) for name in ("launch", "inside", "between")}
    tables = {"few": table(32, machine), "many": table(128, machine)}
    write_file(path, PAGE.format(machine=machine, **units, **tables))
    for name, gpus, _, plain, grouped in rows(32, machine):
        whole, other = sum(plain.values()), sum(grouped.values())
        yield Row(
            f"{name}, {gpus} GPUs, groups", 1000 * other, "ms a step", other / whole, "the whole batch's statistics"
        )


PAGE = """# Scaling

What a step costs on many GPUs. **This is a model, and nothing in it has been measured on a GPU**: it says where
meetings of ranks would matter, and which options take them away. The program `spknet bench scaling --paper
docs/scaling.md` writes this page from the networks as they are built (`tools/bench/paper.py` has the formulas). What
two ranks cost here over gloo is measured by `spknet bench scaling`, which also counts the meetings and bytes of a
real step; a test holds them and the model together.

## What is assumed

Nodes of {machine.node} GPUs. A GPU computes {peak:.0f} TFLOP/s in bf16, of which networks reach {machine.reached:.0%}
(those with few channels reach less: their compute is longer and the shares below are smaller). A collective of few
numbers takes {launch:.0f} us to launch, {inside:.1f} us for each step of a ring within the node and {between:.0f} us
for each level of a tree over nodes. A GPU sends {fast:.0f} GB/s within the node and {slow:.0f} between nodes. Crops
of 2 s, in bf16; gradients and statistics travel in float32. If your machine differs, change `Machine` in that file.
Efficiency is compute over the whole step; the loss is one that compares utterances (a classification head alone has
no such meetings).

## 32 utterances a GPU

{few}

## 128 utterances a GPU

{many}

## What follows

Compute grows with the utterances of a GPU, meetings do not, so larger batches hide them. Networks with many BatchNorm
layers and little arithmetic suffer most, and there the synchronised statistics are the largest part: latency, not
bytes. Two options take their meetings away, each the same on any number of ranks that it allows:

- `--train.batchnorm_groups G`: the batch is cut into G fixed groups of speakers, and each has statistics of its own
  (ghost batches). The number of ranks must divide G and G the speakers of the batch, so each rank holds whole groups
  and no layer meets the others; running statistics are averaged once a step. With G=64 the same run goes on 1, 8
  or 64 GPUs, loss and gradients equal up to rounding (`tests/parallel/test_batchnorm.py`: 1, 2, 4 ranks). Statistics
  over fewer utterances are noisier: 16 and more a group is what is usually taken. The last column has as many groups
  as GPUs. Groups larger than a rank's share (a node, say) are not built.
- `--train.batchnorm_groups 0`: statistics stay as they are, for fine-tuning from a trained network.

With `--train.batchnorm_groups 1`, the default, statistics are those of the whole batch ([exactness.md](exactness.md)).
"""
