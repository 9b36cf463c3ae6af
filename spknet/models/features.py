"""Fixed front ends: waves -> normalised spectra, inside the network, so that whoever has the network has its features.

    scale -> pre-emphasis y[t] = x[t] - 0.97 x[t-1] -> 25 ms windows every 10 ms -> |FFT| or mel energies (+ 1e-6, log)
          -> each band minus its mean over the crop, divided by its deviation (instance norm, eps 1e-5)

Filters are triangles on the HTK mel scale, mel = 2595 log10(1 + f / 700), as torchaudio makes them. The computation runs
in the precision of the module's buffers whatever the autocast (bfloat16 has 8 bits: a log spectrum needs more), and
without a gradient. Masks of SpecAugment (Park et al., 2019) are applied last, where 0 is the mean of the crop.

On the CPU a few waves at a time go through, so that their frames stay in the cache, and a mel filter sees only the bins in which
it is not 0 (`mel_energies`). On a GPU one transform and one matrix product of everything are faster.

    LogMel(sample_rate=16000, n_mels=40)(waves)  # (batch, samples) -> (batch, 40, frames)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRE_EMPHASIS = 0.97
INT16 = 32768.0
FLOOR = 1e-6  # added to mel energies; what "silence" is depends on the input scale
PIECE = 800  # frames at a time and thread of the CPU: 3 MB of spectra in float32
BANDS = 16  # mel filters in one product on the CPU


def mel_filters(n_bins: int, n_mels: int, sample_rate: int, low: float = 0.0, high: float | None = None) -> Tensor:
    """Triangles of peak 1 from `low` to `high` Hz (half the sample rate), equally wide in mel: (n_bins, n_mels)."""
    frequencies = torch.linspace(0, sample_rate / 2, n_bins, dtype=torch.float64)
    ends = (2595 * math.log10(1 + hz / 700) for hz in (low, high or sample_rate / 2))
    corners = 700 * (10 ** (torch.linspace(*ends, n_mels + 2, dtype=torch.float64) / 2595) - 1)
    rising = (frequencies[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequencies[:, None]) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def instance_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Each row minus its mean, over its deviation: (..., frames) -> the same shape."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def pre_emphasis(waves: Tensor, taps: Tensor) -> Tensor:
    """taps[0] x[t-1] + taps[1] x[t], with x[-1] = x[1] (reflection): (batch, samples) -> the same shape."""
    previous = torch.cat([waves[:, 1:2], waves[:, :-1]], dim=1)
    return taps[0] * previous + taps[1] * waves


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """No autocast where x lies. An exported graph has none to begin with, and torch 2.14 cannot read one back that turns it off."""
    if torch.compiler.is_exporting():
        return contextlib.nullcontext()
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def at_least(x: Tensor, fewest: int, dim: int) -> Tensor:
    """The same, or along `dim` over and over from its start until there are `fewest`."""
    n = x.shape[dim]
    if not torch.compiler.is_exporting() and n >= fewest:  # an exported graph is for every length: no branch on n
        return x
    times = [1] * x.ndim
    times[dim] = torch.sym_max(1, (fewest + n - 1) // n)
    return x.repeat(times).narrow(dim, 0, torch.sym_max(n, fewest))


def reflected(waves: Tensor, side: int) -> Tensor:
    """The wave with `side` samples mirrored at both ends: (batch, samples) -> (batch, samples + 2 side)."""
    if not torch.compiler.is_exporting() and waves.shape[1] <= side:
        return F.pad(waves[:, None], (side, side), mode="reflect")[:, 0]  # says what is wrong
    # reflection_pad1d takes five times as long on a CPU.
    return torch.cat([waves[:, 1 : side + 1].flip(1), waves, waves[:, -side - 1 : -1].flip(1)], dim=1)


def in_pieces(function: Callable[[Tensor], Tensor], waves: Tensor, hop: int) -> Tensor:
    """function(waves); on the CPU for a few rows at a time, which do not depend on each other."""
    if waves.device.type != "cpu" or torch.compiler.is_exporting():
        return function(waves)
    rows = max(1, PIECE * torch.get_num_threads() * hop // waves.shape[1])
    return torch.cat([function(piece) for piece in waves.split(rows)]) if rows < len(waves) else function(waves)


def power_spectrum(frames: Tensor, window: Tensor, n_fft: int) -> Tensor:
    """|DFT|^2 of windowed frames: (batch, frames, length) -> (batch, frames, n_fft / 2 + 1)."""
    if torch.compiler.is_exporting():  # a sum of products, which every runtime computes alike, in place of an FFT
        real, imaginary = (frames * window @ table for table in dft(frames.shape[2], n_fft, window))
        return real.square() + imaginary.square()
    parts = torch.view_as_real(torch.fft.rfft(frames * window, n_fft)).square_()
    return parts[..., 0] + parts[..., 1]  # a sum over an axis of 2 takes five times as long


def dft(length: int, n_fft: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi k t / n_fft: (length, n_fft / 2 + 1) each."""
    turns = torch.arange(length)[:, None] * torch.arange(n_fft // 2 + 1) % n_fft
    angles = 2 * math.pi / n_fft * turns.double()
    return angles.cos().to(like), angles.sin().to(like)


def spans_of(filters: Tensor) -> list[tuple[int, int, int, int]]:
    """The first and last band and bin of products that together are `power @ filters`: on the CPU BANDS bands each, from the
    bins in which they are not all 0, a third of the work; elsewhere, and where there are no values to look at, everything."""
    bins, bands = filters.shape
    if filters.device.type != "cpu" or type(filters) is not Tensor:  # a fake tensor
        return [(0, bands, 0, bins)]
    some, spans = filters.numpy() != 0, []
    for first in range(0, bands, BANDS):
        inside = np.flatnonzero(some[:, first : first + BANDS].any(axis=1))
        low, high = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 1)
        spans.append((first, min(first + BANDS, bands), low, high))
    return spans


