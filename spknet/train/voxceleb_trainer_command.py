"""`spknet voxceleb-trainer FLAGS`: a command line of voxceleb_trainer, by name."""

from __future__ import annotations

from spknet.train.__main__ import main as train


def main(argv: list[str] | None = None) -> int:
    """Trains, or with --eval evaluates; returns the exit status."""
    return train(argv, theirs=True)
