"""`spknet voxceleb-trainer FLAGS`: a command line of voxceleb_trainer, by name."""

from __future__ import annotations

from spknet.train.__main__ import main as train
from spknet.train.voxceleb_trainer_flags import KNOWN


def main(argv: list[str] | None = None) -> int:
    """Trains, or with --eval evaluates; returns the exit status."""
    if not argv or "-h" in argv or "--help" in argv:
        print(
            __doc__ + "\nflags: " + " ".join(f"--{name}" for name in sorted(KNOWN)) + "\nSee docs/voxceleb_trainer.md."
        )
        return 0
    return train(argv, theirs=True)
