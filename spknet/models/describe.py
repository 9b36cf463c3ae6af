"""Size and cost of the networks.

    spknet info                                           every network with each of its encoders
    spknet info --model.name ResNetSE34L --seconds 2      one configuration

Multiply-adds are those of convolutions and matrix products of one utterance, without its fixed front end: a convolution
costs (inputs / groups) * kernel size for each output value, a linear layer its inputs for each output value.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

from spknet.config import ConfigError, ModelConfig
from spknet.models import MODELS, build_model
from spknet.options import parse

SAMPLE_RATE = 16000  # Hz
OWN_SIZES = {"RawNet3": {"embedding_size": 256}, "ResNetSE34V2": {"n_mels": 64}}  # as published, in the table of all


def parameters(model: nn.Module) -> int:
    """Number of parameters, buffers (windows, filters, statistics) apart."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, seconds: float) -> int:
    """Multiply-adds of one utterance's forward pass in eval mode."""
    total, hooks = [0], []

    def count(module: nn.Module, _inputs, output: torch.Tensor) -> None:
        weight = module.weight  # (outputs, inputs / groups, *kernel), or (outputs, inputs)
        total[0] += output.numel() * weight[0].numel()

    def count_sinc(module: nn.Module, _inputs, output: torch.Tensor) -> None:
        total[0] += output.numel() * (2 * module.window.numel() + 1)

    for part in model.modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            hooks.append(part.register_forward_hook(count))
        elif type(part).__name__ == "SincFilters":
            hooks.append(part.register_forward_hook(count_sinc))
    training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, round(seconds * SAMPLE_RATE), dtype=next(model.parameters()).dtype))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return total[0]


def row(config: ModelConfig, seconds: float) -> str:
    model = build_model(config, SAMPLE_RATE)
    adds = multiply_adds(model, seconds) / 1e9
    name = f"{config.name:13} {config.encoder:8}"
    return f"{name} {config.embedding_size:10d} {parameters(model):12,d} {adds:14.3f}"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="spknet info", description=__doc__, add_help=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=2.0, help="length of the utterance that is counted")
    chosen, rest = parser.parse_known_args(argv)
    try:
        if rest:
            networks = [parse(rest).model]
        else:
            networks = [
                ModelConfig(name=name, encoder=encoder, **OWN_SIZES.get(name, {}))
                for name, kind in MODELS.items()
                for encoder in kind.encoders
                if name != "VGGVox40"  # another name of VGGVox
            ]
        print(
            f"{'network':13} {'encoder':8} {'dimensions':>10} {'parameters':>12} {'10^9 mult-adds':>14}  ({chosen.seconds:g} s)"
        )
        for config in networks:
            print(row(config, chosen.seconds))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
