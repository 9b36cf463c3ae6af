"""Evaluation of a network on trial lists: embed every utterance once, score every list, report.

RUN/eval/step-00001200/scores.txt    `score left right target|nontarget` a trial of the first list, in its order
                       scores-NAME.txt  the same for each further list
                       report.json   every figure with its interval (spknet.report)
                       det.png       miss against false-alarm rate (spknet.pictures)

python -m spknet.evaluate --checkpoint runs/a --trials veri_test.txt --root voxceleb1/test/wav      (or under torchrun)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from shards.format import atomic_write
from spknet import pictures, report, scoring
from spknet.config import Config
from spknet.embed import Crops, embed
from spknet.gather import rank, world_size
from spknet.sources import Places, Sources, as_list
from spknet.trials import TrialError, Trials, read_enrolment, read_trials

SAMPLE_RATE = 16000  # Hz
UNLOGGED = ("eer_threshold", "replicates")  # figures that are no curve over the steps


@dataclass(frozen=True)
class Prepared:
    """Lists that have been checked, and where their utterances lie. The first list is the headline; dev is never it
    where there is a test list."""

    lists: list[Trials]
    roles: list[str]  # test or dev, one a list
    sources: Sources
    places: Places  # every utterance of every list once, sorted by name

    @property
    def row(self) -> dict[str, int]:
        """Row of each utterance in the embeddings."""
        return {name: i for i, name in enumerate(self.places.names)}


def check(config: Config, *, lengths: bool = True, enrolment: str | None = None) -> Prepared | None:
    """Reads all lists and finds all their utterances; None where the config names no list. Any rank may call it alone.

    Raises TrialError (list, line, what is wrong) or ShardError (audio that cannot be read).
    """
    tests = as_list(config.eval.trials)
    paths = tests + as_list(config.eval.dev_trials)
    if not paths:
        return None
    models = read_enrolment(enrolment) if enrolment else None
    lists = [read_trials(path, models) for path in paths]
    names = [trials.name for trials in lists]
    if len(set(names)) < len(names):
        raise TrialError(
            f"two lists are called {max(names, key=names.count)!r}; reports tell lists apart by file name: rename one"
        )
    sources = Sources(config.eval.shards, config.eval.root, SAMPLE_RATE)
    places = sources.locate(sorted(set().union(*(trials.utterances() for trials in lists))))
    missing = set(places.missing())
    for trials in lists if missing else ():
        absent = [name for name in trials.utterances() if name in missing]
        if absent:
            first = min(absent, key=trials.line_of)
            raise TrialError(
                f"{trials.path}, line {trials.line_of(first)}: {first} not found in {sources.describe(config.eval.shards)}"
                f" ({len(absent)} utterances of this list are missing)"
            )
    if lengths:
        places = sources.measure(places)
    return Prepared(lists, ["test"] * len(tests) + ["dev"] * (len(paths) - len(tests)), sources, places)


def crops_of(config: Config) -> Crops:
    """What of each utterance is embedded, as config.eval says."""
    return Crops(round(config.eval.crop_seconds * SAMPLE_RATE), config.eval.crops, config.eval.padding)


def evaluate_network(
    model: torch.nn.Module,
    config: Config,
    *,
    out_dir: str | Path,
    step: int = 0,
    device: torch.device | str = "cpu",
    trials: Prepared | None = None,
) -> dict:
    """Evaluates on config.eval.trials and dev_trials; called on all ranks; writes out_dir on rank 0.

    trials: what `check(config)` gave, to save checking again. Returns on rank 0 {"eer" (percent), "min_dcf_p01",
    "min_dcf_p05", ...} of the first test list (of the development list where there is no other), the same of the
    development list as "dev_eer", ..., and of every list under "lists"; {} on other ranks.
    """
    prepared = on_first(lambda: trials or check(config), share=False)
    places, sources = shared_places(prepared, config)
    embeddings = embed(
        model,
        sources,
        places,
        crops_of(config),
        device=device,
        batch_seconds=config.eval.batch_seconds,
        what="evaluation",
    )
    return on_first(lambda: _assess(prepared, embeddings, config, Path(out_dir), step), share=False) or {}


def on_first(work, share: bool = True):
    """The result of work() on rank 0, on every rank where it is shared, else None there. Its errors are raised on all."""
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except Exception as raised:  # raised again below, after the other ranks know
            error = raised
    if world_size() > 1:
        box = [(None if error is None else f"rank 0: {error}", result if share else None)]
        dist.broadcast_object_list(box, src=0)
        if rank() != 0:
            message, result = box[0]
            error = None if message is None else TrialError(message)
    if error is not None:
        raise error
    return result


def shared_places(prepared: Prepared | None, config: Config) -> tuple[Places, Sources]:
    """Rank 0's places on every rank, with this rank's own handles on the data."""
    places = on_first(lambda: prepared.places)
    if prepared is not None:
        return places, prepared.sources
    return places, Sources(config.eval.shards, config.eval.root, SAMPLE_RATE)


def score_list(trials: Trials, rows: dict[str, int], embeddings: np.ndarray, config: Config) -> np.ndarray:
    """(n,) scores of one list by config.eval.score. embeddings: (utterances, crops, D), rows: utterance -> row."""
    right = np.array([rows[name] for name in trials.tests])[trials.right]
    if config.eval.score == "mean_distance":
        # voxceleb_trainer does not length-normalise the embeddings of a network trained with proto.
        crops = embeddings if config.loss.name == "proto" else scoring.unit(embeddings)
        models = [[rows[u] for u in trials.utterances_of(m)] for m in trials.models]
        if all(len(own) == 1 for own in models):
            scores = scoring.mean_distance(crops, crops, np.array([own[0] for own in models])[trials.left], right)
        else:
            left = [crops[own].reshape(-1, crops.shape[-1]) for own in models]
            scores = scoring.mean_distance(left, crops, trials.left, right)
    else:
        vectors = scoring.vectors(embeddings)
        left = scoring.unit(scoring.enrol(trials, rows, vectors))
        scores = scoring.cosine(left, scoring.unit(vectors), trials.left, right)
    scoring.check_finite(scores, trials)
    return scores


def write_scores(path: Path, trials: Trials, scores: np.ndarray) -> None:
    """`score left right` a trial, with target or nontarget behind it where the list says so; 9 digits hold a float32."""
    labels = [""] * len(trials) if trials.labels is None else [(" nontarget", " target")[v] for v in trials.labels]
    lines = [
        f"{score:.9g} {trials.models[a]} {trials.tests[b]}{label}\n"
        for score, a, b, label in zip(scores.tolist(), trials.left, trials.right, labels)
    ]
    with atomic_write(path) as file:
        file.write("".join(lines).encode())


def scores_name(number: int, name: str) -> str:
    """File name of a list's scores: the headline's is scores.txt."""
    return "scores.txt" if number == 0 else f"scores-{name}.txt"


def _assess(prepared: Prepared, embeddings: np.ndarray, config: Config, out_dir: Path, step: int) -> dict:
    out_dir.mkdir(parents=True, exist_ok=True)
    rows, found, curves = prepared.row, [], {}
    for number, (trials, role) in enumerate(zip(prepared.lists, prepared.roles)):
        scores = score_list(trials, rows, embeddings, config)
        write_scores(out_dir / scores_name(number, trials.name), trials, scores)
        entry = {"name": trials.name, "path": trials.path, "role": role, "trials": len(trials)}
        entry["scores"] = {config.eval.score: scores_name(number, trials.name)}
        if trials.labels is not None:
            figures = report.figures(scores, trials, definition=config.eval.metrics)
            entry |= {"speakers": report.speakers(trials), "systems": {config.eval.score: figures}}
            curves[trials.name] = (scores, trials.labels)
        found.append(entry)
    result = {"version": report.VERSION, "step": step, "lists": found}
    report.write_json(out_dir / "report.json", result)
    if curves:
        pictures.save(out_dir / "det.png", pictures.det(curves))
    return flat(result)


def flat(result: dict) -> dict:
    """What the trainer logs: the headline's numbers, the development list's with `dev_` before them, all under `lists`."""
    lists = {entry["name"]: numbers(entry) for entry in result["lists"]}
    headline = dict(next((found for found in lists.values() if found), {}))
    for entry in result["lists"]:
        if entry["role"] == "dev":
            headline |= {f"dev_{name}": value for name, value in lists[entry["name"]].items()}
    return headline | {"lists": lists}


def numbers(entry: dict) -> dict:
    """The plain figures of a list's last system, intervals as eer_low and eer_high; {} for an unlabelled list."""
    if "systems" not in entry:
        return {}
    figures = list(entry["systems"].values())[-1]
    kept = {name: value for name, value in figures.items() if isinstance(value, (int, float)) and name not in UNLOGGED}
    for name, (low, high) in (figures.get("interval") or {}).items():
        kept |= {f"{name}_low": low, f"{name}_high": high}
    return kept
