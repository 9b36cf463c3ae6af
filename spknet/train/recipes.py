"""The recipes that come with spknet: what they cost and what they aim at.

    spknet recipes            all of them
    spknet recipes resnet     those whose name holds a word

Cost: multiply-adds of the network for one training crop (forward, batch of one), as the head of the recipe has them under
`# Cost:`, times the crops of the whole run on VoxCeleb2-dev (1,092,009 utterances an epoch); a training step costs about three
times its forward pass. The aim is what the head says: EER in percent on VoxCeleb1-O / E / H cleaned, as its authors published it.
"""

from __future__ import annotations

import argparse
import re
import textwrap

from shards.commands import Parser
from spknet.errors import UserError
from spknet.options import RECIPES, parse, recipe_names

VOXCELEB2 = 1_092_009  # utterances of VoxCeleb2-dev


def names() -> list[str]:
    """The installed recipes, sorted; parts to be combined with another (loss_*) last."""
    return sorted(recipe_names(), key=lambda name: name.startswith("loss_"))


def head(name: str) -> str:
    """The comment that a recipe begins with."""
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line[1:] for line in lines if line.startswith("#"))


def aim(name: str) -> str:
    """What a recipe aims at: its head's `# Aim:`, or its first sentence."""
    found = re.search(r"^ Aim: (.*(?:\n   .*)*)", head(name), re.MULTILINE)
    return " ".join((found[1] if found else re.split(r"(?<!al)[.;:]\s", head(name))[0]).split())


def cost(name: str) -> float:
    """10^9 multiply-adds of a crop; NaN where the head does not say."""
    found = re.search(r"^ Cost: (\S+) \* 10\^9", head(name), re.MULTILINE)
    return float(found[1] if found else "nan")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="spknet recipes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("word", nargs="?", default="", help="only recipes whose names hold this")
    chosen = parser.parse_args(argv)
    listed = [name for name in names() if chosen.word in name]
    if not listed:
        raise UserError(f"no recipe's name holds {chosen.word!r}; recipes: {', '.join(names())}")
    print(
        "Multiply-adds of a crop, crops of VoxCeleb2, their product; aims are EER % on VoxCeleb1-O / E / H cleaned.\n"
    )
    print(f"{'recipe':25} {'network':14} {'10^9 a crop':>11} {'10^6 crops':>11} {'10^18 in all':>13}")
    for name in listed:
        config = parse(["--config", name])
        adds, crops = cost(name), VOXCELEB2 * config.train.epochs / 1e6
        print(f"{name:25} {config.model.name:14} {adds:11.3f} {crops:11.1f} {adds * crops / 1000:13.3f}")
        print(textwrap.indent(textwrap.fill(aim(name), 110), "    "))
    return 0
