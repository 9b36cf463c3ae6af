"""Everything there is to measure on a GPU, in one command of at most 8 minutes. It has not been run on a GPU yet.

    spknet bench --gpu [--json gpu.json]
    spknet bench --gpu --device cpu --seconds 20 --models ResNetSE34L --batch 2 --crop_seconds 0.3      its logic, anywhere

    ceilings    products of large matrices in each precision, and copies within the device's memory
    networks    forward and backward in float32, tf32, bf16, bf16 compiled: utterances/s beside ResNetSE34L, the share of the
                matrix ceiling (6 operations a multiply-add), memory, and the share of the copy ceiling that reading and
                writing this memory once a step takes
    training    `spknet train`: time to the first step, utterances/s, time waiting for data
    exactness   losses in float64 on the device beside those on the CPU; with two GPUs, of two ranks beside one
    a kill      SIGKILL in the middle of a run, which goes on: its losses have the bits of one that never stopped

What does not fit into --seconds is left out, and a row says so.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from shards.pack import pack
from spknet.config import ModelConfig
from spknet.models import build_model
from spknet.models.describe import multiply_adds
from spknet.train.metrics_log import read_metrics
from tools.bench import end_to_end, step
from tools.bench.loader import make_wavs
from tools.bench.table import Row

MODELS = ("ResNetSE34L", "ResNet34", "ECAPA-1024", "CAM++", "ReDimNet2-B2", "ReDimNet2-B6")
SIZE = {"cpu": 256, "cuda": 8192}  # of the matrices
COPIED = {"cpu": 2**22, "cuda": 2**30}  # bytes


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where it runs (cuda)")
    parser.add_argument("--seconds", type=float, default=450.0, help="for all of it")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"networks ({' '.join(MODELS)})")
    parser.add_argument(
        "--precisions", nargs="+", choices=step.PRECISIONS, default=list(step.PRECISIONS), help="arithmetic (all)"
    )
    parser.add_argument("--batch", type=int, default=128, help="utterances of a step")
    parser.add_argument("--crop_seconds", type=float, default=2.0, help="length of a crop (2)")
    parser.add_argument("--steps", type=int, default=5, help="that are timed of each network; and of each short run")


def rows(chosen: argparse.Namespace) -> Iterator[Row]:
    end = time.monotonic() + chosen.seconds
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; see nvidia-smi, or try --device cpu", file=sys.stderr)
        raise SystemExit(2)
    limits = {}
    for row in ceilings(chosen.device):
        limits[row.what] = row.figure
        yield row
    # What may take longest comes last: compiled networks.
    plain = [p for p in chosen.precisions if p != "compile"]
    yield from networks(chosen, plain, limits, end)
    yield from runs(chosen, end)
    yield from networks(chosen, [p for p in chosen.precisions if p == "compile"], limits, end)


def ceilings(device: str) -> Iterator[Row]:
    """Multiply-adds count two operations. Largest of several, after one that is not timed."""
    n = SIZE[device]
    for name, kind in (("float32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
        with step.kernels(name):
            yield Row(name, 2e-12 * n**3 / fastest(lambda a=a, b=b: a @ b, a), "TFLOP/s")
    source = torch.zeros(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    # A copy reads and writes.
    yield Row("copy", 2e-9 * COPIED[device] / fastest(lambda: target.copy_(source), source), "GB/s")


def fastest(work: Callable, on: torch.Tensor) -> float:
    times = []
    for _ in range(6):
        step.synchronize(on)
        begun = time.perf_counter()
        work()
        step.synchronize(on)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def networks(chosen: argparse.Namespace, precisions: list[str], limits: dict, end: float) -> Iterator[Row]:
    how = argparse.Namespace(**{**vars(chosen), "seconds": chosen.crop_seconds, "threads": torch.get_num_threads()})
    for name in chosen.models:
        operations = 6 * multiply_adds(build_model(ModelConfig(name=name)), chosen.crop_seconds)
        for precision in precisions:
            what = f"{name}, {precision}"
            found = within(end, name, precision, how)
            step.give_back(chosen.device)  # to the processes that come next
            if isinstance(found, str):
                yield Row(f"{what}: left out, {found}", 0, "")
                continue
            seconds, baseline, memory = found
            speed, limit = chosen.batch / seconds, limits["bf16" if precision == "compile" else precision]
            yield Row(what, speed, "utterances/s", baseline / seconds, step.BASELINE)
            yield Row(what, 1e-12 * operations * speed, "TFLOP/s", 1e-12 * operations * speed / limit, "matrix ceiling")
            yield Row(what, memory / step.MIB, "MiB", 2e-9 * memory / seconds / limits["copy"], "copy ceiling")


def within(end: float, name: str, precision: str, how: argparse.Namespace) -> tuple | str:
    """step.measure, or why not. Compiled in a process of its own: a compiler cannot be stopped otherwise."""
    left = end - time.monotonic()
    if left <= 0:
        return "no time"
    try:
        if precision != "compile":
            return step.measure(name, precision, how)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply_async(step.measure, (name, precision, how)).get(timeout=left)
    except multiprocessing.TimeoutError:
        return "no time"
    except torch.OutOfMemoryError:
        return "the memory is full"


def runs(chosen: argparse.Namespace, end: float) -> Iterator[Row]:
    """Training, exactness and a kill, as `spknet train` does them."""
    with tempfile.TemporaryDirectory() as name:
        folder, n = Path(name), max(4, chosen.batch // 2)
        pack(make_wavs(folder / "wav", 4 * n, n), folder / "shards", progress=False)
        words = ["--data.train_shards", folder / "shards", "--log.every_steps", 1, "--model.name", chosen.models[0]]
        words += ["--data.crop_seconds", chosen.crop_seconds, "--log.tensorboard", "false"]
        small = [*words, "--data.speakers_per_batch", 4, "--train.max_steps", chosen.steps, "--model.width", 0.5]
        parts = {
            "training": lambda: training(chosen, [*words, "--data.speakers_per_batch", n], folder),
            "exactness": lambda: exactness(chosen, small, folder),
            "kill": lambda: kill(chosen, small, folder),
        }
        for what, part in parts.items():
            if time.monotonic() > end:
                yield Row(f"{what}: left out, no time", 0, "")
            else:
                yield from part()


def training(chosen: argparse.Namespace, words: list, folder: Path) -> Iterator[Row]:
    words = [*words, "--train.max_steps", 4 * chosen.steps, "--train.precision", "bf16"]
    first, _, lines = end_to_end.train(command(words, chosen.device, folder / "run"), folder / "run")
    later = lines[len(lines) // 2 :]  # the first ones start workers and choose kernels
    yield Row("command to the first step", first, "s")
    yield Row("training, bf16", sum(line["utterances_per_second"] for line in later) / len(later), "utterances/s")
    waited = [line["data_wait_fraction"] for line in later if "data_wait_fraction" in line]
    if waited:
        yield Row("waiting for data", 100 * sum(waited) / len(waited), "%")


def exactness(chosen: argparse.Namespace, words: list, folder: Path) -> Iterator[Row]:
    words = [*words, "--train.precision", "float64"]
    ways = {"the CPU": command(words, "cpu", folder / "cpu"), "one": command(words, chosen.device, folder / "one")}
    if chosen.device == "cpu" or torch.cuda.device_count() > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        ways["two ranks"] = [*torchrun, *command(words, chosen.device, folder / "two")[1:]]
    losses = {}
    for way, line in ways.items():
        run_dir = Path(line[-1])
        end_to_end.train(line, run_dir)
        losses[way] = losses_of(run_dir)
    for way in set(losses) - {"one"}:
        difference = max(abs(a - b) / abs(b) for a, b in zip(losses["one"], losses[way]))
        yield Row(f"losses on {chosen.device} and {way}, float64", difference, "largest difference, relative")


def kill(chosen: argparse.Namespace, words: list, folder: Path) -> Iterator[Row]:
    words = [*words, "--train.deterministic", "true", "--train.save_every_steps", 1]
    whole, killed = (command(words, chosen.device, folder / name) for name in ("whole", "killed"))
    end_to_end.train(whole, folder / "whole")
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list((folder / "killed").glob("checkpoints/step-*[1-9]*.pt")):
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = len(losses_of(folder / "killed"))
    end_to_end.train(killed, folder / "killed")
    same = losses_of(folder / "killed") == losses_of(folder / "whole")
    yield Row(f"killed after {reached} steps: losses equal bit for bit", float(same), "(1: yes)")


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def command(words: list, device: str, run_dir: Path) -> list[str]:
    start = [sys.executable, "-m", "spknet.train", *map(str, words), "--train.device", device]
    return [*start, "--run_dir", str(run_dir)]
