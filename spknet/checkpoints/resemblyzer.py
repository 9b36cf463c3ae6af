"""Resemblyzer's pretrained.pt, and the encoder of Real-Time-Voice-Cloning, which is the same network.

    {"step": 1564501, "model_state": {"lstm.weight_ih_l0": ..., "linear.bias": ..., "similarity_weight": ...}, "optimizer_state"}

similarity_weight and similarity_bias are the loss's. Resemblyzer cuts long pauses out of a recording before it embeds it
(webrtcvad); spknet does not. Real-Time-Voice-Cloning steps 80 frames from window to window, Resemblyzer and spknet 77.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spknet.checkpoints.imports import Found, tensors_of, without
from spknet.checkpoints.shapes import network_of

WHAT = "Resemblyzer's GE2E-LSTM"


def recognize(state: Any, path: Path) -> Found | None:
    """What the file is, or None where it is not Resemblyzer's."""
    weights, notes = without(tensors_of(state, "model_state"), "similarity_", "its loss's scale and shift are")
    model = network_of(weights)
    if model is None or model.name != "GE2E-LSTM":
        return None
    notes.append("Resemblyzer cuts long pauses out before it embeds, spknet does not")
    return Found(WHAT, model, weights, notes=notes)
