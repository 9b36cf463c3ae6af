"""From the command to the first steps of a training, in fresh processes, beside what Python needs to import torch.

    spknet bench end_to_end [--steps 10] [--words --train.precision bf16]

A corpus of noise is packed, and `spknet train` run on it. The first step has ended when its line stands in metrics.jsonl; the
end of the command includes its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shards.pack import pack
from spknet.errors import UserError
from tools.bench.loader import best, make_wavs
from tools.bench.table import Row

FAILED = 4000  # characters of what a run that failed has said


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=10, help="steps of a run (10)")
    parser.add_argument("--speakers", type=int, default=20, help="of a batch, two utterances each")
    parser.add_argument("--words", nargs=argparse.REMAINDER, default=[], help="further options of `spknet train`, last")


def rows(chosen: argparse.Namespace) -> Iterator[Row]:
    python = [sys.executable]
    imported = timed([*python, "-c", "import torch"])
    for what, command in {
        "spknet --help": [*python, "-m", "spknet", "--help"],
        "import spknet": [*python, "-c", "import spknet"],
        "spknet train --print_config": [*python, "-m", "spknet", "train", "--print_config"],
    }.items():
        seconds = timed(command)
        yield Row(what, seconds, "s", seconds / imported, "import torch")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack(make_wavs(folder / "wav", 4 * chosen.speakers, 2 * chosen.speakers), folder / "shards", progress=False)
        words = ["--data.train_shards", folder / "shards", "--data.speakers_per_batch", chosen.speakers]
        words += ["--train.max_steps", chosen.steps, "--log.every_steps", 1, "--run_dir", folder / "run", *chosen.words]
        first, whole, lines = train([*python, "-m", "spknet", "train", *map(str, words)], folder / "run")
    yield Row("command to the first step", first, "s", first / imported, "import torch")
    yield Row(f"command to the end of {chosen.steps} steps", whole, "s", whole / imported, "import torch")
    yield Row("training, by the run's own log", lines[-1]["utterances_per_second"], "utterances/s")
    if "data_wait_fraction" in lines[-1]:
        yield Row("waiting for data", 100 * lines[-1]["data_wait_fraction"], "%")


def timed(command: list[str]) -> float:
    """Least seconds of three runs: the first may have read from a disk."""
    return best(lambda: subprocess.run(command, check=True, capture_output=True), 0)


def train(command: list[str], run_dir: Path) -> tuple[float, float, list[dict]]:
    """Seconds to the first step and to the end, and the lines of metrics.jsonl. Raises UserError where the run fails."""
    metrics, begun, first = run_dir / "metrics.jsonl", time.perf_counter(), None
    with open(run_dir.parent / "said", "w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        while process.poll() is None:
            if first is None and metrics.exists() and metrics.stat().st_size:
                first = time.perf_counter() - begun
            time.sleep(0.01)
        whole = time.perf_counter() - begun
        said.seek(0)
        if process.returncode:
            raise UserError(f"the training ended with status {process.returncode}: {said.read()[-FAILED:]}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return first or whole, whole, [line for line in lines if "loss" in line]
