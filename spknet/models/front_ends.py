"""Front ends of the projects whose networks are here: waves -> log mel energies, each band minus its mean over the utterance.

    kaldi        frames within the wave; each minus its mean, pre-emphasis within the frame; ln(max(mel, 1.2e-7)), mel from 20 Hz
                 to half the rate. WeSpeaker: Hamming, 16-bit scale. 3D-Speaker: Povey (Hann to the power 0.85), [-1, 1]
    speechbrain  frames centred, zeros outside; 25 ms DFT; triangles symmetric in Hz, 0 to half the rate; 10 log10, at most
                 80 dB below the utterance's maximum
    redimnet     pre-emphasis of the wave; frames centred, reflected at the ends, every 15 ms; ln(mel + 1e-6), 20 Hz to 0.475 of
                 the rate (7600 of 16000)
    tfmel        the wave minus its mean, over its deviation; pre-emphasis; frames 80 samples outside; power and mel energies kept
                 in [1e-8, 1e8]; ln(mel + 1e-8), limits as redimnet's. ReDimNet2's, with its flaw: the bins' frequencies
                 are spread over 0 to half the rate without the last bin (256 of 257)
    ge2e         frames centred, zeros outside; Hann; 25 ms DFT; triangles of equal area on Slaney's scale, 0 to half the rate;
                 the energies themselves, no logarithm, no mean removed (features.remove_mean is not looked at). Resemblyzer's

log_mel and spectrum of 2020 are in features.py. Every length is in proportion to the sample rate: windows of 25 ms, a DFT of
the next power of two. A wave shorter than a window is repeated. Everything is one batched transform without a gradient, in the
precision of the buffers (float32; float64 in a float64 network) whatever the autocast. Settings were read from the code of
each project; numbers of their code in tests/reference prove them.

    Kaldi(16000, 80, FeaturesConfig())(waves)  # (batch, samples) in [-1, 1] -> (batch, 80, frames)
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spknet.config import ConfigError, FeaturesConfig, ModelConfig
from spknet.models.features import (
    INT16,
    PRE_EMPHASIS,
    Spectrum,
    apply_masks,
    at_least,
    full_precision,
    in_pieces,
    mel_energies,
    mel_filters,
    power_spectrum,
    reflected,
    spans_of,
)

KALDI_FLOOR = 1.1920928955078125e-07  # of mel energies: float32's epsilon
TOP_DB = 80.0  # speechbrain
LOW_HZ, HIGH = 20.0, 0.475  # redimnet, tfmel: lowest frequency, highest as a fraction of the rate


def kaldi_filters(n_bins: int, n_mels: int, sample_rate: int, low: float, high: float) -> Tensor:
    """Triangles of peak 1, straight in mel = 1127 ln(1 + f / 700): (n_bins, n_mels) for bins at equal steps from 0 Hz.

    In single precision, step by step as Kaldi and torchaudio do: its rounding is seen where a filter holds one bin's edge.
    """
    mel = 1127 * (1 + torch.linspace(0, sample_rate / 2, n_bins) / 700).log()
    bottom, top = (1127 * math.log(1 + hz / 700) for hz in (low, high))
    step = (top - bottom) / (n_mels + 1)
    left, centre, right = (bottom + (torch.arange(n_mels) + i) * step for i in (0.0, 1.0, 2.0))
    rising = (mel[:, None] - left) / (centre - left)
    falling = (right - mel[:, None]) / (right - centre)
    return torch.minimum(rising, falling).clamp(min=0)


def symmetric_filters(n_bins: int, n_mels: int, sample_rate: int) -> Tensor:
    """SpeechBrain's triangles, as wide above their centre as below it, in single precision: (n_bins, n_mels)."""
    hz = torch.linspace(0, sample_rate / 2, n_bins)
    corners = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + sample_rate / 2 / 700), n_mels + 2) / 2595) - 1)
    distance = (hz[:, None] - corners[1:-1]) / (corners[1:-1] - corners[:-2])
    return torch.minimum(1 + distance, 1 - distance).clamp(min=0)


def slaney_filters(n_bins: int, n_mels: int, sample_rate: int) -> Tensor:
    """Triangles of equal area on the scale of Slaney's Auditory Toolbox, as librosa has them: (n_bins, n_mels).

    Up to 1000 Hz a step is 200/3 Hz; above it 27 steps are a factor of 6.4.
    """
    hz = torch.linspace(0, sample_rate / 2, n_bins, dtype=torch.float64)
    steps = torch.linspace(0, 15 + 27 * math.log(sample_rate / 2000) / math.log(6.4), n_mels + 2, dtype=torch.float64)
    corners = torch.where(steps < 15, steps * 200 / 3, 1000 * 6.4 ** ((steps - 15) / 27))
    rising = (hz[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - hz[:, None]) / (corners[2:] - corners[1:-1])
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (corners[2:] - corners[:-2])).float()


