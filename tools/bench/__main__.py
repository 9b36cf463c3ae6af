"""Benchmarks: programs that print ratios measured in one run. `python -m tools.bench NAME [options]`, names below."""

from __future__ import annotations

import importlib
import sys

from spknet.errors import run

BENCHMARKS = {
    "loader": "tools.bench.loader",
    "augment": "tools.bench.augment",
    "embed": "tools.bench.embed",
    "exact": "tools.bench.exact",
    "head": "tools.bench.head",
    "score": "tools.bench.score",
    "step": "tools.bench.step",
    "voxceleb": "tools.bench.voxceleb",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in BENCHMARKS:
        print(f"usage: python -m tools.bench {'|'.join(BENCHMARKS)} [options]", file=sys.stderr)
        return 2
    return importlib.import_module(BENCHMARKS[argv[0]]).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(run(main))
