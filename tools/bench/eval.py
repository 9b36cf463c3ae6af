"""Embedding the utterances of a list, beside one utterance after the other in the same process.

    spknet bench eval [--model ResNetSE34L] [--utterances 64] [--device cuda --precision bf16]

Both ways take the same files (made-up audio, whole utterances of 4 to 8 s in steps of a second, and 10 crops of 4 s of each) and
the same network. One by one is voxceleb_trainer's way: read a file, run its crops through the network, fetch the embedding.
On one CPU thread the process's own time counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch

from spknet.evaluate.embed import Embedding, embed
from spknet.evaluate.utterances import Crops, Sources
from tools.bench.step import build
from tools.bench.table import Row, in_turn

RATE = 16000


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ResNetSE34L", help="network (ResNetSE34L)")
    parser.add_argument("--utterances", type=int, default=64, help="made-up files (64)")
    parser.add_argument("--crops", type=int, default=10, help="of 4 s each")
    parser.add_argument("--runs", type=int, default=3, help="of each way, in turn")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where it runs (cpu)")
    parser.add_argument("--precision", default="float32", choices=("float32", "bf16"), help="arithmetic (float32)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")


def make_files(folder: Path, utterances: int) -> list[str]:
    paths, generator = [], np.random.default_rng(0)
    for i in range(utterances):
        paths.append(str(folder / f"id{i % 8:05d}-{i:05d}.wav"))
        soundfile.write(paths[-1], generator.normal(0, 0.05, (4 + i % 5) * RATE), RATE, subtype="PCM_16")
    return paths


def rows(chosen: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(chosen.threads)
    clock = time.process_time if chosen.device == "cpu" and chosen.threads == 1 else time.perf_counter
    model = build(chosen.model, chosen.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(Path(folder), chosen.utterances)
        sources = Sources(sample_rate=RATE)
        places = sources.measure(sources.locate(paths))
        for name, crops in (("whole", Crops()), (f"{chosen.crops} crops of 4 s", Crops(4 * RATE, chosen.crops))):
            how = Embedding(crops, bf16=chosen.precision == "bf16")
            ways = {
                "ours": lambda _, how=how: embed(model, sources, places, how),
                "one by one": lambda _, how=how: one_by_one(model, paths, how),
            }
            seconds, found = in_turn(ways, 0, clock, chosen.runs)
            if how.bf16 is False:
                np.testing.assert_allclose(found["ours"], found["one by one"], atol=1e-3)
            speeds = {way: len(paths) / value for way, value in seconds.items()}
            what = f"{chosen.model}, {name}, {chosen.precision}"
            yield Row(what, speeds["ours"], "utterances/s", speeds["ours"] / speeds["one by one"], "one by one")


@torch.no_grad()
def one_by_one(model, paths: list[str], how: Embedding) -> np.ndarray:
    device, found = next(model.parameters()).device, []
    for path in paths:
        audio, _ = soundfile.read(path, dtype="int16")
        with torch.autocast(device.type, torch.bfloat16, enabled=how.bf16):
            rows = model(torch.from_numpy(how.crops.cut(audio)).to(device).float() / 32768)
        found.append(rows.float().cpu())
    return torch.stack(found).numpy()
