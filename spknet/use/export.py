"""Writes a network for other programs: ONNX, torch.export's .pt2, or voxceleb_trainer's file. What is written has been checked.

spknet export runs/a a.onnx                     waves in, embeddings out; onnxruntime has given the same as torch
spknet export runs/a a.onnx --int8 train_list.txt --root wav --trials test_list.txt
                                                a.int8.onnx beside it: size, speed, error rate before and after
spknet export runs/a a.pt2                      torch.export.load("a.pt2").module()(waves)
spknet export runs/a a.model --to voxceleb_trainer
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import nn

from shards.commands import Parser
from shards.format import atomic_write
from spknet.checkpoints.averages import CHOICES
from spknet.checkpoints.card import to_dict
from spknet.checkpoints.export import voxceleb_trainer
from spknet.errors import UserError, run
from spknet.evaluate import bootstrap, compare, report
from spknet.evaluate.commands import at_least, check_file
from spknet.evaluate.embed import read_names
from spknet.evaluate.evaluation import Asked, evaluate
from spknet.evaluate.lists import open_lists
from spknet.evaluate.utterances import Sources
from spknet.use import int8, onnx_file
from spknet.use.network import Network, load
from spknet.use.onnx_file import ExportError, OnnxNetwork

FORMATS = {".onnx": "onnx", ".pt2": "pt2", ".model": "voxceleb_trainer"}
LONGEST = 10  # seconds of an utterance that int8 is learned or judged on


def about(network: Network) -> dict[str, str]:
    """What an exported file says of itself."""
    options = {name: dataclasses.asdict(getattr(network.config, name)) for name in ("model", "features")}
    said = {"spknet": metadata.version("spknet"), "sample_rate": str(network.sample_rate)}
    said["network"] = json.dumps(options)
    return said | ({"card": json.dumps(to_dict(network.card))} if network.card else {})


def write_pt2(
    program: torch.export.ExportedProgram, network: nn.Module, path: str, said: dict[str, str]
) -> list[tuple]:
    """Writes a .pt2 that has been read back and checked. Raises ExportError."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=said)
    file.seek(0)
    try:
        rows = onnx_file.check(network, torch.export.load(file).module(), network.sample_rate)
    except AssertionError:  # "Guard failed": torch.export took something of its example's length for a condition
        raise ExportError(
            "torch.export's graph of this network is not for every length; no file is written: export it as .onnx"
        ) from None
    _write(path, file.getvalue())
    return rows


def write_onnx(
    program: torch.export.ExportedProgram, network: nn.Module, path: str, said: dict[str, str]
) -> list[tuple]:
    """The same of ONNX, by onnxruntime."""
    file = onnx_file.to_onnx(program, said)
    rows = onnx_file.check(network, OnnxNetwork(file), network.sample_rate)
    _write(path, file)
    return rows


def write_int8(path: str, sources: Sources, listed: str, count: int) -> tuple[str, str, list[list[str]]]:
    """Quantises the ONNX file `path` both ways and keeps the better one: (its path, which, a table of what was measured).

    listed: a list of utterances of which `count`, spread over it, give the ranges, and as many others judge.
    """
    places = read_names(listed, sources)
    chosen = np.unique(np.linspace(0, len(places.names) - 1, 2 * count).round().astype(int))
    longest = LONGEST * sources.sample_rate
    waves = [sources.read(places, i)[:longest].astype(np.float32) / 32768 for i in chosen]
    if len(waves) < 2:
        raise UserError(f"{listed}: one utterance; int8 is learned on some and judged on others: give a longer list")
    files = int8.quantized(Path(path).read_bytes(), waves[::2])
    networks = {"float": OnnxNetwork(path, 1)} | {way: OnnxNetwork(file, 1) for way, file in files.items()}
    took = int8.seconds(networks)
    table = [["network", "bytes", "CPU time of 4 s", "cosine to float, mean", "least"]]
    table.append(["float", f"{Path(path).stat().st_size:,}", f"{1000 * took['float']:.1f} ms", "", ""])
    means = {}
    for way, file in files.items():
        near = int8.cosines(networks["float"], networks[way], waves[1::2])
        means[way] = near.mean()
        faster = f"{1000 * took[way]:.1f} ms, {took['float'] / took[way]:.2f} x"
        table.append([f"int8 {way}", f"{len(file):,}", faster, f"{near.mean():.5f}", f"{near.min():.5f}"])
    best = int8.better(took, means)
    out = str(Path(path).with_suffix(f".int8{Path(path).suffix}"))
    _write(out, files[best])
    return out, best, table


