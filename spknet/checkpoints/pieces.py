"""A head in pieces on disk: rows in class order, written and read by every rank for itself, whatever their number.

    RUN/checkpoints/step-00001200.pt        all else, and under "head" the list of the files below (spknet.checkpoints.file)
    RUN/checkpoints/step-00001200/rows-000000000-000015625.pt = {"first", "last": classes, "per_class": rows of a class,
        "values": {"weight": (rows, D), "bias": (classes,)}, "moments": {"weight": {"exp_avg": (rows, D), "step": ()}},
        "seen": (classes,) with loss.sample, else None,
        "averages": {"weight": (rows, D), ...} as in spknet.checkpoints.averages; empty where nothing is averaged}
    RUN/checkpoints/step-00001200/index.json                 the same list, for people

A file is a piece of the head, so that its name and content do not depend on the ranks. Files are whole or absent, and
the .pt is written when all of them are durable: a checkpoint without its .pt does not exist. Before a run goes on the ranks
share the work of comparing every file with its checksum. A run with other ranks, other pieces or other speakers reads those
rows that it wants. The speakers' names and labels stand in the .pt.

    index = write(path, head, optimizer)  # every rank; rank 0 then writes path
    resume(head, n_network, optimizer, path, state)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.format import atomic_write, write_file
from spknet.checkpoints.averages import averaged
from spknet.checkpoints.file import (
    CheckpointError,
    check_sums,
    dump,
    folder_of,
    is_ours,
    read,
    remove_rows,
    told_as_unwritten,
)
from spknet.checkpoints.head_rows import misfit, same_classes
from spknet.checkpoints.resume import load_optimizer
from spknet.errors import UserError
from spknet.losses.sampled import rows_of
from spknet.losses.sharded import Piece, Sharded
from spknet.parallel.ranks import here
from spknet.parallel.together import gather_objects, together


@dataclass(frozen=True)
class Rows:
    """Where the rows of classes [first, last) are to be had; content() reads them, as above."""

    first: int
    last: int
    content: Callable[[], dict[str, Any]]


def write(path: Path, head: Sharded, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Writes this rank's pieces beside `path` and returns the index of all ranks' pieces.

    Every rank calls it. Raises CheckpointError on every rank where one cannot write; what was written is removed then.
    """
    folder = folder_of(path)
    own: list[dict[str, Any]] = []
    try:
        with together("saving the head"), told_as_unwritten(path):
            folder.mkdir(parents=True, exist_ok=True)
            own = [_write_piece(folder, head, piece, optimizer) for piece in head.pieces]
    except UserError:
        if here().first:
            remove_rows(path)
        raise
    index = {"classes": head.n_classes, "per_class": head.rule.centers, "files": sum(gather_objects(own), [])}
    if here().first:
        write_file(folder / "index.json", json.dumps(index, indent=1) + "\n")
    return index


