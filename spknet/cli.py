"""The `spknet` command: each subcommand is the `main(argv)` of a module that `python -m` runs as well.

torch is imported by the subcommands that need it only, so that `spknet pack` starts at once.
"""

from __future__ import annotations

import difflib
import importlib
import sys

COMMANDS = {
    "pack": ("shards.pack", "WAV, FLAC, ... files to tar shards"),
    "verify": ("shards.verify", "check packed shards for damage"),
    "stats": ("shards.info", "speakers, hours and durations of packed shards"),
    "stage": ("shards.stage", "copy shards to a node-local folder ahead of a run"),
    "train": ("spknet.train.__main__", "train a network"),
    "evaluate": ("spknet.evaluate.__main__", "embed, score and report trials"),
    "trials": ("spknet.evaluate.make_trials", "make trials from a data set"),
    "compare": ("spknet.evaluate.compare", "put reports side by side"),
    "recipes": ("spknet.train.recipes", "recipes with their cost and aim"),
    "info": ("spknet.models.describe", "parameters and multiply-adds of the networks"),
    "embed": ("spknet.evaluate.embed", "embeddings of audio files"),
    "export": ("spknet.checkpoints.export", "write a checkpoint in another program's format"),
    "submit": ("launch.submit", "start a run on a SLURM cluster"),
    "sweep": ("launch.sweep", "start a grid of runs"),
    "status": ("launch.status", "state of the runs of a sweep"),
    "results": ("launch.results", "table and picture of a sweep"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status (2 for one that does not exist)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: spknet COMMAND [options]; spknet COMMAND --help tells its options\n")
        print("\n".join(f"  {name:9} {what}" for name, (_, what) in COMMANDS.items()))
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        print(f"error: unknown command {argv[0]!r}; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
