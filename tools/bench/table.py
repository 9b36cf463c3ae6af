"""The one table of all benchmarks: what was measured, its figure, and how many times the figure of what stands beside it in
the same run; on the screen line by line, and as JSON.

    for row in rows: table.show(row)
    table.write("bench.json", "loader", chosen, rows)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from typing import NamedTuple

from shards.format import atomic_write


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
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1, default=str).encode())
