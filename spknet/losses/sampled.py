"""A step that compares with a sample of the classes: less work for very large heads (partial FC, An et al., 2021).

Class j is in the sample of step t when hash(seed, t, j) < r, r = loss.sample, or when an utterance of the batch is its own.
That depends on nothing but (seed, t, j) and the labels of the global batch, so any number of ranks samples the same, and a
run that continues samples as it would have.

What is not in the sample does not move. The optimizer sees, for this step, a copy of the sampled rows and of their moments:
momentum and Adam's averages of other rows stand still (dense gradients with zeros, as partial FC v2 has them, would go on
moving them), and no gradient of other rows takes memory. Adam's count of steps is that of the piece. Weight decay is made up
for when a row is next in a sample: after k steps without it, its weights are first multiplied by (1 - lr decay)^k, with the
rate of the step that makes up; cosines do not change by it. The rows are chosen on the host, from the classes that the
loader has drawn (`Loss.classes`): nothing waits for the device.

    head = build_loss(LossConfig(name="aamsoftmax", sharded=True, sample=0.1), 192, 5_000_000, 2)
    with head.updating(optimizer) as moved: ...; optimizer.step()
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from spknet import rng


def sample(head, targets: Tensor) -> list:
    """The pieces of this rank as this step sees them, with the rows of the sample only; those without any left out.

    head: spknet.losses.sharded.Sharded; targets: (B,) classes of the whole batch, for a head that has not been told them.
    """
    views, batch = [], targets.cpu().numpy() if head.classes is None else head.classes
    for piece in head.pieces:
        numbers = np.arange(piece.first, piece.last)
        chosen = rng.uniform(head.seed, head.step, "sample", numbers) < head.share
        chosen[batch[(batch >= piece.first) & (batch < piece.last)] - piece.first] = True
        classes = torch.from_numpy(numbers[chosen])
        if targets.is_cuda:  # from memory of other kinds the host would wait for the copy, and so for all before it
            classes = classes.pin_memory()
        classes = classes.to(targets.device, non_blocking=True)
        if len(classes):
            with torch.no_grad():
                weight = nn.Parameter(piece.weight[rows_of(classes - piece.first, head.rule.centers)])
                bias = None if piece.bias is None else nn.Parameter(piece.bias[classes - piece.first])
            views.append(replace(piece, weight=weight, bias=bias, sample=classes))
    return views


def rows_of(classes: Tensor, per_class: int) -> Tensor:
    """Rows of the weight of these classes of a piece, in order."""
    if per_class == 1:
        return classes
    return (classes[:, None] * per_class + torch.arange(per_class, device=classes.device)).flatten()


@contextlib.contextmanager
def rows_only(head, optimizer: torch.optim.Optimizer):
    """In the optimizer's last group, the sampled rows with their moments take the place of the pieces; then go back."""
    group, by_number = optimizer.param_groups[-1], {piece.number: piece for piece in head.pieces}
    whole, pairs = group["params"], []
    for view in head.active:
        piece, places = by_number[view.number], view.sample - view.first
        make_up(head, view, piece, group["lr"] * group["weight_decay"])
        pairs.append((piece.weight, view.weight, rows_of(places, head.rule.centers)))
        if piece.bias is not None:
            pairs.append((piece.bias, view.bias, places))
    for parameter, rows, places in pairs:
        state = optimizer.state.get(parameter, {})
        if state:
            optimizer.state[rows] = {k: v[places] if _by_row(v) else v for k, v in state.items()}
    group["params"] = [rows for _, rows, _ in pairs]
    try:
        yield group["params"]
    finally:
        group["params"] = whole
        with torch.no_grad():
            for parameter, rows, places in pairs:
                parameter[places] = rows
                state = optimizer.state[parameter]
                for key, value in optimizer.state.pop(rows, {}).items():
                    if _by_row(value):
                        state.setdefault(key, torch.zeros_like(parameter))[places] = value
                    else:
                        state[key] = value
        head.active = head.pieces


@torch.no_grad()
def make_up(head, view, piece, decay: float) -> None:
    """Weight decay of the steps since each row was last in a sample; notes that it is now."""
    places = view.sample - view.first
    skipped = head.step - 1 - piece.seen[places]
    factor = (1 - decay) ** skipped.to(view.weight.dtype)
    view.weight *= factor.repeat_interleave(head.rule.centers)[:, None]
    if view.bias is not None:
        view.bias *= factor
    piece.seen[places] = head.step


def _by_row(value) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