def _write_piece(folder: Path, head: Sharded, piece: Piece, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    values = piece.values()
    name = f"rows-{piece.first:09d}-{piece.last:09d}.pt"
    content = {
        "first": piece.first,
        "last": piece.last,
        "per_class": head.rule.centers,
        "values": {key: value.detach() for key, value in values.items()},
        "moments": {key: dict(optimizer.state.get(value, {})) for key, value in values.items()},
        "seen": piece.seen,
        "averages": piece.average,
    }
    with atomic_write(folder / name) as file:
        dump(content, file)
    return {"first": piece.first, "last": piece.last, "name": name, "bytes": os.stat(folder / name).st_size}


def damages(path: Path, state: Any) -> list[str]:
    """What is wrong with the files of a checkpoint's head, as far as this rank looks: the ranks share them."""
    found, me = [], here()
    files = state["head"]["files"] if is_ours(state) and "head" in state else []
    for entry in files[me.rank :: me.world_size]:
        rows = folder_of(path) / entry["name"]
        size = rows.stat().st_size if rows.is_file() else 0
        try:
            if size != entry["bytes"]:
                raise CheckpointError(f"{rows} has {size} bytes, expected {entry['bytes']}: it is cut or missing")
            check_sums(rows)
        except CheckpointError as error:
            found.append(f"{path}: {error}")
    return found


def source_of(path: Path, state: dict[str, Any]) -> list[Rows]:
    """The rows that a checkpoint with a head in pieces holds, averaged where it has its averages in place."""

    def content(name: str) -> dict[str, Any]:
        rows = read(folder_of(path) / name)
        means = averaged(state["averaging"], rows.get("averages")) if state.get("averaged") else None
        return rows | {"values": means} if means else rows

    return [Rows(entry["first"], entry["last"], partial(content, entry["name"])) for entry in state["head"]["files"]]


def resume(loss: Sharded, n_network: int, optimizer: torch.optim.Optimizer, path, state, classes=None) -> None:
    """Continues a head in pieces and the whole optimizer from a checkpoint, of such a head or of a whole one.

    n_network: trained parameters of the network, which stand before the loss's in the optimizer. classes: as of `load`.
    state: of a whole head is changed to that of a head in pieces.
    """
    source = source_of(Path(path), state) if "head" in state else [_in_pieces(state, n_network, loss.rule.centers)]
    loss.load_state_dict(state["loss"])
    theirs = state["optimizer"]
    if loss.shards():
        theirs = {**theirs, "param_groups": [*theirs["param_groups"], optimizer.state_dict()["param_groups"][-1]]}
    load_optimizer(optimizer, theirs, Path(path))
    load(loss, optimizer, source, classes)


def optimizer_state(optimizer: torch.optim.Optimizer, loss) -> dict[str, Any]:
    """The optimizer's state dict without what belongs to the pieces, which `write` puts beside their rows."""
    state = optimizer.state_dict()
    if loss.shards():
        for place in state["param_groups"].pop()["params"]:
            state["state"].pop(place, None)
    return state


def initialize(loss, path, state, speakers: list[str], labels, speeds: int) -> None:
    """Starts the head of a new run, whole or in pieces, from the rows that a checkpoint has for its speakers."""
    if misfit(loss, state):
        return
    whole = not isinstance(loss, Sharded)
    rule, n_classes = (loss, len(loss.weight) // loss.centers) if whole else (loss.rule, loss.n_classes)
    if "head" in state:
        source = source_of(Path(path), state)
    else:
        names = [name for name in ("weight", "bias") if name in state["loss"]]
        content = {"per_class": rule.centers, "values": {name: state["loss"][name] for name in names}}
        source = [Rows(0, len(state["loss"]["weight"]) // rule.centers, lambda: content)]
    theirs = {name.removeprefix("rule."): value for name, value in state["loss"].items()}
    scalars = {name: theirs.get(name, value) for name, value in rule.state_dict().items() if value.dim() == 0}
    rule.load_state_dict(scalars, strict=False)
    load(loss, None, source, classes_by_speaker(state, n_classes, speakers, labels, speeds))


def classes_by_speaker(state, n_classes: int, speakers: list[str], labels, speeds: int) -> np.ndarray:
    """(n_classes,) the class in a checkpoint of each class here, by the speaker's name; -1 where it has none."""
    there, here = same_classes(state, speakers, labels, speeds)
    classes = np.full(n_classes, -1)
    classes[here] = there
    return classes


def load(loss, optimizer: torch.optim.Optimizer | None, source: list[Rows], classes=None) -> int:
    """Fills this rank's rows, and the optimizer's moments where one is given, from a checkpoint's rows.

    loss: Sharded, or a whole Classifier. classes: (n_classes,) the class in the checkpoint of each class here, -1 for none;
    None: the same, whose averages are read as well. Rows of such classes stay as they are, with moments of 0. Returns how
    many classes of this rank were read. Raises CheckpointError where rows do not fit.
    """
    same = classes is None
    if isinstance(loss, Sharded):
        pieces, per_class, n_classes = loss.pieces, loss.rule.centers, loss.n_classes
    else:
        per_class, n_classes = loss.centers, len(loss.weight) // loss.centers
        pieces = [Piece(0, 0, n_classes, loss.weight, loss.bias)]
    classes = np.arange(n_classes) if classes is None else np.asarray(classes)
    count = 0
    for rows in source:
        wanted = [(piece, classes[piece.first : piece.last] - rows.first) for piece in pieces]
        inside = [(piece, old, (old >= 0) & (old < rows.last - rows.first)) for piece, old in wanted]
        inside = [(piece, np.flatnonzero(here), old[here]) for piece, old, here in inside if here.any()]
        content = rows.content() if inside else None
        for piece, own, there in inside:
            _check(content, piece, per_class)
            for key, parameter in piece.values().items():
                each = per_class if key == "weight" else 1
                places = tuple(rows_of(torch.from_numpy(numbers), each) for numbers in (own, there))
                _put(parameter, content["values"][key], places)
                if optimizer is not None:
                    _fill(optimizer.state[parameter], content["moments"].get(key, {}), parameter, places)
                if optimizer is not None and same and key in content.get("averages", {}):
                    _fill(piece.average, {key: content["averages"][key]}, parameter, places)
            if optimizer is not None and piece.seen is not None and content.get("seen") is not None:
                piece.seen[torch.from_numpy(own)] = content["seen"][there].to(piece.seen)
            count += len(own)
    return count


def _check(content: dict[str, Any], piece: Piece, per_class: int) -> None:
    weight, biased = content["values"]["weight"], "bias" in content["values"]
    theirs = (weight.shape[1], content["per_class"], biased)
    ours = (piece.weight.shape[1], per_class, piece.bias is not None)
    if theirs != ours:
        names = ("embedding_size", "sub_centers", "a bias")
        found = ", ".join(f"{name} {a}, expected {b}" for name, a, b in zip(names, theirs, ours) if a != b)
        raise CheckpointError(f"the head of the checkpoint has {found}; give the options it was trained with")


@torch.no_grad()
def _put(values: torch.Tensor, theirs: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor]) -> None:
    values[places[0].to(values.device)] = theirs[places[1]].to(values)


def _fill(kept: dict[str, Any], theirs: dict[str, Any], parameter, places: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Puts their tensors of a value for each row into those kept for a parameter; other values as they are."""
    for name, value in theirs.items():
        if not isinstance(value, torch.Tensor):
            kept[name] = value
        elif value.dim() == 0:
            kept[name] = value.to(parameter.device, copy=True)  # counted up in place, by each piece
        else:
            if name not in kept:
                kept[name] = torch.zeros_like(parameter, requires_grad=False)
            _put(kept[name], value, places)


def _in_pieces(state: dict[str, Any], n_network: int, per_class: int) -> Rows:
    """The rows of a checkpoint with a whole head; its loss, optimizer and averages are left without them, as in pieces."""
    names = [name for name in ("weight", "bias") if name in state["loss"]]
    moments, gone = dict(state["optimizer"]["state"]), range(n_network, n_network + len(names))
    content = {
        "per_class": per_class,
        "values": {name: state["loss"].pop(name) for name in names},
        "moments": {name: moments.pop(n_network + k, {}) for k, name in enumerate(names)},
        "averages": {},
    }

    def moved(places) -> list[int]:
        return [k if k < gone.start else k - len(gone) for k in places if k not in gone]

    groups = [{**group, "params": moved(group["params"])} for group in state["optimizer"]["param_groups"]]
    state["optimizer"] = {
        "state": {moved([k])[0]: value for k, value in moments.items()},
        "param_groups": [group for group in groups if group["params"]],
    }
    state["loss"] = {f"rule.{name}": value for name, value in state["loss"].items()}
    averages = (state.get("averaging") or {}).get("weights", {})
    for name in [name for name in averages if name.startswith("loss.")]:
        short, value = name.removeprefix("loss."), averages.pop(name)
        if short in names:
            content["averages"][short] = value
        else:
            averages[f"loss.rule.{short}"] = value
    return Rows(0, len(content["values"]["weight"]) // per_class, lambda: content)
