"""The same run on 1, 2 and 4 ranks, beside the way of prototypes local to a rank: the tables of docs/exactness.md.

    python -m tools.exactness --shards data/shards/speech --trials speech/test_list.txt --root speech

Runs spknet.train under torchrun over gloo: a few steps in float64 and in float32, then a longer float32 run as spknet does it
and as `local`: each rank scores its own speakers only, BatchNorm sees its own rows only, as voxceleb_trainer under DDP.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from shards.commands import Parser
from spknet.parallel import gather
from spknet.train.metrics_log import read_metrics


def local_losses():
    """A context in which losses see this rank's rows only."""
    alone = {"world_size": lambda: 1, "rank": lambda: 0}
    return mock.patch.multiple(gather, gather_rows=lambda x: x, all_reduce_sum=lambda x: x.detach(), **alone)


def run(folder: Path, world: int, words: list[str], local: bool = False) -> tuple[list[float], dict, dict]:
    """(loss of each step, scores by trial, the evaluation's figures) of one run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command += ["-m", "tools.exactness", "local"] if local else ["-m", "spknet.train"]
    command += [*words, "--run_dir", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    scores_file = max((folder / "eval").glob("step-*")) / "scores.txt"
    scores = {}
    for line in scores_file.read_text().splitlines():
        score, left, right, *_ = line.split()
        scores[left, right] = float(score)
    return losses, scores, next(line["eval"] for line in reversed(lines) if "eval" in line)


def differences(base: tuple, other: tuple) -> tuple[float, float]:
    """(largest relative difference of a loss, largest absolute difference of a score)."""
    loss = max(abs(a - b) / abs(a) for a, b in zip(base[0], other[0]))
    return loss, max(abs(base[1][trial] - other[1][trial]) for trial in base[1])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["local"]:
        from spknet.train.__main__ import main as train

        with local_losses():
            return train([*argv[1:], "--train.sync_batchnorm", "false"])
    parser = Parser(prog="python -m tools.exactness", description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True, help="packed training data")
    parser.add_argument("--trials", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--speakers", type=int, default=40, help="speakers of a batch")
    parser.add_argument("--steps", type=int, default=5, help="of the runs compared number by number; 0: none")
    parser.add_argument("--long-steps", type=int, default=200, help="of the runs with local prototypes; 0: none")
    parser.add_argument("--width", type=float, default=0.25, help="of ResNetSE34L's channels")
    chosen = parser.parse_args(argv)
    words = f"--data.train_shards {chosen.shards} --data.speakers_per_batch {chosen.speakers} --data.workers 0"
    words += f" --eval.trials {chosen.trials} --eval.root {chosen.root} --eval.every_epochs 0 --eval.crop_seconds 3"
    words += f" --model.width {chosen.width} --log.every_steps 1 --log.tensorboard false"
    with tempfile.TemporaryDirectory() as temporary:
        if chosen.steps:
            compare_numbers(Path(temporary), words.split(), chosen)
        if chosen.long_steps:
            compare_ways(Path(temporary), words.split(), chosen)
    return 0


def compare_numbers(folder: Path, words: list[str], chosen: argparse.Namespace) -> None:
    print(f"{chosen.steps} steps, N={chosen.speakers}, M=2, {chosen.width:g} of ResNetSE34L's channels, against 1 rank")
    print("\n| precision | ranks | largest relative difference of a loss | largest difference of a score |")
    print("|---|---|---|---|")
    for precision in ("float64", "float32"):
        few = [*words, "--train.precision", precision, "--train.max_steps", str(chosen.steps)]
        base = run(folder / f"{precision}-1", 1, few)
        for world in (2, 4):
            loss, score = differences(base, run(folder / f"{precision}-{world}", world, few))
            print(f"| {precision} | {world} | {loss:.1e} | {score:.1e} |", flush=True)


def compare_ways(folder: Path, words: list[str], chosen: argparse.Namespace) -> None:
    print(f"\n{chosen.long_steps} steps in float32\n")
    print("| ranks | way | loss, mean of the last 20 steps | EER % (95 % interval) |\n|---|---|---|---|")
    many = [*words, "--train.max_steps", str(chosen.long_steps), "--optim.schedule", "cosine"]
    for world, local in ((1, False), (2, False), (4, False), (2, True), (4, True)):
        losses, _, found = run(folder / f"long-{world}-{local}", world, many, local)
        between = f"{found['eer_low']:.1f} to {found['eer_high']:.1f}"
        way = "local prototypes and BatchNorm" if local else "spknet"
        print(f"| {world} | {way} | {sum(losses[-20:]) / 20:.4f} | {found['eer']:.2f} ({between}) |", flush=True)
    print("\n" + json.dumps({"command": sys.argv[1:]}))


if __name__ == "__main__":
    raise SystemExit(main())
