"""Randomness as a function: what is drawn depends on (seed, epoch, tag, item) and on nothing else.

Neither the number of ranks or workers nor prefetching nor a restart can then change a draw. `uniform` hashes whole arrays
(SplitMix64's finaliser, Steele et al. 2014, over a chained key): about 10 ns a draw, where a Generator per item costs
10 us, more than reading the crop. `stream` gives a numpy Generator for permutations. `initialize` makes initial weights
from the seed and the module's name.

    starts = uniform(seed, epoch, "crop", slots)  # float64 in [0, 1), one for each slot
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 15  # items mixed at a time: what fits the cache is several times faster


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _word(tag: str) -> int:
    return int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=8).digest(), "little")


_tag = lru_cache(maxsize=256)(_word)


def _base(seed: int, epoch: int, tags: np.ndarray) -> np.ndarray:
    """The key that items are mixed with, of each tag's word, uint64."""
    key = np.array([seed], dtype=np.uint64)
    for word in (np.uint64(epoch), tags):
        key = _mix(key + _GOLDEN) + word
    return _mix(key + _GOLDEN)


def bits(seed: int, epoch: int, tag: str, items: np.ndarray) -> np.ndarray:
    """64 random bits for each item. items: integers, any shape -> uint64, the same shape."""
    items = np.asarray(items)
    flat, out = items.reshape(-1), np.empty(items.size, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        base = _base(seed, epoch, np.uint64(_tag(tag)))
        for first in range(0, len(flat), _BLOCK):
            block = flat[first : first + _BLOCK].astype(np.uint64) + np.uint64(1)
            out[first : first + _BLOCK] = _mix(base + block * _GOLDEN)
    return out.reshape(items.shape)


def bits_of_names(seed: int, epoch: int, tag: str, names: Iterable[str]) -> np.ndarray:
    """64 random bits for each name: those that `bits` draws for item 0 under the tag `tag + name`. (names,) uint64."""
    with np.errstate(over="ignore"):
        base = _base(seed, epoch, np.array([_word(tag + name) for name in names], dtype=np.uint64))
        return _mix(base + _GOLDEN)


def uniform(seed: int, epoch: int, tag: str, items: np.ndarray) -> np.ndarray:
    """One draw in [0, 1) for each item. items: integers, any shape -> float64, the same shape."""
    return (bits(seed, epoch, tag, items) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def stream(seed: int, epoch: int, tag: str, item: int = 0) -> np.random.Generator:
    """A Generator of its own for (seed, epoch, tag, item); each number below 2^32.

    Exactly four words: SeedSequence pads with zeros, so that keys of different lengths would collide.
    """
    words = [seed, epoch, _tag(tag) & 0xFFFFFFFF, item]
    if any(not 0 <= word < 2**32 for word in words):
        raise ValueError(f"seed {seed}, epoch {epoch} and item {item} must lie in [0, 2^32)")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def initialize(module, seed: int) -> None:
    """Draw the initial weights of a torch module from the seed and the names of its parts.

    Every part with `reset_parameters` is drawn under a generator of its own, so that a network's weights do not depend on
    what else is built, in which order, or by which rank. torch's global generator is left as it was.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        for name, part in module.named_modules():
            if hasattr(part, "reset_parameters"):
                digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
                torch.manual_seed(int.from_bytes(digest, "little") >> 1)
                part.reset_parameters()
