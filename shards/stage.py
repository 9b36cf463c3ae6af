"""Copies packed data sets to a node's own disk ahead of a run, into the cache that `--data.cache_dir` names.

Each tar's sha256 is checked while it is copied. Several processes may stage the same data at once: each tar is copied by one.

Usage: spknet stage data/shards/vox2 /local/scratch/spknet --limit-gib 500
"""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from shards import errors, index
from shards.cache import Cache
from shards.commands import Parser, command
from shards.format import ShardError


def stage(out: str | Path, cache_dir: str | Path, limit_gib: float = 0.0, progress: bool = False) -> tuple[int, int]:
    """Copies index and tars of OUT; returns (tars that are there, tars of OUT). Fewer are there where the limit or the disk is full.

    Raises ShardError where a source is missing or damaged.
    """
    out = Path(out)
    opened = index.open_index(out, cache_dir)
    cache = Cache(cache_dir, limit_gib)
    entries = [opened.entry(shard) for shard in range(len(opened.tars))]
    there = 0
    total = sum(entry["filesize"] for entry in entries)
    with tqdm(total=total, desc="stage", unit="B", unit_scale=True, disable=not progress) as bar:
        for entry in entries:
            there += cache.copy(out / entry["url"], entry, bar.update, block=True)
    return there, len(entries)


@errors.told
def main(argv: list[str] | None = None) -> None:
    p = Parser(command("stage"), description="Copy a packed data set to a node's own disk.")
    p.add_argument("out", help="folder of a packed data set")
    p.add_argument("cache", help="folder on the node's own disk")
    p.add_argument("--limit-gib", type=float, default=0.0, help="largest size of the cache; 0: no limit")
    args = p.parse_args(argv)
    if args.limit_gib < 0:
        raise ShardError(f"--limit-gib {args.limit_gib}: expected 0 (no limit) or more")
    there, total = stage(args.out, args.cache, args.limit_gib, progress=True)
    print(f"{args.cache}: {there} of {total} tars of {args.out}")
    if there < total:
        print(f"the other {total - there} do not fit and will be read from {args.out}")


if __name__ == "__main__":
    sys.exit(main())
