"""Channels on the device: a low-pass filter for each utterance, and the telephone (8 kHz, 300 to 3400 Hz, G.711).

Filters are windowed sincs of 255 taps (Hamming; linear phase, delay taken out), h[k] = 2 f sinc(2 f k) for a cut-off of f
cycles a sample. G.711 (ITU-T, 1988): a 16-bit sample becomes one of 256 levels, mu-law (14 bits, 8 segments of 16 steps,
bias 33) or A-law (13 bits); the table of the nearest level is made once.

    low_pass(waves, cutoffs=torch.tensor([0.2, 0.1]))     # (n, samples), cycles a sample
    telephone(waves, laws=torch.tensor([0, 1]), rate=16000)  # 0 mu-law, 1 A-law
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy.fft import next_fast_len

TAPS = 255
TELEPHONE_RATE = 8000  # Hz
TELEPHONE_BAND = (300.0, 3400.0)  # Hz


def convolve(waves: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Full convolution of each wave with its kernel: (n, samples), (n or 1, taps) -> (n, samples + taps - 1)."""
    length = waves.shape[1] + kernels.shape[1] - 1
    n = next_fast_len(length, real=True)
    return torch.fft.irfft(torch.fft.rfft(waves, n) * torch.fft.rfft(kernels, n), n)[:, :length]


def low_pass_kernels(cutoffs: torch.Tensor) -> torch.Tensor:
    """(n,) cut-offs in cycles a sample -> (n, TAPS) filters with gain 1 at 0 Hz."""
    k = torch.arange(TAPS, device=cutoffs.device, dtype=cutoffs.dtype) - TAPS // 2
    window = torch.hamming_window(TAPS, periodic=False, device=cutoffs.device, dtype=cutoffs.dtype)
    kernels = 2 * cutoffs[:, None] * torch.special.sinc(2 * cutoffs[:, None] * k) * window
    return kernels / kernels.sum(dim=1, keepdim=True)


def _filtered(waves: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    return convolve(waves, kernels)[:, TAPS // 2 : TAPS // 2 + waves.shape[1]]


def low_pass(waves: torch.Tensor, cutoffs: torch.Tensor) -> torch.Tensor:
    """Each wave without what lies above its cut-off (cycles a sample): the same shape."""
    return _filtered(waves, low_pass_kernels(cutoffs.to(waves.dtype)))


@lru_cache(maxsize=32)
def resampler(before: int, after: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """torchaudio's resampling from one rate to another, its kernel made once."""
    import torchaudio

    return torchaudio.transforms.Resample(before, after, dtype=dtype).to(device)


@lru_cache(maxsize=8)
def _band_kernel(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    edges = torch.tensor(TELEPHONE_BAND, dtype=torch.float64) / TELEPHONE_RATE
    low, high = low_pass_kernels(edges)
    return (high - low)[None].to(device, dtype)


def g711_levels(law: str) -> np.ndarray:
    """The 256 levels of mu-law ("mu") or A-law ("a") as 16-bit samples, ascending (mu-law has 0 twice)."""
    step, segment = np.arange(16), np.arange(8)[:, None]
    if law == "mu":
        positive = ((((2 * step + 33) << segment) - 33) * 4).reshape(-1)
    else:
        positive = np.where(segment == 0, 2 * step + 1, (2 * step + 33) << np.maximum(segment - 1, 0)).reshape(-1) * 8
    return np.concatenate([-positive[::-1], positive]).astype(np.int64)


@lru_cache(maxsize=8)
def _g711_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(2 * 65536,) in [-1, 1]: for each 16-bit sample the nearest level of mu-law, then of A-law."""
    samples = np.arange(-32768, 32768)
    tables = []
    for law in ("mu", "a"):
        levels = g711_levels(law)
        borders = (levels[1:] + levels[:-1]) / 2
        tables.append(levels[np.searchsorted(borders, samples)])
    return torch.from_numpy(np.concatenate(tables) / 32768).to(device, dtype)


def telephone(waves: torch.Tensor, laws: torch.Tensor, rate: int) -> torch.Tensor:
    """What a telephone leaves of each wave: (n, samples) at `rate` Hz, laws (n,) -> the same shape and rate."""
    samples, device = waves.shape[1], waves.device
    narrow = resampler(rate, TELEPHONE_RATE, waves.dtype, device)(waves)
    narrow = _filtered(narrow, _band_kernel(waves.dtype, device))
    codes = (narrow * 32768).round().clamp(-32768, 32767).long() + 32768
    narrow = _g711_table(waves.dtype, device)[codes + 65536 * laws[:, None]]
    return resampler(TELEPHONE_RATE, rate, waves.dtype, device)(narrow)[:, :samples]