def error_rates(paths: dict[str, str], trials: list[str], root: list[str] | None) -> list[list[str]]:
    """The table of `spknet compare` for ONNX files by name; differences are to the first one, paired by speaker."""
    systems = []
    for name, path in paths.items():
        network = OnnxNetwork(path)
        lists = open_lists(trials, root=root, sample_rate=network.sample_rate)
        done = evaluate(network, lists, asked=Asked(bootstrap=0, breakdown=False))
        systems.append((name, {one.trials.name: (one.last[1], one.trials) for one in done.lists}))
    return compare.table(compare.compare(systems, bootstrap.REPLICATES))


def _write(path: str, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def _parser() -> Parser:
    parser = Parser(prog="spknet export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="run folder or checkpoint file")
    parser.add_argument("out", nargs="?", help="file to write; .onnx, .pt2 or .model says the format")
    for name in ("checkpoint", "out"):  # the former words
        parser.add_argument(f"--{name}", dest=f"former_{name}", help=argparse.SUPPRESS)
    parser.add_argument("--to", choices=sorted(FORMATS.values()), help="the format, where OUT does not say it")
    parser.add_argument("--weights", choices=CHOICES, help="of a run that averages (default: averaged)")
    parser.add_argument("--int8", metavar="LIST", help="quantise an ONNX file, too; utterances to learn the ranges on")
    parser.add_argument("--utterances", type=at_least(1), default=32, help="of --int8's list (default 32)")
    parser.add_argument("--trials", nargs="+", default=[], help="trial lists: error rates of float and int8")
    parser.add_argument("--root", nargs="+", help="folders that names in lists start from")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    chosen = parser.parse_args(argv)
    chosen.checkpoint, chosen.out = chosen.former_checkpoint or chosen.checkpoint, chosen.former_out or chosen.out
    if not (chosen.checkpoint and chosen.out):
        parser.error("expected CHECKPOINT and OUT: the network, and the file to write")
    kind = chosen.to or FORMATS.get(Path(chosen.out).suffix)
    if kind is None:
        parser.error(f"{chosen.out}: expected a name in {', '.join(FORMATS)}, or --to FORMAT")
    if kind != "onnx" and (chosen.int8 or chosen.trials):
        parser.error(f"--int8 and --trials are for ONNX; {chosen.out} is for {kind}")
    if chosen.trials and not chosen.int8:
        parser.error("--trials compares float with int8: give --int8 LIST, too")
    check_file(chosen.out)
    if kind == "voxceleb_trainer":
        print(voxceleb_trainer(chosen.checkpoint, chosen.out, chosen.weights))
        return 0
    network = load(chosen.checkpoint, "cpu", chosen.weights)
    write = write_onnx if kind == "onnx" else write_pt2
    rows = write(onnx_file.graph(network.model), network.model, chosen.out, about(network))
    opset = f", opset {onnx_file.OPSET}" if kind == "onnx" else ""
    print(
        f"{chosen.out}: {network.config.model.name} of {network.meta['path']}{opset}, {Path(chosen.out).stat().st_size:,} bytes"
    )
    print(
        f"waves (batch, samples) at {network.sample_rate} Hz in [-1, 1] -> embeddings (batch, D), of any batch and length"
    )
    shown = [[f"{s:g} s", f"{1 - cosine:.0e}", f"{difference:.0e}"] for s, cosine, difference in rows]
    print(report.text_table([["against torch", "1 - cosine", "largest difference / norm"], *shown]))
    if chosen.int8:
        out, best, table = write_int8(
            chosen.out, Sources(None, chosen.root, network.sample_rate), chosen.int8, chosen.utterances
        )
        print(f"\n{out}: int8 {best}\n{report.text_table(table)}")
        if chosen.trials:
            print("\n" + report.text_table(error_rates({"float": chosen.out, "int8": out}, chosen.trials, chosen.root)))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
