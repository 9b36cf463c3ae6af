"""How fast `Network.embed` is on a list, and how much memory an hour takes. `python -m tools.bench embed`

Speed: the same files one after the other, `[network.embed(path) for path in files]`, and as one list, in turns in one run;
the ratio is that of the medians. One after the other torch shares each product between the threads; in a list each thread embeds
another file. Decoding is part of both. Without --checkpoint the network is a ResNetSE34L with its initial weights.

Memory: the most that a fresh process has had (VmHWM), for 30 s and for an hour of made sound at 16 kHz.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

import spknet
from spknet import config, rng
from spknet.checkpoints import file as checkpoint
from spknet.models import build_model

MEASURE = """
import sys, spknet
from tools.bench.score import peak
network = spknet.load(sys.argv[1], "cpu")
network.embed(sys.argv[2])
before = peak()
network.embed(sys.argv[3])
print(f"{before:.0f} {peak() - before:.0f}")
"""


def timed(work) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    begun = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def speed(network: spknet.Network, files: list[str], rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    ways = {
        "one after the other": lambda: [network.embed(path) for path in files],
        "as a list": lambda: network.embed(files),
    }
    network.embed(files[:8])
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(timed(work))
    print(f"{len(files)} files, {threads} threads, median of {rounds} rounds:")
    medians = {name: [statistics.median(values) for values in zip(*rows)] for name, rows in found.items()}
    for name, (wall, cpu) in medians.items():
        print(f"  {name}: {wall:.2f} s, {len(files) / wall:.1f} files/s, {cpu:.2f} s of the processor")
    one, listed = (wall for wall, _ in medians.values())
    print(f"  ratio {one / listed:.2f}")


def memory(checkpoint_path: str, folder: Path) -> None:
    generator = np.random.default_rng(0)
    minute = (3000 * generator.standard_normal(60 * 16000)).astype(np.int16)
    soundfile.write(folder / "short.wav", minute[: 30 * 16000], 16000, subtype="PCM_16")
    for name in ("hour.wav", "hour.flac"):
        with soundfile.SoundFile(folder / name, "w", 16000, 1, subtype="PCM_16") as file:
            for _ in range(60):
                file.write(minute)
        words = [checkpoint_path, str(folder / "short.wav"), str(folder / name)]
        done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True)
        before, more = done.stdout.split()
        print(f"{name}: {more} MiB more than 30 s, after which the process had {before} MiB")


def initial(folder: Path) -> str:
    """A run of a network with its initial weights."""
    c = config.Config()
    model = build_model(c.model)
    rng.initialize(model, 0)
    state = {"step": 0, "epoch": 0.0, "config": config.to_dict(c), "model": model.state_dict()}
    checkpoint.save(folder / "run", state, keep=0)
    return str(folder / "run")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench embed", description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="../shared/speech", help="folder of audio files")
    parser.add_argument("--files", type=int, default=400, help="how many of them, drawn with a fixed seed")
    parser.add_argument("--checkpoint", help="run or file; default: an untrained ResNetSE34L")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--only", choices=("speed", "memory"))
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = chosen.checkpoint or initial(Path(folder))
        if chosen.only != "memory":
            files = sorted(str(path) for path in Path(chosen.root).rglob("*.flac"))
            files = random.Random(0).sample(files, min(chosen.files, len(files)))
            for threads in chosen.threads:
                speed(spknet.load(path, "cpu"), files, chosen.rounds, threads)
        if chosen.only != "speed":
            memory(path, Path(folder))
    return 0
