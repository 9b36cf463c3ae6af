"""Speed of every part, each beside what it can run in the same process: `spknet bench NAME`, or `python -m tools.bench NAME`.

A benchmark is a file here with `add_options(parser)` and `rows(chosen)`, which yields rows of the one table (table.py).
"""

from __future__ import annotations

import argparse
import importlib
import sys

from shards.commands import Parser, did_you_mean
from spknet.errors import USAGE, run

BENCHMARKS = {
    "loader": "crops from shards, packing, the index",
    "augment": "augmented crops with features",
    "step": "a training step of each network: speed, memory",
    "beside": "a training step beside voxceleb_trainer's",
    "head": "a head over many classes, whole and cut over ranks",
    "eval": "embedding of a list's utterances",
    "embed": "spknet.load's embed: a list beside one file after the other; memory of an hour",
    "score": "scoring, error rates, intervals at VoxCeleb1's size",
    "scaling": "1 and more ranks here; what exactness costs; a model of 8 to 512 GPUs",
    "end_to_end": "from the command to the first steps",
    "voxceleb": "from VoxCeleb's archives to shards",
    "gpu": "everything for a GPU in one command (also: --gpu)",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--gpu"]:
        argv = ["gpu", *argv[1:]]
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: spknet bench NAME [options] [--json FILE]; spknet bench NAME --help tells its options\n")
        print("\n".join(f"  {name:12} {what}" for name, what in BENCHMARKS.items()))
        return 0
    name, words = argv[0], argv[1:]
    if name not in BENCHMARKS:
        hint = did_you_mean(name, BENCHMARKS) or f"benchmarks: {', '.join(BENCHMARKS)}"
        print(f"error: unknown benchmark {name!r}; {hint.rstrip()}", file=sys.stderr)
        return USAGE
    return measure(name, words)


def measure(name: str, words: list[str]) -> int:
    from spknet.evaluate.commands import check_file
    from tools.bench import table

    bench = importlib.import_module(f"tools.bench.{name}")
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(f"spknet bench {name}", description=bench.__doc__, formatter_class=form)
    bench.add_options(parser)
    parser.add_argument("--json", help="file for the same rows as data, with the machine and the options")
    chosen = parser.parse_args(words)
    if chosen.json:
        check_file(chosen.json)
    rows = []
    for row in bench.rows(chosen):
        table.show(row)
        rows.append(row)
    if chosen.json:
        table.write(chosen.json, name, chosen, rows)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
