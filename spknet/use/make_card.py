"""A network's card: calibration and thresholds learned on development speakers, figures, and a page for its readers.

    spknet card runs/a                                            # on the run's own eval.dev_trials and eval.trials
    spknet card model.pt --dev_trials dev.txt --root wav          # of a file: model.pt.card.json, model.pt.card.md
    spknet card runs/a --prior 0.01 --license "CC BY 4.0"

Writes RUN/card.json (spknet.checkpoints.card says what is in it) and RUN/card.md. Trials are scored as `spknet verify` does:
cosine of whole utterances. Test lists are reported; nothing is chosen on them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from shards.format import sha256_file, write_file
from spknet.checkpoints import card as cards
from spknet.checkpoints.card import Calibration, Card, CardError, FalseAlarms, Histogram, ListFigures
from spknet.config import Config, flatten, to_dict
from spknet.errors import run
from spknet.evaluate import calibration, evaluation
from spknet.evaluate.commands import Parser, at_least, check_file
from spknet.evaluate.embed import Embedding
from spknet.evaluate.evaluation import Asked
from spknet.evaluate.lists import Lists, open_lists, trained_speakers
from spknet.evaluate.report import ListReport
from spknet.evaluate.systems import System
from spknet.evaluate.thresholds import threshold_card
from spknet.evaluate.trials import speakers
from spknet.evaluate.utterances import Crops
from spknet.models.describe import parameters
from spknet.use import model_card
from spknet.use.network import Network, load

BINS = 50  # of the histogram


def make(network: Network, lists: Lists, prior: float = 0.5, license: str | None = None) -> Card:
    """The card of a network. lists: with one development list at least. prior: share of targets among the pairs to come.

    Raises CardError where there is no such list or its speakers are those of training, CalibrationError where it cannot
    calibrate.
    """
    if lists.dev is None:
        raise CardError("a card is learned on development trials with labels; give --dev_trials LIST --root FOLDER")
    _check_unseen(network, lists)
    how = Embedding(Crops.of_seconds(0, 1, network.sample_rate))
    report = evaluation.evaluate(network.model, lists, System(), how, Asked(breakdown=False))
    dev = next(one for one in report.lists if one.trials is lists.dev)
    scores, labels = dev.last[1], dev.trials.labels
    fitted = calibration.fit(calibration.features(scores, []), labels)
    learned = Calibration(float(fitted.weights[0]), fitted.bias)
    rates = [row for row in threshold_card((scores, labels), None) if row["threshold"] is not None]
    return Card(
        calibration=learned,
        target_prior=prior,
        threshold=cards.threshold_of(learned, prior),
        histogram=_histogram(scores, labels),
        false_alarm_thresholds=[FalseAlarms(row["rate"], row["threshold"], row["frr"]) for row in rates],
        lists=[_figures(one) for one in [dev, *(one for one in report.lists if one is not dev)] if one.systems],
        network=_network(network),
        provenance=_provenance(network, lists),
        license=license,
    )


def _check_unseen(network: Network, lists: Lists) -> None:
    trained = set(trained_speakers(network.config, network.meta) or ())
    seen = sorted(trained & set(speakers(lists.dev).names))
    if seen:
        raise CardError(
            f"{lists.dev.path}: the network was trained on {len(seen)} of its speakers ({seen[0]}, ...), whose scores are too"
            " good to learn a threshold on; give trials of others (`spknet trials --run RUN` makes them)"
        )


def _histogram(scores: np.ndarray, labels: np.ndarray) -> Histogram:
    edges = np.linspace(scores.min(), scores.max(), BINS + 1, dtype=np.float64)
    counts = [np.histogram(scores[labels == label], edges)[0].tolist() for label in (1, 0)]
    return Histogram(edges.tolist(), *counts)


def _figures(one: ListReport) -> ListFigures:
    found = one.systems[one.last[0]]
    numbers = {name: found[name] for name in ("eer", "min_dcf_p01", "min_dcf_p05", "min_cllr")}
    counts = (len(one.trials), found["targets"], found["nontargets"], one.speakers)
    return ListFigures(one.trials.name, one.role, *counts, numbers, found["interval"])


def _network(network: Network) -> dict[str, Any]:
    model = network.config.model
    return {
        "name": model.name,
        "embedding_size": network.dimensions,
        "sample_rate": network.sample_rate,
        "parameters": parameters(network.model),
        "features": dataclasses.asdict(network.config.features),
    }


def _provenance(network: Network, lists: Lists) -> dict[str, Any]:
    config, meta = network.config, network.meta
    trained = trained_speakers(config, meta)
    data = config.data.train_shards or config.data.train_list or None
    return {
        "checkpoint": Path(meta["path"]).name,
        "step": meta.get("step"),
        "epoch": meta.get("epoch"),
        "weights_sha256": cards.weights_digest(network.model.state_dict()),
        "training_data": [Path(name).name for name in ([data] if isinstance(data, str) else data or [])],
        "training_speakers": None if trained is None else len(trained),
        "options": recipe(config),
        "revision": _revision(Path(meta["path"])),
        "development_list": {"name": lists.dev.name, "sha256": sha256_file(lists.dev.path)},
        "date": time.strftime("%Y-%m-%d"),
        "version": metadata.version("spknet"),
    }


def recipe(config: Config) -> dict[str, Any]:
    """The options that shape the network and are not the defaults, `group.name`; of paths the last part."""
    given, default = flatten(to_dict(config)), flatten(to_dict(Config()))
    apart = ("eval.", "log.", "run_dir", "train.device", "train.threads", "train.resume")

    def shown(value):
        if isinstance(value, list):
            return [shown(one) for one in value]
        return Path(value).name if isinstance(value, str) and "/" in value else value

    return {name: shown(given[name]) for name in given if given[name] != default[name] and not name.startswith(apart)}


def _revision(checkpoint: Path) -> str | None:
    """The revision of the code that trained, as the run's record says."""
    try:
        return json.loads((checkpoint.parents[1] / "record.json").read_text()).get("git_revision")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser("spknet card", __doc__.split("\n\n")[0])
    parser.add("network", help="run folder or checkpoint file")
    parser.add("--dev_trials", help="development list with labels (default: the run's)")
    parser.add("--trials", nargs="+", help="test lists to report (default: the run's)")
    parser.add("--root", nargs="+", help="folders that the paths in the lists start from (default: the run's)")
    parser.add("--shards", nargs="+", help="packed data sets that hold the utterances (default: the run's)")
    parser.add("--prior", type=at_least(0.0, True), default=0.5, help="share of pairs to come that are one speaker's")
    parser.add("--license", help="under which the network may be used")
    parser.add("--device", default="auto", help="where it runs: auto, cpu, cuda")
    chosen = parser.parse_args(argv)
    if chosen.prior >= 1:
        parser.error(f"argument --prior: {chosen.prior}: expected a number below 1")
    network = load(chosen.network, chosen.device)
    path = cards.place(chosen.network)
    check_file(path)
    asked = network.config.eval
    if chosen.dev_trials or chosen.trials or chosen.root or chosen.shards:
        asked = dataclasses.replace(asked, dev_trials=chosen.dev_trials, trials=chosen.trials)
        if chosen.root or chosen.shards:
            asked = dataclasses.replace(asked, root=chosen.root, shards=chosen.shards)
    if not asked.dev_trials:
        raise CardError(
            f"{chosen.network} names no development list; give --dev_trials LIST --root FOLDER (`spknet trials --run RUN`"
            " makes one of speakers that a run kept out)"
        )
    where = {"root": asked.root, "shards": asked.shards, "sample_rate": network.sample_rate}
    card = make(network, open_lists(asked.trials, asked.dev_trials, **where), chosen.prior, chosen.license)
    cards.write(path, card)
    page = path.with_suffix(".md")
    write_file(page, model_card.markdown(card))
    print(model_card.headline(card))
    print(f"{path}, {page}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
