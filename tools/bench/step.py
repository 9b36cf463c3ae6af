"""Speed and memory of training each network: forward and backward of a batch, beside ResNetSE34L.

    spknet bench step --models all                       on the CPU, one thread
    spknet bench step --models ResNet34,ECAPA-1024 --device cuda --batch 128 --precisions float32 tf32 bf16 compile

A network is built as published, in training mode, on noise. Its steps alternate with ResNetSE34L's on the same waves,
so that the machine's drift hits both; the ratio is that of the median times. With one thread on the CPU the process's
own time counts, so that other work on the machine does not. Memory is the highest of a step, weights, gradients and
activations: on the CPU a process's resident memory less what it was before the network was built, each network in a
process of its own; on a GPU what torch allocated. bf16 is autocast's; compile is bf16 with torch.compile; tf32 is
float32 with TF32 products, on GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from spknet.config import ConfigError, ModelConfig
from spknet.models import MODELS, build_model
from tools.bench.table import Row

BASELINE = "ResNetSE34L"
PRECISIONS = ("float32", "tf32", "bf16", "compile")
MIB = 2**20


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="all", help="all, or names with commas between them")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["float32", "bf16"], help="arithmetic (float32 bf16)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where it runs (cpu)")
    parser.add_argument("--batch", type=int, default=8, help="utterances of a step, 2 at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of an utterance")
    parser.add_argument("--steps", type=int, default=3, help="pairs of steps that are timed, after one that is not")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")


def rows(chosen: argparse.Namespace) -> Iterator[Row]:
    names = [BASELINE, *(name for name in chosen_names(chosen.models) if name != BASELINE)]
    memories = {}
    for name in names:
        for precision in chosen.precisions:
            seconds, baseline, memory = measured(name, precision, chosen)
            memories.setdefault(precision, memory)  # the baseline's
            what, speed = f"{name}, {precision}", chosen.batch / seconds
            yield Row(what, speed, "utterances/s", baseline / seconds, BASELINE)
            yield Row(what, memory / MIB, "MiB", memory / memories[precision], BASELINE)


def chosen_names(models: str) -> list[str]:
    if models == "all":
        return [name for name in MODELS if name != "VGGVox40"]  # another name of VGGVox
    names = models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ConfigError(f"--models {','.join(unknown)}: no such network; networks: {', '.join(MODELS)}")
    return names


def measured(name: str, precision: str, chosen: argparse.Namespace) -> tuple[float, float, int]:
    """Seconds of a step, of the baseline's step, and bytes; on the CPU by a child process."""
    if chosen.device == "cuda":
        return measure(name, precision, chosen)
    # A fresh process: a forked one would fill memory that this one had freed, and seem to need less.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (name, precision, chosen))


def measure(name: str, precision: str, chosen: argparse.Namespace) -> tuple[float, float, int]:
    torch.set_num_threads(chosen.threads)
    waves = torch.randn(chosen.batch, round(16000 * chosen.seconds), generator=torch.Generator().manual_seed(0)) / 10
    waves = waves.to(chosen.device)
    with peak_memory(chosen.device) as memory:
        model = build(name, chosen.device, precision)
        step(model, waves, precision)
    baseline = build(BASELINE, chosen.device, precision)
    for _ in range(2):  # the first compiles
        step(baseline, waves, precision), step(model, waves, precision)
    pairs = [(step(model, waves, precision), step(baseline, waves, precision)) for _ in range(chosen.steps)]
    seconds, others = zip(*pairs)
    return statistics.median(seconds), statistics.median(others), memory[0]


def build(name: str, device: str, precision: str = "float32") -> nn.Module:
    """The network as published, in training mode; channels last on a GPU in half precision, as the recipes have it."""
    config = ModelConfig(name=name)
    if config.encoder not in MODELS[name].encoders:  # RawNet3 has no default encoder
        config = ModelConfig(name=name, encoder=MODELS[name].encoders[0], embedding_size=256)
    model = build_model(config).to(device).train()
    if device == "cuda" and precision in ("bf16", "compile"):
        model = model.to(memory_format=torch.channels_last)
    if precision == "compile":
        model.compile()
    return model


@contextlib.contextmanager
def kernels(precision: str) -> Iterator[None]:
    """TF32 where it is asked for and nowhere else; cuDNN searches for the fastest, as in a run."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
        torch.backends.cudnn.benchmark = before[2]


def step(model: nn.Module, waves: torch.Tensor, precision: str) -> float:
    """Seconds of one forward and backward pass."""
    half = torch.autocast(waves.device.type, torch.bfloat16, enabled=precision in ("bf16", "compile"))
    for parameter in model.parameters():
        parameter.grad = None
    alone = not waves.is_cuda and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    synchronize(waves)
    begun = clock()
    with kernels(precision):
        with half:
            embeddings = model(waves)
        embeddings.float().square().mean().backward()
    synchronize(waves)
    return clock() - begun


def synchronize(waves: torch.Tensor) -> None:
    if waves.is_cuda:
        torch.cuda.synchronize()


def give_back(device: str) -> None:
    """Frees what nobody holds any more; of a GPU's memory torch would keep it for this process alone."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def peak_memory(device: str):
    """A list that holds, after the block, the most bytes in use within it beyond those before it."""
    bytes_used = []
    give_back(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield bytes_used
        bytes_used.append(torch.cuda.max_memory_allocated() - before)
    else:
        before = resident("VmRSS")
        yield bytes_used
        bytes_used.append(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of this process's resident memory: VmRSS now, VmHWM its highest (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
