"""Speed and memory of training each network: forward and backward of a batch, as ratios to ResNetSE34L.

    python -m tools.bench step --models all                       on the CPU, one thread
    python -m tools.bench step --models ResNet34,ECAPA-1024 --device cuda --batch 128

A network is built as published, in training mode, on noise. Its steps alternate with ResNetSE34L's on the same waves,
so that the machine's drift hits both; the ratio is that of the median times. With one thread on the CPU the process's
own time counts, so that other work on the machine does not. Memory is the highest of a step, weights, gradients and
activations: on the CPU a process's resident memory less what it was before the network was built, each network in a
process of its own; on a GPU what torch allocated. bf16 is autocast's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from spknet.config import ConfigError, ModelConfig
from spknet.errors import run
from spknet.models import MODELS, build_model

BASELINE = "ResNetSE34L"
PRECISIONS = ("float32", "bf16")
MIB = 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="all", help="all, or names with commas between them")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=8, help="utterances of a step, 2 at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of an utterance")
    parser.add_argument("--steps", type=int, default=3, help="pairs of steps that are timed, after one that is not")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    chosen = parser.parse_args(argv)
    try:
        names = chosen_names(chosen.models)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    where = torch.cuda.get_device_name() if chosen.device == "cuda" else f"CPU, threads: {chosen.threads}"
    print(
        f"forward and backward of {chosen.batch} utterances of {chosen.seconds:g} s; {where}; torch {torch.__version__}"
    )
    print(f"speed and memory as ratios to {BASELINE}, whose own figures come first")
    print(f"{'network':16} {'precision':9} {'utterances/s':>12} {'x speed':>8} {'MiB':>8} {'x memory':>8}", flush=True)
    memories = {}
    for name in [BASELINE, *(name for name in names if name != BASELINE)]:
        for precision in PRECISIONS:
            seconds, baseline, memory = measured(name, precision, chosen)
            memories.setdefault(precision, memory)  # the baseline's
            ratios = f"{baseline / seconds:8.3f} {memory / MIB:8.0f} {memory / memories[precision]:8.2f}"
            print(f"{name:16} {precision:9} {chosen.batch / seconds:12.2f} {ratios}", flush=True)
    return 0


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
        model = build(name, chosen.device)
        step(model, waves, precision)
    baseline = build(BASELINE, chosen.device)
    step(baseline, waves, precision)
    pairs = [(step(model, waves, precision), step(baseline, waves, precision)) for _ in range(chosen.steps)]
    seconds, others = zip(*pairs)
    return statistics.median(seconds), statistics.median(others), memory[0]


def build(name: str, device: str) -> nn.Module:
    """The network as published, in training mode."""
    config = ModelConfig(name=name)
    if config.encoder not in MODELS[name].encoders:  # RawNet3 has no default encoder
        config = ModelConfig(name=name, encoder=MODELS[name].encoders[0], embedding_size=256)
    return build_model(config).to(device).train()


def step(model: nn.Module, waves: torch.Tensor, precision: str) -> float:
    """Seconds of one forward and backward pass."""
    half = torch.autocast(waves.device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    for parameter in model.parameters():
        parameter.grad = None
    alone = not waves.is_cuda and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    synchronize(waves)
    begun = clock()
    with half:
        embeddings = model(waves)
    embeddings.float().square().mean().backward()
    synchronize(waves)
    return clock() - begun


def synchronize(waves: torch.Tensor) -> None:
    if waves.is_cuda:
        torch.cuda.synchronize()


@contextlib.contextmanager
def peak_memory(device: str):
    """A list that holds, after the block, the most bytes in use within it beyond those before it."""
    bytes_used = []
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
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


if __name__ == "__main__":
    sys.exit(run(main))
