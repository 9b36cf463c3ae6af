"""Dither: white noise on training crops, the same for a crop whatever ranks, workers and restarts there are.

Kaldi adds normal noise of one 16-bit step to each sample, so that digital silence has a spectrum. Its noise comes from a generator
whose state depends on all that was drawn before. Here the loader passes a key of 64 bits for each crop, drawn by slot, and the
device makes the noise from the key and the sample's number: SplitMix64 (as in spknet.rng), whose two halves give two normal
numbers (Box and Muller, 1958). Kaldi draws anew for the overlap of two frames; here a sample has one draw.

    noisy = add(waves, torch.from_numpy(keys(seed, epoch, slots)), steps=1.0)  # (n, samples) in [-1, 1]
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from spknet import rng

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants, as signed numbers: torch multiplies int64 modulo 2^64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def keys(seed: int, epoch: int, slots: np.ndarray) -> np.ndarray:
    """A key for each slot of an epoch: (n,) -> (n,) int64."""
    return rng.bits(seed, epoch, "dither", slots).view(np.int64)


def normal(keys: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """`count` numbers of mean 0 and deviation 1 for each key: (n,) int64 -> (n, count), computed in `dtype`."""
    counters = torch.arange(1, (count + 1) // 2 + 1, device=keys.device) * GOLDEN
    bits = keys[:, None] + counters
    for shift, factor in zip((30, 27), MIX):
        bits = (bits ^ _right(bits, shift)) * factor
    bits = bits ^ _right(bits, 31)
    first = ((bits & 0xFFFFFFFF) + 1).to(dtype) * 2.0**-32  # in (0, 1]
    second = _right(bits, 32).to(dtype) * 2.0**-32
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def add(waves: Tensor, keys: Tensor, steps: float) -> Tensor:
    """waves (n, samples) in [-1, 1] with noise of a deviation of `steps` 16-bit steps."""
    return waves + steps / 32768 * normal(keys, waves.shape[1], waves.dtype)


def _right(x: Tensor, places: int) -> Tensor:
    # A signed shift drags the sign along.
    return (x >> places) & ((1 << (64 - places)) - 1)
