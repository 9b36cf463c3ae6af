"""Any checkpoint to one file of ours to hand on: `spknet convert FILE OUT.safetensors`.

FILE is what spknet.load takes: a run folder, a checkpoint, or a file or folder of WeSpeaker, 3D-Speaker, SpeechBrain, ReDimNet,
ReDimNet2, Resemblyzer or voxceleb_trainer. The file written holds weights, options without paths, front end, sample rate, the
run's card and where it comes from (spknet/checkpoints/portable.py). `spknet export` writes other programs' formats.
"""

from __future__ import annotations

import sys
from pathlib import Path

from shards.commands import Parser
from spknet.checkpoints import portable
from spknet.checkpoints.averages import CHOICES
from spknet.checkpoints.card import to_dict
from spknet.errors import UserError, run
from spknet.use.network import load


def convert(path: str | Path, out: str | Path, weights: str | None = None) -> str:
    """Writes the file and returns a sentence on it. Raises UserError.

    weights: "averaged" or "trained"; None: as the run evaluates. A card goes along that belongs to these weights.
    """
    if Path(out).suffix != ".safetensors":
        raise UserError(f"{out}: the file to hand on is a safetensors file; give a name that ends in .safetensors")
    network = load(path, "cpu", weights)
    card = to_dict(network.card) if network.card else None
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    portable.save(out, network.model, network.config, network.meta | {"card": card})
    size = sum(p.numel() for p in network.model.parameters())
    source = f", from {network.meta['kind']}" if "kind" in network.meta else ""
    what = (
        f"{network.config.model.name}, {network.dimensions} dimensions, {network.sample_rate} Hz, {size:,} parameters"
    )
    return f"{out}: {what}{source}; {'with its card' if card else network.uncalibrated}"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="spknet convert", description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="run folder or checkpoint, ours or another project's")
    parser.add_argument("out", metavar="OUT", help="file to write, NAME.safetensors")
    parser.add_argument("--weights", choices=CHOICES, help="of a run that averages (default: averaged)")
    chosen = parser.parse_args(argv)
    print(convert(chosen.file, chosen.out, chosen.weights))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
