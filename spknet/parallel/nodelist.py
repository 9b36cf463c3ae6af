"""SLURM's compressed node lists, read without scontrol, which containers lack.

hosts("gpu[01-03,7],login")  ->  ["gpu01", "gpu02", "gpu03", "gpu7", "login"]
"""

from __future__ import annotations

import itertools
import re

from spknet.errors import UserError


def hosts(nodelist: str) -> list[str]:
    """The nodes of a list in its order. Raises UserError for a list that is none."""
    found: list[str] = []
    for name in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist):
        parts = re.split(r"\[([^\]]*)\]", name)  # text, ranges, text, ranges, ..., text
        choices = [[part] if i % 2 == 0 else _numbers(part, nodelist) for i, part in enumerate(parts)]
        found += ["".join(choice) for choice in itertools.product(*choices)]
    if not found or nodelist.count("[") != nodelist.count("]"):
        raise UserError(f"SLURM's node list {nodelist!r} cannot be read; set MASTER_ADDR to the first node's name")
    return found


def first_host(nodelist: str) -> str:
    """The first node of a list."""
    return hosts(nodelist)[0]


def _numbers(ranges: str, nodelist: str) -> list[str]:
    found = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            raise UserError(f"SLURM's node list {nodelist!r} cannot be read; set MASTER_ADDR to the first node's name")
        low, high = match[1], match[2] or match[1]
        found += [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return found
