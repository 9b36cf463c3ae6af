"""Are two recordings of one speaker? Prints the verdict; exit status 0: the same, 1: different, 2: no answer.

spknet verify a.wav b.m4a --checkpoint runs/a
spknet verify a.wav b.m4a --checkpoint runs/a --json
"""

from __future__ import annotations

import json
import os
import sys

from spknet.errors import UserError, run
from spknet.use.commands import NO_DECISION, Parser, network_of

SAME, DIFFERENT = 0, 1  # exit statuses


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser("spknet verify", __doc__)
    parser.add("left", metavar="a.wav", help="a recording")
    parser.add("right", metavar="b.wav", help="another")
    parser.add("--threshold", type=float, help="cosine from which on they are the same (default: the card's)")
    parser.add("--json", action="store_true", help="print {score, probability, threshold, same, why}")
    chosen = parser.parse_args(argv)
    for path in (chosen.left, chosen.right):
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder, expected a recording; packed shards are checked by `spknet check`")
    network = network_of(chosen)
    verdict = network.verify(chosen.left, chosen.right, threshold=chosen.threshold)
    print(json.dumps(verdict.to_dict()) if chosen.json else verdict)
    if verdict.same is None:
        raise UserError(NO_DECISION)
    return SAME if verdict.same else DIFFERENT


if __name__ == "__main__":
    sys.exit(run(main))
