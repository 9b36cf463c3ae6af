"""Augmentation's half on the device: speed, reverberation, noise, level, gain, channel, in this order.

What is drawn comes from the loader as index tensors whose sizes the host knows, so nothing here waits for the device. The
noise's level: with P the mean square, floor as the preset says, the noise is multiplied by
sqrt((P_speech + floor) / (P_noise + floor) / 10^(SNR / 10)), where speech is what stands there, reverberated or not.

    waves = mix(batch.crops, batch.augment, samples=32000, dtype=torch.float32)  # (n, samples) in [-1, 1]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spknet.data import dither
from spknet.data.channel import convolve, low_pass, resampler, telephone
from spknet.data.presets import PEAK_FLOOR


@dataclass(frozen=True)
class Mixing:
    """What `mix` must know of a batch besides tensors; rir, level and power_floor as in AugmentConfig."""

    rate: int = 16000  # Hz
    layers: tuple[int, ...] = ()  # rows of `noise` that are added together, no utterance twice in one; empty: all
    rir: str = "aligned"
    level: str = "kept"
    power_floor: float = 0.0
    dither: float = 0.0  # steps of 16-bit samples


def mix(crops: torch.Tensor, augment: dict[str, torch.Tensor], samples: int, dtype: torch.dtype) -> torch.Tensor:
    """Augmented waves in [-1, 1], (n, samples), of int16 crops (n, >= samples) and the tensors of `Augmenter.read`."""
    how = augment.get("mixing", Mixing())
    waves = crops.to(dtype).mul_(1 / 32768)  # exact, and a tensor of our own that may be written to
    if "speed" in augment:
        waves = _change_speed(waves, augment, samples)
    waves = waves[:, :samples]
    touched = augment.get("augmented", ())  # places whose level is set afterwards
    power = _power(waves[touched]) if len(touched) and how.level == "power" else None
    if len(augment.get("rir", ())):
        reverberate = _reverberate if how.rir == "aligned" else _convolve_unit_energy
        these = augment["rir_of"]
        waves[these] = reverberate(waves[these], augment["rir"].to(dtype))
    if len(augment.get("noise", ())):
        _add_noise(waves, augment, how)
    if len(touched):
        _set_level(waves, touched, power)
    if "gain_db" in augment:
        waves = _gain(waves, augment["gain_db"].to(dtype))
    if len(augment.get("lowpass_of", ())):
        these = augment["lowpass_of"]
        waves[these] = low_pass(waves[these], augment["lowpass_hz"].to(dtype) / how.rate)
    if len(augment.get("telephone_of", ())):
        these = augment["telephone_of"]
        waves[these] = telephone(waves[these], augment["telephone_law"], how.rate)
    if "dither" in augment:
        waves = dither.add(waves, augment["dither"], how.dither)
    return waves


def _power(waves: torch.Tensor) -> torch.Tensor:
    return waves.square().mean(dim=1, keepdim=True)


def _add_noise(waves: torch.Tensor, augment: dict[str, torch.Tensor], how: Mixing) -> None:
    """Adds to `waves` in place. The level is that of the speech before any noise, whatever the number of layers."""
    floor, first, power = how.power_floor, 0, None
    for size in how.layers or (len(augment["noise"]),):
        rows = slice(first, first + size)
        these, first = augment["noise_of"][rows], first + size
        speech, noise = waves[these], augment["noise"][rows].to(waves.dtype).mul_(1 / 32768)
        if len(how.layers) > 1:
            power = _power(waves) if power is None else power  # layers after the first find noise there
        clean = _power(speech) if power is None else power[these]
        ratio = (clean + floor) / (_power(noise) + floor).clamp_min(1e-10)
        ratio = ratio / 10 ** (augment["noise_snr"][rows].to(waves.dtype)[:, None] / 10)
        waves[these] = noise.mul_(ratio.sqrt()).add_(speech)


def _reverberate(waves: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    # The direct sound (the largest value) stays where the speech was, and the level is kept.
    n = waves.shape[1] + responses.shape[1]
    direct = responses.abs().argmax(dim=1)
    wet = torch.fft.irfft(torch.fft.rfft(waves, n) * torch.fft.rfft(responses, n), n)
    places = direct[:, None] + torch.arange(waves.shape[1], device=waves.device)
    wet = wet.gather(1, places)
    return wet * (_power(waves) / _power(wet).clamp_min(1e-10)).sqrt()


def _convolve_unit_energy(waves: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    # As WeSpeaker and voxceleb_trainer have it: the speech is delayed by the direct sound's way, the level changes.
    energy = responses.square().sum(dim=1, keepdim=True).clamp_min(1e-10)
    return convolve(waves, responses / energy.sqrt())[:, : waves.shape[1]]


def _set_level(waves: torch.Tensor, these: torch.Tensor, power: torch.Tensor | None) -> None:
    """Gives these waves, in place, a power, or divides them by their peaks."""
    if power is not None:
        waves[these] *= (power / _power(waves[these]).clamp_min(1e-10)).sqrt()
        return
    peaks = torch.ones_like(waves[:, :1])
    peaks[these] = (waves.abs().amax(dim=1, keepdim=True) + PEAK_FLOOR)[these]
    waves /= peaks


def _gain(waves: torch.Tensor, gain_db: torch.Tensor) -> torch.Tensor:
    peak = waves.abs().amax(dim=1, keepdim=True)
    return waves * torch.minimum(10 ** (gain_db[:, None] / 20), 1 / peak.clamp_min(1e-10))


def _change_speed(waves: torch.Tensor, augment: dict[str, torch.Tensor], samples: int) -> torch.Tensor:
    out = waves[:, :samples].clone()
    for name, these in augment.items():
        if name.startswith("speed_of_") and len(these):
            changed = resampler(int(name.removeprefix("speed_of_")), 100, waves.dtype, waves.device)(waves[these])
            out[these] = changed[:, :samples]
    return out
