"""Pictures of an evaluation: DET curves, histograms, reliability, a map of speakers. Every function returns PNG bytes.

matplotlib's Agg canvas is used directly, so that neither a display nor pyplot's global state is needed.

    save("det.png", det({"test_list": (scores, labels)}))
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.special import ndtri

from shards.format import atomic_write
from spknet.evaluate import metrics

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # told apart by the colour-blind
RATES = (1e-5, 1e-4, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # ticks
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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks shows boxes
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _plain(name: str, most: int = 48) -> str:
    """A name as text: matplotlib would read `$` as mathematics and leave a leading `_` out of the legend."""
    name = name if len(name) <= most else f"{name[: most // 2]}...{name[-most // 2 :]}"
    return (" " if name.startswith("_") else "") + name.replace("\\", "/").replace("$", r"\$")


def det(systems: dict[str, tuple[np.ndarray, np.ndarray]], title: str = "") -> bytes:
    """DET curves in probit axes, one a system: EER as a circle, minDCF(0.01) as a square, minDCF(0.05) as a triangle.

    systems: {name: (scores, labels)}. Systems that put all trials in the same order (cosine, and calibrated without qualities)
    have one curve, which bears their names.
    """
    figure, axes = _figure()
    lowest, highest = 0.5, 0.6
    for number, (name, r) in enumerate(_distinct(systems)):
        lowest = min(lowest, 0.5 / max(r.targets, r.nontargets))
        colour = COLOURS[number % len(COLOURS)]
        shown = _corners(r)
        style = "-" if number < len(COLOURS) else "--"
        x, y = _probit(r.fpr[shown], r.nontargets), _probit(r.fnr[shown], r.targets)
        axes.plot(x, y, style, color=colour, linewidth=1.5, label=f"{_plain(name)}: EER {metrics.eer(r):.2f} %")
        at = metrics.eer(r) / 100
        axes.plot(_probit(at, r.nontargets), _probit(at, r.targets), "o", color=colour, markersize=6)
        for prior, marker in zip(metrics.PRIORS.values(), "s^"):
            cost = metrics.min_dcf(r, prior)
            x, y = _probit(cost.false_alarms / r.nontargets, r.nontargets), _probit(cost.misses / r.targets, r.targets)
            axes.plot(x, y, marker, color=colour, markersize=6, markerfacecolor="white")
            highest = max(highest, cost.misses / r.targets)
    shown = np.array([rate for rate in RATES if rate >= lowest])
    ticks, low = [f"{100 * rate:g}" for rate in shown], ndtri(max(lowest, 1e-6)) - 0.05
    axes.set_xticks(ndtri(shown), ticks)
    axes.set_yticks(ndtri(shown), ticks)
    axes.set_xlim(low, ndtri(0.6))
    axes.set_ylim(low, ndtri(min(highest, 0.998)) + 0.1)
    axes.plot([low, ndtri(0.6)], [low, ndtri(0.6)], ":", color="grey", linewidth=0.8)
    for marker, meaning in (("o", "EER"), ("s", "minDCF, P = 0.01"), ("^", "minDCF, P = 0.05")):
        axes.plot([], [], marker, color="grey", markerfacecolor="grey" if marker == "o" else "white", label=meaning)
    axes.set_xlabel("false alarms, % of non-targets")
    axes.set_ylabel("misses, % of targets")
    axes.set_title(_plain(title))
    axes.legend(fontsize=8, loc="upper right")
    return _png(figure)


def _distinct(systems: dict) -> list[tuple[str, metrics.Rates]]:
    """[(name, rates)] of the curves; names of equal curves together."""
    curves: list[tuple[str, metrics.Rates]] = []
    for name, (scores, labels) in systems.items():
        r = metrics.rates(scores, labels)
        for i, (other, known) in enumerate(curves):
            if np.array_equal(known.misses, r.misses) and np.array_equal(known.false_alarms, r.false_alarms):
                curves[i] = f"{other} = {name}", known
                break
        else:
            curves.append((name, r))
    return curves


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


def histogram(scores: np.ndarray, labels: np.ndarray | None, title: str = "") -> bytes:
    """Densities of target and non-target scores, with the EER threshold of these very scores; of all where labels are None."""
    figure, axes = _figure(6.4, 4.0)
    low, high = np.quantile(scores, [0.0005, 0.9995])
    bins = np.linspace(low, max(high, low + 1e-6), 80)
    parts = [(scores, "all trials", COLOURS[0])]
    if labels is not None:
        labels = np.asarray(labels).astype(bool)
        parts = [(scores[~labels], "non-targets", COLOURS[0]), (scores[labels], "targets", COLOURS[1])]
    for own, name, colour in parts:
        clipped = np.clip(own, bins[0], bins[-1])
        axes.hist(clipped, bins, density=True, alpha=0.55, color=colour, label=f"{name} ({len(own):,})")
    if labels is not None:
        threshold = metrics.eer_threshold(metrics.rates(scores, labels))
        axes.axvline(threshold, color="black", linewidth=1, label="EER threshold (oracle)")
    axes.set_xlabel("score")
    axes.set_ylabel("density")
    axes.set_title(_plain(title))
    axes.legend(fontsize=8)
    return _png(figure)


def reliability(llr: np.ndarray, labels: np.ndarray, title: str = "", bins: int = 15) -> bytes:
    """Log-likelihood ratios as they are given against those that the trials bear out, in bins of equal numbers of trials.

    On the diagonal scores mean what they say. Borne out: log odds of targets in the bin minus the list's own; half a trial
    is added to both classes, bars are two standard errors.
    """
    figure, axes = _figure(5.4, 5.0)
    labels = np.asarray(labels).astype(bool)
    order = np.argsort(llr, kind="stable")
    prior = np.log(labels.sum() / (~labels).sum())
    given, found, bars = [], [], []
    for chosen in np.array_split(order, min(bins, len(order))):
        targets = labels[chosen].sum() + 0.5
        nontargets = len(chosen) - labels[chosen].sum() + 0.5
        given.append(np.mean(llr[chosen]))
        found.append(np.log(targets / nontargets) - prior)
        bars.append(2 * np.sqrt(1 / targets + 1 / nontargets))
    axes.errorbar(given, found, yerr=bars, fmt="o", color=COLOURS[0], markersize=5, linewidth=1, label="bins of trials")
    ends = [min(*given, *found), max(*given, *found)]
    axes.plot(ends, ends, ":", color="grey", label="calibrated")
    axes.set_xlabel("log-likelihood ratio given")
    axes.set_ylabel("log-likelihood ratio borne out")
    axes.set_title(_plain(title))
    axes.legend(fontsize=8)
    return _png(figure)


def speaker_map(rows: np.ndarray, speakers: list[str], most: int = 12, each: int = 30) -> bytes:
    """A plane in which near utterances stay near (t-SNE on cosine distance) of the `most` speakers with most utterances.

    rows: (n, D) unit vectors. Distances between far groups mean nothing. PCA where there are too few utterances for t-SNE.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    names, counts = np.unique(speakers, return_counts=True)
    shown = names[np.argsort(-counts, kind="stable")[:most]]
    chosen = np.concatenate([np.flatnonzero(np.array(speakers) == name)[:each] for name in shown])
    of = np.array(speakers)[chosen]
    if len(chosen) >= 12:
        perplexity = min(20.0, (len(chosen) - 1) / 3)
        method, place = "t-SNE", TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0)
        plane = place.fit_transform(rows[chosen].astype(np.float64))
    else:
        method = "PCA"
        plane = np.zeros((len(chosen), 2))
        if len(chosen) > 1:
            plane = PCA(2).fit_transform(rows[chosen].astype(np.float64))
    figure, axes = _figure(7.0, 5.2)
    markers = "os^Dv<>Pp*hX"
    for number, name in enumerate(shown):
        x, y = plane[of == name].T
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            x, y, markers[number % len(markers)], color=colour, markersize=5, alpha=0.8, label=_plain(str(name), 24)
        )
    axes.set_title(f"{len(chosen)} utterances of {len(shown)} speakers, {method} of their embeddings")
    axes.tick_params(labelbottom=False, labelleft=False)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)
