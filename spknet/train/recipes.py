"""The recipes that come with spknet: what they cost and what they aim at.

    spknet recipes            all of them
    spknet recipes resnet     those whose name holds a word

Cost: multiply-adds of the network for one training crop (forward, batch of one), times the crops of the whole run on
VoxCeleb2-dev (1,092,009 utterances an epoch); a training step costs about three times its forward pass. The aim is what
the head of the recipe says: EER in percent on VoxCeleb1-O / E / H cleaned, as its authors published it.
"""

from __future__ import annotations

import argparse
import re
import textwrap

import torch

from shards.commands import Parser
from spknet.config import Config
from spknet.errors import UserError
from spknet.models import build_model
from spknet.models.describe import multiply_adds
from spknet.options import RECIPES, parse

VOXCELEB2 = 1_092_009  # utterances of VoxCeleb2-dev
OVERLAP = 0.015  # seconds by which a window of 25 ms reaches beyond its 10 ms: n frames are 10 n + 15 ms


def names() -> list[str]:
    """The installed recipes, sorted; parts to be combined with another (loss_*) last."""
    found = [path.stem for path in RECIPES.glob("*.yaml")]
    return sorted(found, key=lambda name: (name.startswith("loss_"), name))


def aim(name: str) -> str:
    """What the head comment of a recipe aims at: its `# Aim:`, or its first sentence."""
    lines = [line[1:] for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = "\n".join(lines)
    found = re.search(r"^ Aim: (.*(?:\n   .*)*)", text, re.M)
    return " ".join((found[1] if found else re.split(r"(?<!al)[.;:]\s", text)[0]).split())


def cost(config: Config) -> tuple[float, float]:
    """(multiply-adds of a crop, crops of the run on VoxCeleb2-dev)."""
    # No numbers are needed for counting: tensors without storage.
    with torch.device("meta"):
        model = build_model(config.model, features=config.features)
        adds = multiply_adds(model, config.data.crop_seconds - OVERLAP)
    return adds, float(VOXCELEB2 * config.train.epochs)


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
        adds, crops = cost(config)
        print(f"{name:25} {config.model.name:14} {adds / 1e9:11.3f} {crops / 1e6:11.1f} {adds * crops / 1e18:13.3f}")
        print(textwrap.indent(textwrap.fill(aim(name), 110), "    "))
    return 0
