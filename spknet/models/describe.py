"""Size, cost and published error of the networks.

    spknet info                                           every network and variant
    spknet info runs/a                                    what a checkpoint is (spknet.use.info)
    spknet info --model.name ResNetSE34L --seconds 2      one configuration
    spknet info --json                                    the same as data, with published error rates and when to choose it
    spknet info --markdown                                the tables of docs/networks.md

Multiply-adds are those of one utterance's convolutions, linear layers and products of attention, without its fixed front
end, and a multiply-add counts one: a convolution costs (inputs / groups) * kernel size for each output value, a linear layer
its inputs for each output value. 2 s are 200 frames of 10 ms, 134 of 15 ms. A module with other products says their number
itself, multiply_adds(output). Networks on frames are counted without arithmetic, on torch's meta device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys

import torch
from torch import nn

from shards.commands import Parser, did_you_mean
from spknet.config import FeaturesConfig, ModelConfig
from spknet.errors import UserError, run
from spknet.models import MODELS, build_model
from spknet.models.front_ends import resolve
from spknet.models.network import Network
from spknet.models.published import CHOOSE, SOURCES, rows_of
from spknet.options import parse

SAMPLE_RATE = 16000  # Hz
SECONDS = 2.0
# The encoders that the networks of 2020 were published with, and options besides.
OF_2020 = {
    "ResNetSE34": [{"encoder": "SAP"}],
    "ResNetSE34L": [{"encoder": "SAP"}, {"encoder": "ASP"}],
    "ResNetSE34V2": [{"encoder": "SAP", "n_mels": 64}, {"encoder": "ASP", "n_mels": 64}],
    "VGGVox": [{"encoder": "SAP"}, {"encoder": "TAP"}, {"encoder": "MAX"}],
    "RawNet3": [{"encoder": "ECA", "embedding_size": 256}, {"encoder": "ASP", "embedding_size": 256}],
    "VGGVox40": [],  # another name of VGGVox
}


def parameters(model: nn.Module) -> int:
    """Number of parameters, buffers (windows, filters, statistics) apart."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def multiply_adds(model: nn.Module, seconds: float = SECONDS) -> int:
    """Multiply-adds of one utterance's forward pass in eval mode."""
    total, hooks = [0], []

    def count(module: nn.Module, _inputs, output: torch.Tensor) -> None:
        if hasattr(module, "multiply_adds"):
            total[0] += module.multiply_adds(output)
        else:  # the weight is (outputs, inputs / groups, *kernel), or (outputs, inputs)
            total[0] += output.numel() * module.weight[0].numel()

    for part in model.modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Linear)) or hasattr(part, "multiply_adds"):
            hooks.append(part.register_forward_hook(count))
    training, of = model.training, next(model.parameters())
    model.eval()
    if isinstance(model, Network):
        frames = max(model.fewest_frames, math.ceil(seconds * model.sample_rate / model.features.hop))
        model.embed_frames(model.frames(of.new_zeros(1, model.bands, frames)))
    else:
        model(of.new_zeros(1, round(seconds * SAMPLE_RATE)))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return total[0]


def configurations() -> list[ModelConfig]:
    """Every network with each of its variants."""
    listed = []
    for name, kind in MODELS.items():
        if not issubclass(kind, Network):
            listed += [ModelConfig(name, **options) for options in OF_2020[name]]
            continue
        for variant in kind.variants:
            listed.append(ModelConfig(name, variant=variant))
        if "redimnet2" in kind.variants:
            listed.append(ModelConfig(name, variant="redimnet2", agg_gnorm=True))
    return listed


def describe(model: ModelConfig, features: FeaturesConfig | None = None, seconds: float = SECONDS) -> dict:
    """What there is to say of a network: name, variant, options, features, parameters, multiply_adds, published, choose."""
    of_2020 = not issubclass(MODELS[model.name], Network) if model.name in MODELS else True
    with torch.device("cpu" if of_2020 else "meta"):
        network = build_model(model, SAMPLE_RATE, features)
    variant = "" if of_2020 else network.variant
    options = dataclasses.asdict(model)
    del options["name"], options["variant"]
    if of_2020:
        seen = {"RawNet3": "learned", "ResNetSE34": "spectrum"}.get(model.name, "log_mel")
    else:
        seen = resolve(features or FeaturesConfig(), network.front_end or variant).name
    return {
        "name": model.name,
        "variant": variant,
        "options": options,
        "features": seen,
        "parameters": parameters(network),
        "multiply_adds": multiply_adds(network, seconds),
        "seconds": seconds,
        "published": [row._asdict() for row in rows_of(model.name, variant)],
        "choose": CHOOSE.get(model.name, ""),
    }


def text(rows: list[dict]) -> str:
    """A table for a terminal; the variant stands last, where there is one."""
    seconds = f"({rows[0]['seconds']:g} s)"
    lines = [f"{'network':16} {'encoder':9} {'dimensions':>10} {'parameters':>12} {'10^9 mult-adds':>14}  {seconds}"]
    for row in rows:
        o, variant = row["options"], row["variant"] + (" agg_gnorm" if row["options"]["agg_gnorm"] else "")
        line = f"{row['name']:16} {o['encoder']:9} {o['embedding_size']:10d} {row['parameters']:12,d}"
        lines.append(f"{line} {row['multiply_adds'] / 1e9:14.3f}  {variant}".rstrip())
    return "\n".join(lines)


def markdown(rows: list[dict]) -> str:
    """The tables of docs/networks.md."""
    lines = ["## Sizes", ""]
    head = ["network", "variant", "encoder", "dimensions", "features", "parameters", "10^9 mult-adds"]
    lines += _table(
        head,
        [
            [
                row["name"],
                row["variant"] + (", agg_gnorm" if row["options"]["agg_gnorm"] else ""),
                row["options"]["encoder"],
                str(row["options"]["embedding_size"]),
                f"{row['features']} {row['options']['n_mels']}" if row["features"] != "learned" else "learned",
                f"{row['parameters']:,}",
                f"{row['multiply_adds'] / 1e9:.3f}",
            ]
            for row in rows
        ],
    )
    lines += ["", "## Published error rates", ""]
    head = ["network", "variant", "Vox1-O", "Vox1-E", "Vox1-H", "trained on", "LM", "score", "source"]
    published = [r for row in rows if not row["options"]["agg_gnorm"] for r in row["published"]]
    unique = {tuple(map(str, r.values())): r for r in published}.values()
    lines += _table(
        head,
        [[{True: "yes", False: "no"}.get(value, value) for value in r.values()] for r in unique],
    )
    lines += ["", *(f"- {key}: {where}" for key, where in SOURCES.items())]
    lines += ["", "## When to choose which", ""]
    lines += [f"- **{name}**: {CHOOSE[name]}" for name in dict.fromkeys(row["name"] for row in rows)]
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="spknet info", description=__doc__, add_help=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of the utterance that is counted")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/networks.md")
    chosen, rest = parser.parse_known_args(argv)
    hint = did_you_mean(rest[0], ("--seconds", "--json", "--markdown")) if rest and "." not in rest[0] else ""
    if hint:
        raise UserError(f"unknown option {rest[0]}; {hint.rstrip()}")
    if rest:
        given = parse(rest)
        rows = [describe(given.model, given.features, chosen.seconds)]
    else:
        rows = [describe(model, seconds=chosen.seconds) for model in configurations()]
    print(json.dumps(rows, indent=1) if chosen.json else markdown(rows) if chosen.markdown else text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
