"""Optimizer and schedules. Learning rate and margin are functions of the global step, so a schedule has no state.

optimizer = build_optimizer(config.optim, task.parameters())
lr = learning_rate(config.optim, step, steps_per_epoch, total_steps)
"""

from __future__ import annotations

import math

import torch

from spknet.config import LossConfig, OptimConfig

OPTIMIZERS = {
    "adam": lambda parameters, c: torch.optim.Adam(parameters, lr=c.lr, weight_decay=c.weight_decay),
    "adamw": lambda parameters, c: torch.optim.AdamW(parameters, lr=c.lr, weight_decay=c.weight_decay),
    "sgd": lambda parameters, c: torch.optim.SGD(parameters, lr=c.lr, weight_decay=c.weight_decay, momentum=c.momentum),
}


def build_optimizer(config: OptimConfig, parameters) -> torch.optim.Optimizer:
    """The optimizer named by config.name over the parameters that are trained."""
    return OPTIMIZERS[config.name]([p for p in parameters if p.requires_grad], config)


def finite_gradients(parameters) -> torch.Tensor:
    """Whether all gradients are finite, as a bool on their device. (Norms: one pass, and no copy.)"""
    return torch.isfinite(torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))).all()


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of the step with this number (the first is 0)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "step":
        return config.lr * config.lr_decay ** (step // (steps_per_epoch * config.lr_decay_epochs))
    if config.schedule == "cosine":
        span = max(1, total_steps - 1 - config.warmup_steps)
        progress = min(1.0, (step - config.warmup_steps) / span)
        low = config.final_lr_fraction
        return config.lr * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)
    return config.lr


def margin(config: LossConfig, step: int) -> float:
    """Margin of the loss at the step with this number: grows linearly from 0 over margin_warmup_steps."""
    if config.margin_warmup_steps == 0:
        return config.margin
    return config.margin * min(1.0, step / config.margin_warmup_steps)
