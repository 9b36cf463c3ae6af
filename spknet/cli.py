"""The `spknet` command: each subcommand is the `main(argv)` of a module; what a user got wrong is told in one sentence.

torch is imported by the subcommands that need it only, so that `spknet --help` and `spknet pack` start at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib import metadata

from shards.commands import did_you_mean
from spknet.errors import USAGE, run

COMMANDS = {
    "make data": {
        "lists": ("shards.make_lists", "a training list from a folder, a CSV or Kaldi's files"),
        "pack": ("shards.pack", "WAV, FLAC, ... files to tar shards"),
        "check": ("shards.verify", "check packed shards for damage"),
        "stats": ("shards.info", "speakers, hours and durations of packed shards"),
        "stage": ("shards.stage", "copy shards to a node-local folder ahead of a run"),
        "musan": ("tools.musan", "noise and impulse responses to shards"),
        "voxceleb": ("tools.voxceleb.__main__", "VoxCeleb from the internet to shards"),
        "synth": ("tools.synth", "a small corpus of made voices"),
    },
    "train": {
        "train": ("spknet.train.__main__", "train a network"),
        "voxceleb-trainer": ("spknet.train.voxceleb_trainer_command", "train with voxceleb_trainer's command line"),
        "recipes": ("spknet.train.recipes", "recipes with their cost and aim"),
        "bench": ("tools.bench.__main__", "speed of every part on this machine"),
    },
    "evaluate": {
        "trials": ("spknet.evaluate.make_trials", "make trials from a data set"),
        "evaluate": ("spknet.evaluate.__main__", "embed, score and report trials"),
        "compare": ("spknet.evaluate.compare", "put reports side by side"),
    },
    "use a network": {
        "embed": ("spknet.use.embed", "embeddings of audio files"),
        "verify": ("spknet.use.verify", "are two recordings of one speaker?"),
        "enroll": ("spknet.use.enrolments", "remember a voice under a name"),
        "identify": ("spknet.use.identify", "which enrolled voice is it?"),
        "card": ("spknet.use.make_card", "calibrate a network and describe it"),
        "convert": ("spknet.use.convert", "any checkpoint to one file to hand on"),
        "info": ("spknet.use.info", "what a checkpoint is; which networks there are"),
        "export": ("spknet.use.export", "write a network as ONNX, .pt2 or for voxceleb_trainer"),
        "page": ("spknet.use.page", "verify in the browser: record or drop recordings"),
        "doctor": ("spknet.use.doctor", "what this machine lacks, with remedies"),
    },
    "use a cluster": {
        "submit": ("launch.submit", "start a run on a SLURM cluster"),
        "sweep": ("launch.sweep", "start a grid of runs"),
        "status": ("launch.status", "state of the runs of a sweep"),
        "logs": ("launch.logs", "what the job of a run has written"),
        "cancel": ("launch.cancel", "stop runs; they save first"),
        "resubmit": ("launch.resubmit", "submit again what was cancelled or failed"),
        "results": ("launch.results", "table and picture of a sweep"),
    },
}


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status (2 for one that does not exist)."""
    return run(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> int:
    modules = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: spknet COMMAND [options]; spknet COMMAND --help tells its options")
        for title, group in COMMANDS.items():
            print(f"\n{title}:")
            print("\n".join(f"  {name:17} {what}" for name, (_, what) in group.items()))
        return 0
    if argv[0] == "--version":
        print(f"spknet {metadata.version('spknet')}")
        return 0
    if argv[0] not in modules:
        hint = did_you_mean(argv[0], modules) or f"commands: {', '.join(modules)}"
        print(f"error: unknown command {argv[0]!r}; {hint.rstrip()}", file=sys.stderr)
        return USAGE
    return importlib.import_module(modules[argv[0]]).main(argv[1:])


def start() -> None:
    """The console script. After a training, the interpreter's own end might wait for a collective that is under way."""
    status = main()
    if sys.argv[1:2] in (["train"], ["voxceleb-trainer"]):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    start()
