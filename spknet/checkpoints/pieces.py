"""A head in pieces on disk: rows in class order, written and read by every rank for itself, whatever their number.

    RUN/checkpoints/step-00001200.pt        all else, and under "head" the list of the files below (spknet.checkpoints.file)
    RUN/checkpoints/step-00001200/rows-000000000-000015625.pt = {"first", "last": classes, "per_class": rows of a class,
        "values": {"weight": (rows, D), "bias": (classes,)}, "moments": {"weight": {"exp_avg": (rows, D), "step": ()}},
        "seen": (classes,) with loss.sample, else None}
    RUN/checkpoints/step-00001200/index.json                 the same list, for people

A file is a piece of the head, so that its name and content do not depend on the ranks. Files are whole or absent, and
the .pt is written when all of them are durable: a checkpoint without its .pt does not exist. A run with other ranks, other
pieces or other speakers reads those rows that it wants. The speakers' names and labels stand in the .pt.

    index = write(path, head, optimizer)  # every rank; rank 0 then writes path
    resume(head, n_network, optimizer, path, state)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.format import atomic_write
from spknet.checkpoints.file import CheckpointError, dump, folder_of, read
from spknet.checkpoints.resume import load_optimizer
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

    Every rank calls it. Raises CheckpointError on every rank where one cannot write.
    """
    folder = folder_of(path)
    own: list[dict[str, Any]] = []
    with together("saving the head"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own = [_write_piece(folder, head, piece, optimizer) for piece in head.pieces]
        except (OSError, RuntimeError) as error:
            if "DataLoader worker" in str(error):  # torch raises that wherever the program is
                raise
            raise CheckpointError(
                f"cannot write {folder}: {error}; earlier checkpoints are intact: make room and start again"
            ) from error
    index = {"classes": head.n_classes, "per_class": head.rule.centers, "files": sum(gather_objects(own), [])}
    if here().first:
        with atomic_write(folder / "index.json") as file:
            file.write(json.dumps(index, indent=1).encode() + b"\n")
    return index


def _write_piece(folder: Path, head: Sharded, piece: Piece, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    values = {"weight": piece.weight} | ({} if piece.bias is None else {"bias": piece.bias})
    name = f"rows-{piece.first:09d}-{piece.last:09d}.pt"
    content = {
        "first": piece.first,
        "last": piece.last,
        "per_class": head.rule.centers,
        "values": {key: value.detach() for key, value in values.items()},
        "moments": {key: dict(optimizer.state.get(value, {})) for key, value in values.items()},
        "seen": piece.seen,
    }
    with atomic_write(folder / name) as file:
        dump(content, file)
    return {"first": piece.first, "last": piece.last, "name": name, "bytes": os.stat(folder / name).st_size}


def source_of(path: Path, state: dict[str, Any]) -> list[Rows]:
    """The rows that a checkpoint with a head in pieces holds."""

    def reader(name: str) -> Callable[[], dict[str, Any]]:
        return lambda: read(folder_of(path) / name)

    return [Rows(entry["first"], entry["last"], reader(entry["name"])) for entry in state["head"]["files"]]


def resume(loss: Sharded, n_network: int, optimizer: torch.optim.Optimizer, path, state, classes=None) -> None:
    """Continues a head in pieces and the whole optimizer from a checkpoint, of such a head or of a whole one.

    n_network: trained parameters of the network, which stand before the loss's in the optimizer. classes: as of `load`.
    """
    ours, theirs, source = state["loss"], state["optimizer"], None
    if "head" in state:
        source = source_of(Path(path), state)
    else:
        source, ours, theirs = _of_whole_head(state, n_network, loss.rule.centers)
    loss.load_state_dict(ours)
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


def initialize(loss, path, state, speakers: list[str], labels) -> None:
    """Starts the head of a new run, whole or in pieces, from the rows that a checkpoint has for its speakers."""
    rule, n_classes = (
        (loss.rule, loss.n_classes) if isinstance(loss, Sharded) else (loss, len(loss.weight) // loss.centers)
    )
    if "head" in state:
        source = source_of(Path(path), state)
    elif "weight" in state["loss"]:
        source, *_ = _of_whole_head(state, 0, rule.centers)
    else:
        return  # another kind of loss
    theirs = {name.removeprefix("rule."): value for name, value in state["loss"].items()}
    scalars = {name: theirs.get(name, value) for name, value in rule.state_dict().items() if value.dim() == 0}
    rule.load_state_dict(scalars, strict=False)
    load(loss, None, source, classes_by_speaker(state, n_classes, speakers, labels))


def classes_by_speaker(state: dict[str, Any], n_classes: int, speakers: list[str], labels) -> np.ndarray:
    """(n_classes,) the class in a checkpoint of each class here, by the speaker's name; -1 where it has none.

    Classes beyond the labels are those of playing speeds: label + labels * speed index, here and there.
    """
    theirs = dict(zip(state["speakers"], state["labels"]))
    n_theirs, n_ours = max(theirs.values(), default=-1) + 1, int(max(labels, default=-1)) + 1
    their_classes = state["head"]["classes"] if "head" in state else len(state["loss"]["weight"])
    classes = np.full(n_classes, -1)
    for speed in range(min(n_classes // max(1, n_ours), their_classes // max(1, n_theirs))):
        for speaker, label in zip(speakers, labels):
            if speaker in theirs:
                classes[int(label) + n_ours * speed] = theirs[speaker] + n_theirs * speed
    return classes


def load(loss, optimizer: torch.optim.Optimizer | None, source: list[Rows], classes=None) -> int:
    """Fills this rank's rows, and the optimizer's moments where one is given, from a checkpoint's rows.

    loss: Sharded, or a whole Classifier. classes: (n_classes,) the class in the checkpoint of each class here, -1 for none;
    None: the same. Rows of such classes stay as they are, with moments of 0. Returns how many classes of this rank were
    read. Raises CheckpointError where rows do not fit.
    """
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
            for key, parameter in (("weight", piece.weight), ("bias", piece.bias)):
                if parameter is not None:
                    each = per_class if key == "weight" else 1
                    _fill(parameter, key, content, optimizer, (_rows(own, each), _rows(there, each)))
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


def _rows(classes: np.ndarray, per_class: int) -> torch.Tensor:
    return torch.from_numpy((classes[:, None] * per_class + np.arange(per_class)).reshape(-1))


@torch.no_grad()
def _fill(parameter, key: str, content: dict, optimizer, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    place, there = rows[0].to(parameter.device), rows[1]

    def put(values: torch.Tensor, theirs: torch.Tensor) -> None:
        values[place] = theirs[there].to(values)

    put(parameter, content["values"][key])
    for name, value in content["moments"].get(key, {}).items() if optimizer is not None else ():
        state = optimizer.state[parameter]
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            state[name] = (
                value.to(parameter.device, copy=True) if isinstance(value, torch.Tensor) else value
            )  # counted up in place, by each piece
            continue
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        put(state[name], value)


def _of_whole_head(state: dict[str, Any], n_network: int, per_class: int) -> tuple[list[Rows], dict, dict]:
    """A checkpoint with a whole head as rows; and its "loss" and "optimizer" without the head."""
    names = [name for name in ("weight", "bias") if name in state["loss"]]
    values = {name: state["loss"][name] for name in names}
    optimizer = {"state": dict(state["optimizer"]["state"]), "param_groups": []}
    moments = {name: optimizer["state"].pop(n_network + k, {}) for k, name in enumerate(names)}
    gone = range(n_network, n_network + len(names))
    optimizer["state"] = {k if k < gone.start else k - len(gone): v for k, v in optimizer["state"].items()}
    for group in state["optimizer"]["param_groups"]:
        kept = [k if k < gone.start else k - len(gone) for k in group["params"] if k not in gone]
        if kept:
            optimizer["param_groups"].append({**group, "params": kept})
    content = {"per_class": per_class, "values": values, "moments": moments}
    loss = {f"rule.{name}": value for name, value in state["loss"].items() if name not in names}
    return [Rows(0, len(values["weight"]) // per_class, lambda: content)], loss, optimizer
