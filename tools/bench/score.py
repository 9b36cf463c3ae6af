"""How fast scoring and error rates are, on synthetic embeddings of VoxCeleb1's size. `spknet bench score`

Lists O, E and H have VoxCeleb1's numbers of trials and utterances (original lists), 512 dimensions. The loop that the
10-crop figure is a ratio to scores one trial at a time, as voxceleb_trainer does; it is timed on a part and scaled.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from spknet.evaluate import bootstrap, cohort, metrics, scoring
from tools.bench.step import MIB, resident
from tools.bench.table import Row

TRIALS = {"O": 37_720, "O cleaned": 37_611, "E": 581_480, "E cleaned": 579_818, "H": 552_536, "H cleaned": 550_894}
UTTERANCES = {"O": 4_708, "E": 145_375, "H": 138_137}
SPEAKERS, DIMENSIONS, COHORT, TOP = 1251, 512, 5994, 300


def timed(work) -> tuple[float, object]:
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def pairs(name: str, generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both sides of a list's trials."""
    return tuple(generator.integers(0, UTTERANCES[name.split()[0]], TRIALS[name]) for _ in range(2))


def loop(crops: torch.Tensor, left, right, dimension: int) -> list[float]:
    """Scores trial by trial: all pairs of crops expanded to (crops, D, crops), their distances, the mean.

    dimension 2 is voxceleb_trainer's line as it stands, which reduces the last dimension instead of D: today's cost of that
    program, but not the score that it means. With dimension 1 the same tensors give that score.
    """
    scores, n = [], crops.shape[1]
    for i, j in zip(left, right):
        a, b = (torch.nn.functional.normalize(crops[k], dim=1) for k in (i, j))
        a, b = a.unsqueeze(-1).expand(-1, -1, n), b.unsqueeze(-1).expand(-1, -1, n).transpose(0, 2)
        if dimension == 1:
            a, b = a.transpose(1, 2), b.transpose(1, 2)
        scores.append(-float(np.mean(torch.nn.functional.pairwise_distance(a, b).numpy())))
    return scores


def crop_scoring(generator, part: int, threads: int) -> Iterator[Row]:
    rows = generator.standard_normal((UTTERANCES["O"], 10, DIMENSIONS), dtype=np.float32)
    left, right = pairs("O", generator)
    crops = torch.from_numpy(rows)
    # Length normalisation is part of all of them.
    fast, blocked = min(
        (timed(lambda: scoring.mean_distance(rows, rows, left, right, True, threads)) for _ in range(5)),
        key=lambda pair: pair[0],
    )
    for dimension, name in ((2, "voxceleb_trainer's line as it stands"), (1, "the same over the right dimension")):
        one_by_one = functools.partial(loop, crops, left[:part], right[:part], dimension)
        slow, scores = min((timed(one_by_one) for _ in range(3)), key=lambda pair: pair[0])
        slow *= len(left) / part
        yield Row("O, 10 crops, mean distance", fast, "s", fast / slow, f"{name}, one by one ({part} timed)")
    different = left[:part] != right[:part]
    assert np.abs(blocked[:part] - scores)[different].max() < 1e-4


def cosine_and_as_norm(generator, threads: int) -> Iterator[Row]:
    rows = scoring.unit(generator.standard_normal((UTTERANCES["E"], DIMENSIONS), dtype=np.float32))
    for name in TRIALS:
        sides = pairs(name, generator)
        fast = min(timed(functools.partial(scoring.cosine, rows, rows, *sides, threads))[0] for _ in range(2))
        yield Row(f"{name}, cosine", fast, "s")
    others = scoring.unit(generator.standard_normal((COHORT, DIMENSIONS), dtype=np.float32))

    def normalised(left, right):
        statistics = cohort.statistics(rows, others, TOP, threads)
        return cohort.as_norm(scoring.cosine(rows, rows, left, right, threads), statistics, statistics, left, right)

    for times in (1, 10):
        sides = [np.tile(side, times) for side in pairs("E", generator)]
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        seconds, scores = timed(functools.partial(normalised, *sides))
        what = f"E {times} x, AS-norm (cohort {COHORT}, top {TOP})"
        yield Row(what, seconds, "s")
        # Cosines take half as much as the scores.
        yield Row(
            what, (resident("VmHWM") - before) / MIB, "MiB", (resident("VmHWM") - before) / scores.nbytes, "the scores"
        )


def error_rates(generator) -> Iterator[Row]:
    labels = generator.random(10_000_000) < 0.1
    scores = generator.standard_normal(len(labels), dtype=np.float32) + 2 * labels

    def all_of_them():
        r = metrics.rates(scores, labels)
        return metrics.eer(r), metrics.min_dcf(r, 0.01), metrics.min_dcf(r, 0.05), metrics.cllr(scores, labels)

    yield Row("10 M trials, EER, minDCF, Cllr", timed(all_of_them)[0], "s")
    yield Row("the same with minCllr", timed(lambda: metrics.figures(scores, labels))[0], "s")


def intervals(generator) -> Iterator[Row]:
    labels = generator.random(TRIALS["E"]) < 0.5
    left = generator.integers(0, SPEAKERS, len(labels))
    right = np.where(labels, left, (left + generator.integers(1, SPEAKERS, len(labels))) % SPEAKERS)
    scores = generator.standard_normal(len(labels), dtype=np.float32) + 4 * labels
    seconds, _ = timed(lambda: bootstrap.replicate(scores, labels, left, right, 1000))
    yield Row(f"E, bootstrap over {SPEAKERS} speakers, 1,000 times", seconds, "s")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (2)")
    parser.add_argument("--loop_trials", type=int, default=2000, help="trials of the loop that are timed")
    parser.add_argument(
        "--only", nargs="+", choices=("crops", "cosine", "rates", "bootstrap"), help="part of the figures"
    )


def rows(chosen: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(chosen.threads)
    generator = np.random.default_rng(0)
    parts = {
        "crops": lambda: crop_scoring(generator, chosen.loop_trials, chosen.threads),
        "cosine": lambda: cosine_and_as_norm(generator, chosen.threads),
        "rates": lambda: error_rates(generator),
        "bootstrap": lambda: intervals(generator),
    }
    for name in chosen.only or parts:
        yield from parts[name]()
