"""The mean of the last epochs' weights, or their exponential moving average, kept beside the weights that are trained.

    train.average_epochs K   the mean of the weights at the ends of the last K epochs: at steps T, T - B, ..., T - (K - 1) B
                             of a run of T steps, B an epoch (WeSpeaker's avg_model; SWA, Izmailov et al. 2018)
    train.ema d              a <- d_t a + (1 - d_t) w after each step t, d_t = min(d, (1 + t) / (10 + t))

BatchNorm's statistics are averaged like weights; counters are those of the last step. Rows of a head that is cut over the
ranks are averaged where they are, and stand in the files of its pieces. A run that continues with another length begins its
mean anew where the last K epochs of the new length begin; one that continues with other speakers begins either anew.
Everything is in the checkpoint: a run that is killed goes on to the same bits. Evaluation during training sees the average as
soon as there is one.

    averaging = Averaging(config.train, task, steps_per_epoch, total_steps)
    averaging.update(step)                  # after each optimizer step, `step` of them done
    with averaging.applied(): evaluate(task.model)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from spknet.checkpoints.averages import averaged
from spknet.config import ConfigError, TrainConfig


class Averaging:
    """Averages of one module; does nothing with both options at 0. Raises ConfigError where both are given."""

    def __init__(self, config: TrainConfig, module: nn.Module, steps_per_epoch: int, total_steps: int):
        if config.average_epochs and config.ema:
            raise ConfigError(
                f"train.average_epochs={config.average_epochs} and train.ema={config.ema}: give one of the two"
            )
        self.module, self.decay = module, config.ema
        self.pieces = getattr(getattr(module, "loss", None), "pieces", [])  # of a head that is cut over the ranks
        self.kind = "ema" if config.ema else "mean"
        ends = range(total_steps, 0, -steps_per_epoch)[: config.average_epochs]
        self.planned = sorted(ends)  # steps after which the mean takes the weights in
        self.steps: list[int] = []
        self.weights: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the module's weights in where they are due."""
        if self.kind == "ema" and self.decay:
            self._move(step)
        elif step in self.planned:
            self._add(step)

    def _begun(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(average, value) of everything that is averaged; what has no average yet gets its value, as have counters."""
        parts = [(self.weights, self.module.state_dict())]
        parts += [(piece.average, piece.values()) for piece in self.pieces]
        for averages, values in parts:
            for name, value in values.items():
                if name in averages and value.is_floating_point():
                    yield averages[name], value
                else:
                    averages[name] = value.detach().clone()

    def _move(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, value in self._begun():
            average.lerp_(value, 1 - decay)
        self.steps = [step]

    def _add(self, step: int) -> None:
        if self.steps != [planned for planned in self.planned if planned < step][-len(self.steps) :]:
            self._begin_anew()  # of a run with another length
        for average, value in self._begun():
            average.add_(value)
        self.steps = [*self.steps, step]

    def _begin_anew(self) -> None:
        self.steps, self.weights = [], {}
        for piece in self.pieces:
            piece.average.clear()

    @contextlib.contextmanager
    def applied(self):
        """The module has the averaged weights inside, where there are some, and its own ones again afterwards."""
        means = averaged(self.state())
        if means is None:
            yield False
            return
        own = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(means)
        try:
            yield True
        finally:
            self.module.load_state_dict(own)

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint holds; None where nothing is averaged."""
        if not self.decay and not self.planned:
            return None
        return {"kind": self.kind, "steps": list(self.steps), "weights": self.weights}

    def load(self, state: dict[str, Any] | None) -> None:
        """Continues from what `state` gave, the pieces' averages apart. An average of another kind is not continued."""
        if state is None or self.state() is None or state["kind"] != self.kind:
            self._begin_anew()
            return
        own = self.module.state_dict()
        self.steps = list(state["steps"])
        self.weights = {name: value.to(own[name].device) for name, value in state["weights"].items() if name in own}
