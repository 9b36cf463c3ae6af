"""How fast `Network.embed` is on a list, and how much memory an hour of audio takes.

Speed: the same files as one list and one after the other, [network.embed(path) for path in files], in turns in one run; decoding
is part of both. One after the other torch shares each product between the threads; in a list each thread embeds another file.
The network alone, on noise of the files' mean length from memory, a wave a thread, is the most that a list could reach.
Memory: the most that a fresh process has had (VmHWM) beyond what 30 s took, for an hour of made sound at 16 kHz. Without
--checkpoint the network is the default one with its initial weights.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch

import spknet
from spknet import config, rng
from spknet.checkpoints import file as checkpoint
from spknet.models import build_model
from tools.bench.table import Row, beside

MEASURE = """
import sys, spknet
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
network = spknet.load(sys.argv[1], "cpu")
network.embed(sys.argv[2])
before = peak()
network.embed(sys.argv[3])
print(peak() - before)
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", default="../shared/speech", help="folder of FLAC files")
    parser.add_argument(
        "--files", type=int, default=400, help="how many of them, drawn with a fixed seed (default 400)"
    )
    parser.add_argument("--checkpoint", help="run or file")
    parser.add_argument("--rounds", type=int, default=3, help="of both ways; their medians count (default 3)")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="of torch (default 2)")
    parser.add_argument("--only", choices=("speed", "memory"), help="only this part")


def rows(chosen: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = chosen.checkpoint or initial(Path(folder))
        if chosen.only != "memory":
            files = sorted(str(path) for path in Path(chosen.root).rglob("*.flac"))
            files = random.Random(0).sample(files, min(chosen.files, len(files)))
            for threads in chosen.threads:
                yield from speed(spknet.load(path, "cpu"), files, chosen.rounds, threads)
        if chosen.only != "speed":
            yield from memory(path, Path(folder))


def initial(folder: Path) -> str:
    """A run of a network with its initial weights."""
    c = config.Config()
    model = build_model(c.model)
    rng.initialize(model, 0)
    state = {"step": 0, "epoch": 0.0, "config": config.to_dict(c), "model": model.state_dict()}
    checkpoint.save(folder / "run", state, keep=0)
    return str(folder / "run")


def speed(network: spknet.Network, files: list[str], rounds: int, threads: int) -> Iterator[Row]:
    torch.set_num_threads(threads)
    seconds = statistics.mean(soundfile.info(path).duration for path in files)
    wave = torch.randn(1, round(seconds * network.sample_rate), generator=torch.Generator().manual_seed(0)) / 10

    @torch.inference_mode()
    def forward(_) -> None:
        network.model(wave)

    def network_alone() -> None:
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            list(pool.map(forward, files))
        torch.set_num_threads(threads)

    ways = {
        f"a list, {threads} threads": lambda: network.embed(files),
        f"one after the other, {threads} threads": lambda: [network.embed(path) for path in files],
        f"the network alone on {seconds:.1f} s, {threads} threads": network_alone,
    }
    network.embed(files[:8])
    took, of_cpu = {name: [] for name in ways}, {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            begun, used = time.perf_counter(), time.process_time()
            work()
            took[name].append(time.perf_counter() - begun)
            of_cpu[name].append(time.process_time() - used)
    yield from beside({name: len(files) / statistics.median(each) for name, each in took.items()}, "files/s")
    for name, each in of_cpu.items():
        yield Row(f"{name}, CPU time", 1000 * statistics.median(each) / len(files), "ms a file")


def memory(run: str, folder: Path) -> Iterator[Row]:
    minute = (3000 * np.random.default_rng(0).standard_normal(60 * 16000)).astype(np.int16)
    soundfile.write(folder / "short.wav", minute[: 30 * 16000], 16000, subtype="PCM_16")
    for name in ("hour.wav", "hour.flac"):
        with soundfile.SoundFile(folder / name, "w", 16000, 1, subtype="PCM_16") as file:
            for _ in range(60):
                file.write(minute)
        words = [run, str(folder / "short.wav"), str(folder / name)]
        done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True)
        yield Row(f"{name}, beyond 30 s", float(done.stdout), "MiB")
