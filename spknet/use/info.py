"""What a checkpoint is: its network, features, rate, step, recipe and card. Without one: `spknet info` lists the networks.

spknet info runs/a
spknet info model.pt --json
spknet info ResNet34
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from spknet.checkpoints.card import to_dict
from spknet.errors import run
from spknet.evaluate.commands import Parser
from spknet.evaluate.lists import trained_speakers
from spknet.models import MODELS, describe
from spknet.use.make_card import recipe
from spknet.use.model_card import headline
from spknet.use.network import Network, load


def about(network: Network) -> dict:
    """Plain facts of a network by name, in the order in which they are told."""
    config, meta = network.config, network.meta
    row = describe.describe(config.model, config.features)
    speakers = trained_speakers(config, meta)
    return {
        "path": meta["path"],
        "kind": meta.get("kind", "checkpoint of spknet"),
        "network": config.model.name,
        "variant": row["variant"],
        "parameters": row["parameters"],
        "multiply_adds_2s": row["multiply_adds"],
        "dimensions": network.dimensions,
        "sample_rate": network.sample_rate,
        "features": row["features"],
        "step": meta.get("step"),
        "epoch": meta.get("epoch"),
        "training_speakers": None if speakers is None else len(speakers),
        "options": recipe(config),
        "card": to_dict(network.card) if network.card else None,
    }


def text(network: Network) -> str:
    """The facts as lines `name: value`."""
    lines = []
    for name, value in about(network).items():
        if name == "options" and value:
            lines += ["options that are not the defaults:", *(f"  {option}: {said}" for option, said in value.items())]
        elif name not in ("options", "card") and value not in (None, ""):
            lines.append(f"{name.replace('_', ' ')}: {f'{value:,}' if isinstance(value, int) else value}")
    return "\n".join([*lines, f"card: {headline(network.card) if network.card else network.uncalibrated}"])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        return describe.main(argv)
    parser = Parser("spknet info", __doc__)
    parser.add("checkpoint", help="run folder, or a file that `spknet.load` takes")
    parser.add("--json", action="store_true", help="print data instead of text, with the whole card")
    chosen = parser.parse_args(argv)
    if chosen.checkpoint in MODELS and not Path(chosen.checkpoint).exists():
        return describe.main(["--model.name", chosen.checkpoint, *(["--json"] if chosen.json else [])])
    network = load(chosen.checkpoint, "cpu")
    print(json.dumps(about(network), indent=1) if chosen.json else text(network))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
