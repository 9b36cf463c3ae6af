"""A run over a million speakers from end to end, on made-up noise: seconds and memory of every stage.

    python -m tools.million --out /scratch/million [--speakers 1000000] [--ranks 2] [--steps 20]

Three utterances of 20 ms a speaker (a few hundred files of noise under three million keys) are packed; the data set is
opened and a batch is drawn; ResNetSE34L with a quarter of its channels is trained on --ranks ranks with AAM over a head in
pieces, killed after half of its steps and continued. A table is printed as docs/million.md has it. What the network learns
is nothing: this shows that the road carries the load. 2.5 kB a key on disk: 7.7 GB for a million speakers.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

from shards.commands import Parser
from shards.pack import pack
from spknet.train.metrics_log import read_metrics

SOURCES, UTTERANCES, SAMPLES = 256, 3, 320
SMALL = 30  # MiB: a process that is not worth a number

OPEN = """
import sys
from spknet.config import DataConfig
from spknet.data.corpus import Corpus
data = DataConfig(train_shards=sys.argv[1], speakers_per_batch=64, plan="formula", dev_speakers=100)
corpus = Corpus.open(data, 0)
print(len(corpus.utterances), corpus.n_classes, corpus.sampler.steps, corpus.sampler.batch(0, 0).shape)
"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m tools.million", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for everything")
    parser.add_argument("--speakers", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stage", choices=["pack"], help="this stage alone, in this process")
    chosen = parser.parse_args(argv)
    out = Path(chosen.out)
    if chosen.stage:
        pack_noise(out, chosen.speakers)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    print("| stage | seconds | peak of each process, MiB |\n|---|---|---|")
    again = [sys.executable, "-m", "tools.million", "--out", chosen.out, "--speakers", str(chosen.speakers)]
    words = training(out, chosen)
    with open(out / "million.log", "ab") as log:
        watch("list and pack", [*again, "--stage", "pack"], log)
        watch("open, dev speakers, first batch", [sys.executable, "-c", OPEN, str(out / "shards")], log)
        watch(f"train, killed after {chosen.steps // 2} steps", words, log, out / "run", chosen.steps // 2)
        watch("continue to the end", words, log)
    lines = read_metrics(out / "run/metrics.jsonl")
    print(f"\nsteps {len(lines)}, losses {lines[0]['loss']:.4f} to {lines[-1]['loss']:.4f}")
    return 0


def pack_noise(out: Path, speakers: int) -> None:
    """Packs every speaker's three keys, each one of a few files of noise."""
    (out / "noise").mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(SOURCES):
        noise = generator.integers(-3000, 3000, SAMPLES).astype(np.int16)
        soundfile.write(out / f"noise/{i}.wav", noise, 16000, subtype="PCM_16")
    names = [str(out / f"noise/{i}.wav") for i in range(SOURCES)]
    entries = (
        (f"s{s:07d}", f"s{s:07d}/{u}", names[(3 * s + u) % SOURCES]) for s in range(speakers) for u in range(UTTERANCES)
    )
    pack(entries, out / "shards", shard_bytes=2**28, workers=1, progress=False)


def training(out: Path, chosen: argparse.Namespace) -> list[str]:
    options = {
        "data.train_shards": out / "shards",
        "data.speakers_per_batch": 64,
        "data.utterances_per_speaker": 1,
        "data.crop_seconds": 0.5,
        "data.plan": "formula",
        "data.workers": 1,
        "model.width": 0.25,
        "model.embedding_size": 192,
        "loss.name": "aamsoftmax",
        "loss.sharded": "true",
        "optim.name": "sgd",
        "train.max_steps": chosen.steps,
        "train.save_every_steps": max(1, chosen.steps // 4),
        "train.keep_checkpoints": 1,
        "train.threads": 1,
        "log.every_steps": 1,
        "log.tensorboard": "false",
        "run_dir": out / "run",
    }
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(chosen.ranks)]
    return [*start, "-m", "spknet.train", *(str(word) for k, v in options.items() for word in (f"--{k}", v))]


def watch(stage: str, words: list[str], log, run_dir: Path | None = None, die_after: int = 0) -> None:
    """Runs a command, what it says going to the file `log`, and prints a line of the table.

    die_after: kills it when so many steps are logged. Leaves the program where it fails.
    """
    begun, peaks = time.monotonic(), {}
    killed = False
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log)
    while process.poll() is None:
        for pid, mebibytes in tree(process.pid).items():
            peaks[pid] = max(peaks.get(pid, 0), mebibytes)
        metrics = run_dir and run_dir / "metrics.jsonl"
        if metrics and metrics.exists() and metrics.read_bytes().count(b"\n") >= die_after:
            for pid in tree(process.pid):  # what was started here, and nothing else
                os.kill(pid, signal.SIGKILL)
            killed = True
        time.sleep(0.1)
    if process.returncode and not killed:
        raise SystemExit(f"{stage}: exit status {process.returncode}: {' '.join(words)}")
    seconds = time.monotonic() - begun
    each = " + ".join(f"{peak:,.0f}" for peak in sorted(peaks.values(), reverse=True) if peak >= SMALL)
    print(f"| {stage} | {seconds:.0f} | {each} |", flush=True)


def tree(root: int) -> dict[int, float]:
    """The largest resident set so far of a process and its descendants, MiB, pages shared between them counted in each."""
    parents, peaks, found = {}, {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            pid = int(folder.name)
            parents[pid], peaks[pid] = int(lines["PPid"]), int(lines.get("VmHWM", "0 kB").split()[0]) / 1024
        except (FileNotFoundError, ProcessLookupError):
            continue
    for pid in peaks:
        above = pid
        while above not in (0, root):
            above = parents.get(above, 0)
        if above == root:
            found[pid] = peaks[pid]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
