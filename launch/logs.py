"""What the job of a run has written: print it, follow it, of one rank only; and what it says about how ranks ended.

    spknet logs RUN [--follow] [--rank N] [--lines 100]

RUN/jobs/JOB/JOB_k_log.err and .out are those of node k, RUN/jobs/JOB/ranks/.../attempt_A/L/stderr.log those of its local rank L.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from launch.jobs import read_job
from launch.log_text import plain
from launch.starts import read_starts
from launch.status import ACTIVE, statuses
from shards.commands import Parser
from spknet.errors import UserError, run

FOLLOW_SECONDS = 0.5


class LogError(UserError):
    """There is no such log; the message says what there is."""


def log_paths(folder: Path, rank: int | None) -> list[Path]:
    """The files that hold the newest job's words: of node 0, or of the node and process of a rank. Raises LogError."""
    log = read_job(folder).get("log")
    if not log:
        raise LogError(
            f"{folder}: no job of spknet submit or slurm/train.sbatch is noted here (job.json); give a run's folder"
        )
    first = Path(log)
    if rank is None:
        return [first]
    start = (read_starts(folder) or [{}])[-1]
    per_node, nodes = start.get("ranks_per_node", 1), start.get("nodes", [])
    node, local = divmod(rank, per_node)
    if node < len(nodes):  # torchrun numbers nodes in the order of their names, SLURM knows that gpu10 follows gpu9
        node = nodes.index(sorted(nodes)[node])
    attempts = sorted(
        first.parent.glob(f"ranks/node{node}/*/attempt_*/{local}/stderr.log"), key=lambda p: p.stat().st_mtime
    )
    if not attempts:
        raise LogError(
            f"{folder}: rank {rank} has written nothing yet, or there is none; the newest start has {len(nodes) * per_node} ranks"
        )
    return attempts[-1:]


def follow(path: Path, at: int, ended) -> None:
    """Print what is added to a file until ended() is true; Ctrl-C ends it, too."""
    while True:
        last = ended()
        if path.exists():
            with path.open("rb") as file:
                file.seek(at)
                added = file.read()
            at += len(added)
            for line in plain(added.decode(errors="replace")):
                print(line, flush=True)
        if last:
            return
        time.sleep(FOLLOW_SECONDS)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 2 for a folder without logs."""
    parser = Parser(prog="spknet logs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--follow", action="store_true", help="go on printing until the run has ended")
    parser.add_argument("--rank", type=int, help="of this rank alone (all ranks of node 0)")
    parser.add_argument("--lines", type=int, default=100, help="from the end (100); 0: all")
    options = parser.parse_args(argv)
    for path in log_paths(options.run, options.rank):
        print(f"{path}:", file=sys.stderr)
        size = path.stat().st_size if path.exists() else 0
        lines = plain(path.read_text(errors="replace")) if path.exists() else ["(nothing yet)"]
        print("\n".join(lines[-options.lines :] if options.lines else lines), flush=True)
        if options.follow:
            follow(path, size, lambda: not any(s.state in ACTIVE for s in statuses(options.run)))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
