"""What a packed data set holds: a small table and two histograms in the terminal.

Usage: spknet stats data/shards/vox2
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from shards import errors, index
from shards.commands import Parser, command

WIDTH = 40  # characters of the longest bar
BINS = 10


def describe(opened: index.Index) -> str:
    """The table and the histograms of a data set as text."""
    meta, rate = opened.meta, opened.sample_rate
    seconds = opened.rows["samples"] / rate
    counts = np.diff(opened.speaker_rows.astype(np.int64))
    stored = int(opened.tars["filesize"].sum())
    lines = [
        ("speakers", f"{meta['speakers']:,}"),
        ("utterances", f"{meta['utterances']:,}"),
        ("hours", f"{meta['samples'] / rate / 3600:,.2f}"),
        ("rate, codec", f"{rate} Hz, {meta['codec']}"),
        ("tars", f"{len(opened.tars):,}, {stored / 2**30:,.2f} GiB"),
        ("left out as bad", f"{meta['skipped']:,}"),
        ("fingerprint", meta["fingerprint"][:16]),
    ]
    table = [f"{name:<24}{value}" for name, value in lines]
    table += ["", f"{'':<24}{'least':>9}{'median':>9}{'mean':>9}{'most':>9}"]
    for name, values in (("seconds", seconds), ("utterances per speaker", counts)):
        numbers = (values.min(), np.median(values), values.mean(), values.max())
        table.append(f"{name:<24}" + "".join(f"{number:>9.1f}" for number in numbers))
    return "\n".join(
        table + histogram("seconds of an utterance", seconds) + histogram("utterances of a speaker", counts)
    )


def histogram(title: str, values: np.ndarray) -> list[str]:
    """Lines of a histogram with bins of equal width; the last bin takes the longest 1 % in."""
    top = float(np.quantile(values, 0.99))
    low = float(values.min())
    edges = np.linspace(low, top if top > low else low + 1, BINS + 1)
    counts = np.histogram(np.minimum(values, edges[-1]), edges)[0]
    lines = ["", title]
    for i, count in enumerate(counts.tolist()):
        bar = "#" * max(round(WIDTH * count / counts.max()), 1 if count else 0)
        upper = f"{edges[i + 1]:>8.1f}" if i < BINS - 1 else "     ..."
        lines.append(f"{edges[i]:>8.1f} -{upper}{count:>12,} {bar}".rstrip())
    return lines


@errors.told
def main(argv: list[str] | None = None) -> None:
    p = Parser(command("stats"), description="What packed data sets hold.")
    p.add_argument("out", nargs="+", type=Path, help="folder of a packed data set")
    for out in p.parse_args(argv).out:
        print(f"{out}\n{describe(index.open_index(out))}")


if __name__ == "__main__":
    sys.exit(main())
