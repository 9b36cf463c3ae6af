"""spknet: networks that tell speakers apart. The front door; torch is imported by what is used only.

import spknet

network = spknet.load("runs/a")
network.embed(["a.wav", "b.m4a"])        # (2, D) float32, unit length
network.verify("a.wav", "b.wav").same    # of a run with a card: `spknet card runs/a`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spknet.evaluate.report import Report
    from spknet.evaluate.systems import System
    from spknet.use.network import Network, load
    from spknet.use.verdict import Verdict

__all__ = ["Network", "Report", "System", "Verdict", "load"]
_HOME = {
    "Network": "spknet.use.network",
    "Report": "spknet.evaluate.report",
    "System": "spknet.evaluate.systems",
    "Verdict": "spknet.use.verdict",
    "load": "spknet.use.network",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'spknet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
