"""What the commands that use a network have in common: which network, where it runs.

parser = Parser("spknet verify", __doc__); chosen = parser.parse_args(argv); network = network_of(chosen)
"""

from __future__ import annotations

import argparse

from spknet.checkpoints.averages import CHOICES
from spknet.evaluate import commands
from spknet.use.network import Network, load

NO_DECISION = "no decision: there is no threshold; give --threshold, or make a card"  # what is printed before says why


class Parser(commands.Parser):
    """The options of a network, and what a command adds."""

    def __init__(self, prog: str, doc: str):
        super().__init__(prog, doc)
        self.add("--checkpoint", required=True, help="run folder, or a file that `spknet.load` takes")
        self.add("--device", default="auto", help="where the network runs: auto, cpu, cuda")
        self.add("--weights", choices=CHOICES, help="of a run that averages (default: as it evaluates)")


def network_of(chosen: argparse.Namespace) -> Network:
    """The network that the command line names."""
    return load(chosen.checkpoint, chosen.device, chosen.weights)