def mel_energies(power: Tensor, filters: Tensor, spans: list[tuple[int, int, int, int]]) -> Tensor:
    """power @ filters: (batch, frames, bins), (bins, bands) -> (batch, frames, bands)."""
    rows = power.flatten(0, 1)
    parts = [rows[:, low:high] @ filters[low:high, first:last] for first, last, low, high in spans]
    return torch.cat(parts, dim=1).unflatten(0, power.shape[:2])


def apply_masks(features: Tensor, masks: Tensor | None) -> Tensor:
    """Sets masked bands and frames to 0, the mean of normalised features.

    features: (batch, bands, frames); masks: (batch, 2 K, 2), the fractions [start, end) of K bands, then of K time spans.
    """
    if masks is None:
        return features

    def outside(spans: Tensor, n: int) -> Tensor:
        centres = (torch.arange(n, device=features.device, dtype=masks.dtype) + 0.5) / n
        inside = (centres >= spans[:, :, :1]) & (centres < spans[:, :, 1:])  # (batch, K, n)
        return ~inside.any(dim=1)

    _, bands, frames = features.shape
    half = masks.shape[1] // 2
    keep = outside(masks[:, :half], bands)[:, :, None] & outside(masks[:, half:], frames)[:, None, :]
    return features * keep.to(features.dtype)


class Spectrum(nn.Module):
    """Short-time spectra, instance-normalised: the magnitude of every bin, or mel energies.

    n_mels 0: magnitudes |FFT| of n_fft/2 + 1 bins, whole windows only. Otherwise power spectra through mel filters, the
    first window centred on sample 0 (reflection at the ends), `log` of them or not.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_mels: int = 0,
        *,
        window: str = "hamming",
        log: bool = True,
        emphasis: bool = False,
        input_scale: str = "unit",
    ):
        super().__init__()
        length = round(0.025 * sample_rate)
        self.hop = round(0.010 * sample_rate)
        self.n_fft = 2 ** math.ceil(math.log2(length))
        self.n_mels, self.log = n_mels, log
        self.scale = INT16 if input_scale == "int16" else 1.0
        make = torch.hann_window if window == "hann" else torch.hamming_window
        self.register_buffer("window", make(length))
        if n_mels:
            self.register_buffer("filters", mel_filters(self.n_fft // 2 + 1, n_mels, sample_rate))
        self.register_buffer("taps", torch.tensor([-PRE_EMPHASIS, 1.0]) if emphasis else None)

    @property
    def bands(self) -> int:
        return self.n_mels or self.n_fft // 2 + 1

    @torch.compiler.disable  # complex numbers are not compiled anyway: break the graph once, here, without a warning
    @torch.no_grad()
    def forward(self, waves: Tensor, masks: Tensor | None = None) -> Tensor:
        """waves: (batch, samples) in [-1, 1] -> (batch, bands, frames), in the precision of the buffers."""
        with full_precision(waves):
            waves = waves.to(self.window.dtype) * self.scale
            if self.taps is not None:
                waves = pre_emphasis(waves, self.taps)
            self.spans = spans_of(self.filters) if self.n_mels else []
            return apply_masks(in_pieces(self.normalised, waves, self.hop), masks)

    def normalised(self, waves: Tensor) -> Tensor:
        x = self.mel(waves) if self.n_mels else self.magnitude(waves)  # (batch, frames, bands)
        return instance_norm(x.mT.contiguous())

    def magnitude(self, waves: Tensor) -> Tensor:
        return self.power(waves, center=False).sqrt()

    def mel(self, waves: Tensor) -> Tensor:
        energies = mel_energies(self.power(waves, center=True), self.filters, self.spans).add_(FLOOR)
        return energies.log_() if self.log else energies

    def power(self, waves: Tensor, center: bool) -> Tensor:
        """|FFT|^2 of windowed frames: (batch, frames, bins)."""
        if center:
            waves = reflected(waves, self.n_fft // 2)
        outside = self.n_fft - len(self.window)
        window = F.pad(self.window, (outside // 2, outside - outside // 2))
        return power_spectrum(waves.unfold(1, self.n_fft, self.hop), window, self.n_fft)
