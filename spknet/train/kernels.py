"""Which kernels a run computes with: TF32 or not, deterministic or the fastest, fused optimizers on GPUs.

train.precision      float32: products of float32 numbers everywhere (cuDNN would take TF32 by itself); tf32: on GPUs factors of
                     matrix products and convolutions have 10 bits after the point, elsewhere it is float32
train.deterministic  on GPUs only kernels that give the same bits each time; otherwise cuDNN tries several for each shape and
                     keeps the fastest, and some add in an order that changes from time to time (docs/exactness.md)

choose(config.train, device)               # before anything is computed there
with of_varying_shapes(): evaluate(...)    # no search: each length of an utterance would begin one
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch

from spknet.config import TrainConfig

MALLOC = {
    -4: 0,
    -1: 2**31 - 1,
}  # malloc.h: M_MMAP_MAX, no blocks of their own; M_TRIM_THRESHOLD, bytes given back at the top


def choose(config: TrainConfig, device: torch.device) -> None:
    """Sets torch's switches, which hold for the whole process."""
    on_gpu = device.type == "cuda"
    if on_gpu and config.deterministic:  # cuBLAS reads it when it first multiplies; torch refuses to go on without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a safeguard against reading it, at a pass each
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = on_gpu and not config.deterministic
    tf32 = on_gpu and config.precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if not on_gpu:
        _keep_memory()


def _keep_memory() -> None:
    # glibc gives the memory of large tensors back to the kernel and gets it anew, page by page, in each step (5 % of a step of
    # ResNetSE34L in float32). From here on the process keeps what it has had.
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        for option, value in MALLOC.items():
            ctypes.CDLL(None).mallopt(option, value)


@contextlib.contextmanager
def of_varying_shapes() -> Iterator[None]:
    """cuDNN's heuristics choose in here, without trying."""
    searches, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = searches