def emphasize(waves: Tensor) -> Tensor:
    """x[t] - 0.97 x[t-1], with x[-1] = x[1]: (batch, samples) -> the same shape."""
    return waves - PRE_EMPHASIS * torch.cat([waves[:, 1:2], waves[:, :-1]], dim=1)


class FrontEnd(nn.Module):
    """waves (batch, samples) in [-1, 1] -> (batch, bands, frames). hop: samples between frames.

    masks (batch, 2 K, 2): SpecAugment, see spknet.models.features.apply_masks. A subclass says the window, the filters and
    `energies`. Tables are made anew with the network, so they are in no checkpoint.
    """

    hop_ms = 10.0

    def __init__(self, sample_rate: int, bands: int, config: FeaturesConfig):
        super().__init__()
        self.sample_rate, self.bands, self.remove_mean = sample_rate, bands, config.remove_mean
        self.length = int(0.025 * sample_rate)
        self.hop = int((config.hop_ms or self.hop_ms) / 1000 * sample_rate)
        self.n_fft = 2 ** math.ceil(math.log2(self.length))
        if self.hop < 1:
            raise ConfigError(f"features.hop_ms {config.hop_ms}: less than a sample at {sample_rate} Hz; give 10 or 15")
        self.build(config)

    def build(self, config: FeaturesConfig) -> None:
        """Calls `tables`, and keeps what else the subclass needs."""
        raise NotImplementedError

    def tables(self, window: Tensor, filters: Tensor) -> None:
        self.register_buffer("window", window.float(), persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def energies(self, waves: Tensor) -> Tensor:
        """(batch, samples) of at least one window -> log mel energies (batch, frames, bands)."""
        raise NotImplementedError

    @torch.compiler.disable  # complex numbers are not compiled anyway: break the graph once, here, without a warning
    @torch.no_grad()
    def forward(self, waves: Tensor, masks: Tensor | None = None) -> Tensor:
        with full_precision(waves):
            waves = at_least(waves.to(self.window.dtype), self.length, dim=1)
            self.spans = spans_of(self.filters)
            return apply_masks(in_pieces(self.centred, waves, self.hop), masks)

    def centred(self, waves: Tensor) -> Tensor:
        x = self.energies(waves).mT.contiguous()
        return x.sub_(x.mean(dim=2, keepdim=True)) if self.remove_mean else x

    def frames(self, waves: Tensor, side: int = 0) -> Tensor:
        """Windows of the wave, with `side` samples of zeros before and after it: (batch, frames, length)."""
        return F.pad(waves, (side, side)).unfold(1, self.length, self.hop)

    def power(self, frames: Tensor) -> Tensor:
        """|DFT|^2 of windowed frames: (batch, frames, n_fft / 2 + 1)."""
        return power_spectrum(frames, self.window, self.n_fft)


class Kaldi(FrontEnd):
    """Kaldi's fbank without dither (spknet.data.dither) and energy."""

    def build(self, config: FeaturesConfig) -> None:
        self.scale = 1.0 if config.scale == "unit" else INT16
        # Double precision, then rounded: a float32 cosine is 1e-5 off where the Povey window is near 0.
        if config.window == "povey":
            window = torch.hann_window(self.length, periodic=False, dtype=torch.float64).pow(0.85)
        else:
            window = torch.hamming_window(self.length, periodic=False, dtype=torch.float64)
        limits = (LOW_HZ, self.sample_rate / 2)
        self.tables(window, kaldi_filters(self.n_fft // 2 + 1, self.bands, self.sample_rate, *limits))

    def energies(self, waves: Tensor) -> Tensor:
        frames = self.frames(waves * self.scale)
        frames = frames - frames.mean(dim=2, keepdim=True)
        # Pre-emphasis within the frame; the sample before the first is the first.
        frames = torch.cat(
            [(1 - PRE_EMPHASIS) * frames[:, :, :1], frames[:, :, 1:].sub(frames[:, :, :-1], alpha=PRE_EMPHASIS)], 2
        )
        return mel_energies(self.power(frames), self.filters, self.spans).clamp_(min=KALDI_FLOOR).log_()


class SpeechBrain(FrontEnd):
    """SpeechBrain's Fbank."""

    def build(self, config: FeaturesConfig) -> None:
        self.n_fft = self.length
        window = torch.hamming_window(self.length, dtype=torch.float64)
        self.tables(window, symmetric_filters(self.n_fft // 2 + 1, self.bands, self.sample_rate))

    def energies(self, waves: Tensor) -> Tensor:
        x = mel_energies(self.power(self.frames(waves, self.length // 2)), self.filters, self.spans)
        x = 10 * x.clamp(min=1e-10).log10()
        return x.maximum(x.amax(dim=(1, 2), keepdim=True) - TOP_DB)


class ReDimNetMel(FrontEnd):
    """The MelBanks of ReDimNet (torchaudio's mel spectrogram)."""

    hop_ms = 15.0

    def build(self, config: FeaturesConfig) -> None:
        self.normalize = bool(config.normalize_wave)
        limits = (LOW_HZ, HIGH * self.sample_rate)
        window = torch.hamming_window(self.length, dtype=torch.float64)
        self.tables(window, mel_filters(self.n_fft // 2 + 1, self.bands, self.sample_rate, *limits))

    def energies(self, waves: Tensor) -> Tensor:
        waves = normalize(waves) if self.normalize else waves
        frames = self.frames(reflected(emphasize(waves), self.length // 2))
        return mel_energies(self.power(frames), self.filters, self.spans).add_(1e-6).log_()


class TFMel(FrontEnd):
    """The TFMelBanks of ReDimNet2."""

    def build(self, config: FeaturesConfig) -> None:
        self.normalize = config.normalize_wave is not False
        self.side = self.length // 5
        limits = (LOW_HZ, HIGH * self.sample_rate)
        window = torch.hamming_window(self.length, periodic=False, dtype=torch.float64)
        filters = kaldi_filters(self.n_fft // 2, self.bands, self.sample_rate, *limits)
        self.tables(window, filters)

    def energies(self, waves: Tensor) -> Tensor:
        waves = normalize(waves) if self.normalize else waves
        power = self.power(self.frames(emphasize(waves), self.side))[:, :, :-1].clamp(1e-8, 1e8)
        return mel_energies(power, self.filters, self.spans).clamp_(1e-8, 1e8).add_(1e-8).log_()


class GE2EMel(FrontEnd):
    """Resemblyzer's mel spectrogram (librosa's)."""

    def build(self, config: FeaturesConfig) -> None:
        self.n_fft, self.remove_mean = self.length, False
        window = torch.hann_window(self.length, dtype=torch.float64)
        self.tables(window, slaney_filters(self.n_fft // 2 + 1, self.bands, self.sample_rate))

    def energies(self, waves: Tensor) -> Tensor:
        return self.power(self.frames(waves, self.length // 2)) @ self.filters


def normalize(waves: Tensor) -> Tensor:
    """Each wave minus its mean, over its deviation: (batch, samples) -> the same shape."""
    waves = waves - waves.mean(dim=1, keepdim=True)
    return waves / (waves.square().mean(dim=1, keepdim=True).sqrt() + 1e-8)  # std_mean takes ten times as long on a CPU


FRONT_ENDS = {"kaldi": Kaldi, "speechbrain": SpeechBrain, "redimnet": ReDimNetMel, "tfmel": TFMel, "ge2e": GE2EMel}

# What a network of this variant was published with; what the user gives goes first.
PUBLISHED = {
    "2020": {"name": "log_mel"},
    "2020 spectrum": {"name": "spectrum"},
    "wespeaker": {"name": "kaldi", "window": "hamming", "scale": "int16"},
    "3dspeaker": {"name": "kaldi", "window": "povey", "scale": "unit"},
    "speechbrain": {"name": "speechbrain"},
    "taoruijie": {"name": "redimnet", "hop_ms": 10.0},
    "redimnet": {"name": "redimnet"},
    "redimnet2": {"name": "tfmel"},
    "resemblyzer": {"name": "ge2e"},
}


def resolve(config: FeaturesConfig, variant: str) -> FeaturesConfig:
    """The options with `auto` and None replaced by what the network's variant was published with."""
    published = PUBLISHED.get(variant, PUBLISHED["wespeaker"])
    if config.name not in ("auto", published["name"]):
        published = {"window": "hamming", "scale": "int16"}  # another front end than the published one
    unset = {name: value for name, value in published.items() if getattr(config, name) in ("auto", None)}
    return dataclasses.replace(config, **unset)


def build_features(
    model: ModelConfig, sample_rate: int, config: FeaturesConfig | None = None, variant: str = "wespeaker", **of_2020
) -> nn.Module:
    """The front end: features(waves, masks) -> (batch, bands, frames), with attributes `bands` and `hop` (samples).

    variant: a key of PUBLISHED. of_2020: arguments of Spectrum, for log_mel and spectrum; options of the user go first.
    """
    config = resolve(config or FeaturesConfig(), variant)
    if config.name in FRONT_ENDS:
        return FRONT_ENDS[config.name](sample_rate, model.n_mels, config)
    if model.window != "auto":
        of_2020["window"] = model.window
    bands = 0 if config.name == "spectrum" else model.n_mels
    return Spectrum(sample_rate, bands, log=model.log_input, input_scale=model.input_scale, **of_2020)
