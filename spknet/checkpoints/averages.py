"""Averaged weights in a checkpoint, and who takes them.

    state["averaging"] = {"kind": "mean", "steps": [step, ...], "weights": {name: sum over these steps}}
                       | {"kind": "ema", "steps": [last step], "weights": {name: average}}

Rows of a head in pieces have theirs beside them (spknet.checkpoints.pieces), sums or averages as above.
Names are those of SpeakerTask ("model.conv1.weight", "loss.weight"). Evaluation, export and fine-tuning take the average
where there is one; `weights="trained"` takes what the last step left.

    model_weights(state, "averaged")  # state dict of the network
"""

from __future__ import annotations

from typing import Any

import torch

CHOICES = ("averaged", "trained")


def averaged(averaging: dict[str, Any] | None, kept: dict[str, torch.Tensor] | None = None):
    """The averaged weights of task and loss by name; None where nothing has been averaged yet.

    kept: sums or averages that do not stand in `averaging` itself, such as those of a head's rows.
    """
    if not averaging or not averaging["steps"]:
        return None
    kept = averaging["weights"] if kept is None else kept
    if averaging["kind"] == "ema":
        return kept
    n = len(averaging["steps"])
    return {name: value / n if value.is_floating_point() else value for name, value in kept.items()}


def with_averages(state: dict[str, Any], weights: str = "averaged") -> dict[str, Any]:
    """A checkpoint of ours with its averaged weights in the place of the trained ones, where it has some.

    "averaged" says so to who reads the rows of its head.
    """
    means = averaged(state.get("averaging")) if weights == "averaged" else None
    if means is None:
        return state
    parts = {
        part: {name: means.get(f"{part}.{name}", value) for name, value in state[part].items()}
        for part in ("model", "loss")
    }
    return state | parts | {"averaged": True}
