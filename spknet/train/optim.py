"""Optimizer and schedules. Learning rate and margin are functions of the global step, so a schedule has no state.

    schedule       rate at step t of T, w steps of warm-up, R = utterances of the global batch / lr_batch (1 where 0)
    constant       R lr
    step           R lr lr_decay^(epochs done // lr_decay_epochs)
    cosine         R lr (f + (1 - f) (1 + cos(pi (t - w) / (T - 1 - w))) / 2), f = final_lr_fraction
    exponential    k lr f^(t / T), k = R t / w in the warm-up, then R; without warm_from_zero k goes from 1 to R   (WeSpeaker)
    warmup_cosine  R lr (f + (1 - f) t / w), then R lr (f + (1 - f) (1 + cos(pi (t - w) / (T - w))) / 2)        (3D-Speaker)

The first three warm up by R lr (t + 1) / w. R is a rule in utterances of the global batch, so that a recipe means the same
on any number of ranks.

    margin grows from margin_start to margin while x goes from 0 to 1, between margin_start_epoch and margin_end_epoch:
    linear         x
    exponential    1 - (0.001 / (1 + 1e-6))^x: half of it within the first tenth; ends at 0.999 and jumps
WeSpeaker counts epochs from 1 (its 20 is a start epoch of 19 here), 3D-Speaker from 0.

    optimizer = build_optimizer(config.optim, model.parameters(), loss.parameters())
    lr = learning_rate(config.optim, step, steps_per_epoch, total_steps, utterances=256)
"""

from __future__ import annotations

import math

import torch

from spknet.config import ConfigError, LossConfig, OptimConfig

OPTIMIZERS = {
    "adam": lambda groups, c, **how: torch.optim.Adam(groups, **how),
    "adamw": lambda groups, c, **how: torch.optim.AdamW(groups, **how),
    "sgd": lambda groups, c, **how: torch.optim.SGD(groups, momentum=c.momentum, nesterov=c.nesterov, **how),
}


def build_optimizer(config: OptimConfig, parameters, head=(), shards=(), half: bool = False) -> torch.optim.Optimizer:
    """The optimizer named by config.name over the parameters that are trained.

    parameters: the network's; head: the loss's, with head_weight_decay; shards: those that this rank alone has, always in
    a last group of their own; half: the network computes in half precision. Raises ConfigError where the options do not fit
    each other.
    """
    if config.nesterov and (config.name != "sgd" or config.momentum <= 0):
        raise ConfigError(
            f"optim.nesterov true: expected optim.name sgd with optim.momentum above 0, found {config.name} with"
            f" {config.momentum:g}; choose these, or leave it out"
        )
    trained, head, shards = ([p for p in part if p.requires_grad] for part in (parameters, head, shards))
    decay = config.weight_decay if config.head_weight_decay is None else config.head_weight_decay
    groups = [{"params": trained, "lr_factor": config.network_lr}, {"params": head, "weight_decay": decay}]
    if config.head_weight_decay is None and config.network_lr == 1:  # one group, as before there were such options
        groups = [{"params": trained + head}]
    if shards:
        groups.append({"params": shards, "weight_decay": decay})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError(
            "nothing is left to train: train.frozen names all of the network, and the loss has no weights"
        )
    # One kernel makes the whole step. On a GPU its count of steps stays there: the host has nothing to wait for. On a CPU
    # it takes a third of the time; there float32 and float64 keep torch's several kernels, and so their runs' last bits.
    fused = True if half or all(p.is_cuda for group in groups for p in group["params"]) else None
    return OPTIMIZERS[config.name](groups, config, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of a step for all groups; the network's by optim.network_lr of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def total_norm(parameters) -> torch.Tensor:
    """The norm of all gradients together, on their device: not finite where one of them is not."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters, shards, squared: torch.Tensor | None, limit: float, norm=None) -> torch.Tensor:
    """Scales all gradients so that their norm is at most `limit`; returns the norm before.

    parameters: those that every rank has, norm: theirs, where it is known; shards: those of this rank alone; squared: sum of
    squares of the gradients of all ranks' shards, None where there are none.
    """
    parameters = list(parameters)
    norm = total_norm(parameters) if norm is None else norm
    if squared is not None:
        norm = (norm.double().square() + squared).sqrt()
    torch.nn.utils.clip_grads_with_norm_([*parameters, *shards], limit, norm)
    return norm


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int, utterances: int = 0) -> float:
    """Learning rate of the step with this number (the first is 0). utterances: of the global batch, for lr_batch."""
    ratio = utterances / config.lr_batch if config.lr_batch else 1.0
    warmup = config.warmup_steps or round(config.warmup_epochs * steps_per_epoch)
    low = config.final_lr_fraction
    if config.schedule == "exponential":
        return _warmth(config, step, warmup, ratio) * config.lr * low ** (step / total_steps)
    peak = config.lr * ratio
    if config.schedule == "warmup_cosine":
        if step < warmup:
            return peak * (low + (1 - low) * step / warmup)
        return peak * _cosine(low, step - warmup, total_steps - warmup)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "step":
        return peak * config.lr_decay ** (step // (steps_per_epoch * config.lr_decay_epochs))
    if config.schedule == "cosine":
        return peak * _cosine(low, step - warmup, total_steps - 1 - warmup)
    return peak


def _cosine(low: float, step: int, span: int) -> float:
    progress = min(1.0, step / max(1, span))
    return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2


def _warmth(config: OptimConfig, step: int, warmup: int, ratio: float) -> float:
    if step >= warmup:
        return ratio
    if config.warm_from_zero:
        return ratio * step / warmup
    return 1 + (ratio - 1) * step / warmup if ratio > 1 else ratio


def margin(config: LossConfig, step: int, steps_per_epoch: int = 1) -> float:
    """Margin of the loss at the step with this number: see the schedules above, or margin_warmup_steps' growth from 0."""
    if config.margin_schedule == "constant":
        if config.margin_warmup_steps == 0:
            return config.margin
        return config.margin * min(1.0, step / config.margin_warmup_steps)
    first, last = (epoch * steps_per_epoch for epoch in (config.margin_start_epoch, config.margin_end_epoch))
    if step >= last:
        return config.margin
    x = max(0.0, step - first) / (last - first)
    if config.margin_schedule == "exponential":
        x = 1 - math.exp(x * math.log(1e-3 / (1 + 1e-6)))
    return config.margin_start + (config.margin - config.margin_start) * x
