"""The one table of all benchmarks: what was measured, its figure, and how many times the figure of what stands beside it in
the same run; on the screen line by line, and as JSON.

    for row in rows: table.show(row)
    table.write("bench.json", "loader", chosen, rows)
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shards.format import write_file


class Row(NamedTuple):
    """ratio: this figure over that of `beside`."""

    what: str
    figure: float
    unit: str
    ratio: float | None = None
    beside: str = ""


def beside(figures: dict[str, float], unit: str) -> Iterator[Row]:
    """The first figure, and the others with the first's over theirs."""
    first, *others = figures
    yield Row(first, figures[first], unit)
    for name in others:
        yield Row(first, figures[first], unit, figures[first] / figures[name], f"{name} ({number(figures[name])})")


def in_turn(ways: dict[str, Callable[[int], object]], seconds: float, clock=time.process_time, rounds: int = 2):
    """({name: median seconds of a call}, {name: what the last call gave}) of ways that are called with the round's number.

    They take turns, so that a busy neighbour slows all of them, for `seconds` at least. The first round is not timed: it
    makes tables and fills caches. `rounds`: fewest that are.
    """
    times, found, end = {name: [] for name in ways}, {}, time.perf_counter() + seconds
    for number in itertools.count():
        if number > rounds and time.perf_counter() > end:
            return {name: statistics.median(values[1:]) for name, values in times.items()}, found
        for name, way in ways.items():
            begun = clock()
            found[name] = way(number)
            times[name].append(clock() - begun)


def show(row: Row) -> None:
    ratio = "" if row.ratio is None else f"{row.ratio:8.3g} x {row.beside}"
    print(f"{row.what:<46} {number(row.figure):>12} {row.unit:<14}{ratio}".rstrip(), flush=True)


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 or x == round(x) else f"{x:.4g}"


def machine() -> dict:
    """Where the figures are from, and how busy it was."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    load = round(os.getloadavg()[0], 1)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load": load,
        "gpus": gpus,
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def write(path: str, name: str, chosen: argparse.Namespace, rows: list[Row]) -> None:
    content = {"benchmark": name, "machine": machine(), "options": vars(chosen), "rows": [r._asdict() for r in rows]}
    write_file(path, json.dumps(content, indent=1, default=str))
