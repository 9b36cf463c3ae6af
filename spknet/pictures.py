"""Pictures of an evaluation: DET curves, histograms, reliability, a map of speakers. Every function returns PNG bytes.

matplotlib's Agg canvas is used directly, so that neither a display nor pyplot's global state is needed.

    save("det.png", det({"test_list": (scores, labels)}))
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.special import ndtri

from shards.format import atomic_write
from spknet import metrics

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # told apart by the colour-blind
RATES = (1e-5, 1e-4, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # ticks
POINTS = 4000  # of a curve at most


def save(path: str | Path, png: bytes) -> None:
    with atomic_write(path) as file:
        file.write(png)


def _figure(width: float = 6.4, height: float = 5.6) -> tuple[Figure, object]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, linewidth=0.5, alpha=0.4)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def det(systems: dict[str, tuple[np.ndarray, np.ndarray]], title: str = "") -> bytes:
    """DET curves in probit axes, one a system: EER as a circle, minDCF(0.01) as a square, minDCF(0.05) as a triangle.

    systems: {name: (scores, labels)}.
    """
    figure, axes = _figure()
    lowest = 0.5
    for number, (name, (scores, labels)) in enumerate(systems.items()):
        r = metrics.rates(scores, labels)
        lowest = min(lowest, 0.5 / max(r.targets, r.nontargets))
        colour = COLOURS[number % len(COLOURS)]
        shown = _corners(r)
        style = "-" if number < len(COLOURS) else "--"
        x, y = _probit(r.fpr[shown], r.nontargets), _probit(r.fnr[shown], r.targets)
        axes.plot(x, y, style, color=colour, linewidth=1.5, label=f"{name}: EER {metrics.eer(r):.2f} %")
        at = metrics.eer(r) / 100
        axes.plot(_probit(at, r.nontargets), _probit(at, r.targets), "o", color=colour, markersize=6)
        for prior, marker in zip(metrics.PRIORS.values(), "s^"):
            cost = metrics.min_dcf(r, prior)
            x, y = _probit(cost.false_alarms / r.nontargets, r.nontargets), _probit(cost.misses / r.targets, r.targets)
            axes.plot(x, y, marker, color=colour, markersize=6, markerfacecolor="white")
    shown = np.array([rate for rate in RATES if rate >= lowest])
    for set_ticks, set_limits in ((axes.set_xticks, axes.set_xlim), (axes.set_yticks, axes.set_ylim)):
        set_ticks(ndtri(shown), [f"{100 * rate:g}" for rate in shown])
        set_limits(ndtri(max(lowest, 1e-6)) - 0.05, ndtri(0.8))
    axes.plot(axes.get_xlim(), axes.get_xlim(), ":", color="grey", linewidth=0.8)
    for marker, meaning in (("o", "EER"), ("s", "minDCF, P = 0.01"), ("^", "minDCF, P = 0.05")):
        axes.plot([], [], marker, color="grey", markerfacecolor="grey" if marker == "o" else "white", label=meaning)
    axes.set_xlabel("false alarms, % of non-targets")
    axes.set_ylabel("misses, % of targets")
    axes.set_title(title)
    axes.legend(fontsize=8, loc="upper right")
    return _png(figure)


def _probit(rate, trials: int):
    """Place of a rate on a probit axis; none of n errors stands at half an error."""
    return ndtri(np.clip(rate, 0.5 / trials, 1 - 0.5 / trials))


def _corners(r: metrics.Rates) -> np.ndarray:
    """Indices of the operating points where the curve turns, thinned evenly on the probit scale to at most POINTS."""
    turns = np.diff(r.misses[:-1]).astype(bool) != np.diff(r.misses[1:]).astype(bool)
    turns |= np.diff(r.false_alarms[:-1]).astype(bool) != np.diff(r.false_alarms[1:]).astype(bool)
    corners = np.concatenate([[0], np.flatnonzero(turns) + 1, [len(r.misses) - 1]])
    if len(corners) <= POINTS:
        return corners
    place = _probit(r.fnr[corners], r.targets) - _probit(r.fpr[corners], r.nontargets)  # rises along the curve
    return corners[np.unique(np.searchsorted(place, np.linspace(place[0], place[-1], POINTS)))]
