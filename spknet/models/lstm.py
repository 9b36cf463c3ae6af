"""The LSTM of generalised end-to-end training (Wan et al., 2018, arXiv 1710.10467), as Resemblyzer released it.

    wave      raised to -30 dBFS where it is quieter, padded with zeros to the end of the last window
    windows   160 frames (1.6 s) every 77; the last one counts where the wave fills three quarters of it. A training crop that is
              shorter is one window of its own length
    lstm      3 layers of 256; the last frame's state
    linear    256 -> 256, ReLU, length 1: the embedding of a window
    pool      mean of the windows' embeddings (TAP), length 1

Features are mel energies without logarithm (`ge2e`). Resemblyzer cuts long pauses out before all this, by the detector of
WebRTC; that step is not here. Names of parameters are Resemblyzer's, which are those of Real-Time-Voice-Cloning's encoder.

    GE2ELSTM(ModelConfig(name="GE2E-LSTM"))(waves)  # (batch, samples) -> (batch, 256), of length 1 and nowhere negative
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spknet.config import ModelConfig
from spknet.models.network import Network

WINDOW, STEP = 160, 77  # frames; 1.3 windows a second
LEAST = 120  # frames of the last window that the wave fills: three quarters
LEVEL = 10 ** (-30 / 20)  # root mean square that quieter waves are raised to


class LSTM(nn.LSTM):
    """Windows (batch, frames, bands) -> the last layer's last state (batch, hidden)."""

    def forward(self, windows: Tensor) -> Tensor:
        return super().forward(windows)[1][0][-1]

    def multiply_adds(self, output: Tensor) -> int:
        """Of the four gates' products with input and state, over the frames of a window."""
        return len(output) * WINDOW * sum(w.numel() for name, w in self.named_parameters() if name.startswith("weight"))


class GE2ELSTM(Network):
    """waves (batch, samples) -> (batch, embedding_size); see spknet.models.network."""

    encoders = ("TAP",)
    variants = ("resemblyzer",)

    def build(self, config: ModelConfig) -> None:
        hidden = max(1, round(256 * config.width))
        self.lstm = LSTM(self.bands, hidden, num_layers=3, batch_first=True)
        self.linear = nn.Linear(hidden, config.embedding_size)

    def forward(self, waves: Tensor, masks: Tensor | None = None) -> Tensor:
        waves, hop, samples = raised(waves), self.features.hop, waves.shape[1]
        if not self.training:  # of the wave, not of the features: a frame may see its end and the zeros
            missing = seen(n_windows(1 + samples // hop)) * hop - samples
            waves = F.pad(waves, (0, torch.sym_max(0, missing)))
        return super().forward(waves, masks)

    def frames(self, x: Tensor) -> Tensor:
        n = n_windows(x.shape[2])
        if self.training and x.shape[2] < WINDOW:  # nothing is learned from zeros
            windows = x.mT[:, None]
        else:
            x = F.pad(x, (0, torch.sym_max(0, seen(n) - x.shape[2])))
            windows = x.mT.unfold(1, WINDOW, STEP)[:, :n].mT  # (batch, n, frames, bands)
        return self.lstm(windows.flatten(0, 1)).unflatten(0, windows.shape[:2]).mT

    def embed_frames(self, x: Tensor) -> Tensor:
        windows = F.normalize(self.linear(x.mT).relu(), dim=2)
        return F.normalize(windows.mean(dim=1), dim=1)


def raised(waves: Tensor) -> Tensor:
    """Waves quieter than -30 dBFS made as loud: (batch, samples) -> the same shape. Silence stays silence."""
    level = waves.square().mean(dim=1, keepdim=True).sqrt()
    return waves * (LEVEL / level.clamp(min=1e-12)).clamp(min=1)


def n_windows(frames: int) -> int:
    """How many windows an utterance of so many frames has, the last one perhaps padded; at least one.

    Without a branch, for torch.export; and ONNX rounds a quotient towards zero, which below one window makes no difference here.
    """
    return torch.sym_max(1, (frames - 1 - LEAST) // STEP + 1)


def seen(windows: int) -> int:
    """Frames from the first window's beginning to the last one's end."""
    return (windows - 1) * STEP + WINDOW
