"""Evaluation as a library: every utterance embedded once, every list scored by one System, one Report.

    lists = open_lists("veri_test.txt", root="voxceleb1/test/wav")
    report = evaluate(network, lists, System(top=300, cohort="runs/a")); report.write("out"); report.numbers()["eer"]

The way of a list to its EER: lists (read, found) -> embed -> systems -> scoring -> metrics. Called on all ranks; what is not
embedding happens on rank 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from shards.format import write_file
from spknet import rng
from spknet.checkpoints.network import load_network
from spknet.config import Config
from spknet.evaluate import bootstrap, cohort, groups, metrics, scoring
from spknet.evaluate.commands import check_file
from spknet.evaluate.embed import Embedding, Stopped, embed
from spknet.evaluate.lists import Cohort, Lists, open_lists, read_lists, require, utterances
from spknet.evaluate.report import ListReport, Report
from spknet.evaluate.scoring import Embedded, ScoringError
from spknet.evaluate.systems import System
from spknet.evaluate.thresholds import threshold_card
from spknet.evaluate.trials import Speakers, TrialError, Trials, speaker_of, speakers
from spknet.evaluate.utterances import SAMPLE_RATE, Crops, Sources, as_list
from spknet.parallel.together import on_first

__all__ = ["Asked", "Stopped", "check", "evaluate", "evaluate_network"]

INVERTED = (
    "the EER is above 50 %: a target scores lower than a non-target more often than not; are the labels inverted? 1 (target) is"
    " the same speaker"
)


@dataclass(frozen=True)
class Asked:
    """What a report is to contain."""

    metrics: str = "default"  # arithmetic of EER and minDCF: default or voxceleb_trainer
    bootstrap: int = bootstrap.REPLICATES  # replicates of the intervals; 0: none
    breakdown: bool = True  # by duration, and by the columns `by` of the metadata
    by: tuple[str, ...] = ()
    metadata: tuple | None = None  # spknet.evaluate.groups.read_metadata's
    speakers: dict[str, str] | None = None  # utterance or model -> speaker, where names do not tell
    ready: Callable[[Lists], None] | None = None  # called on rank 0 before anything is embedded: a last look
    keep: Callable[[Embedded, np.ndarray | None], None] | None = None  # called there with what was embedded


@dataclass(frozen=True)
class Extracted:
    """What scoring needs: lists, embeddings, the system with its cohort as an array, and embeddings scored plainly beside."""

    lists: Lists
    embedded: Embedded
    system: System
    beside: dict[str, Embedded]


def evaluate(
    network: torch.nn.Module | Embedded,
    lists: Lists | Callable[[], Lists | None] | str | list[str] | None,
    system: System | None = None,
    how: Embedding | None = None,
    asked: Asked | None = None,
    beside: dict[str, torch.nn.Module] | None = None,
) -> Report | None:
    """The report of a network on trial lists; on rank 0, None elsewhere. Called on all ranks. Of embeddings: on one rank.

    lists: of `open_lists`, a function that opens them, or paths of lists of absolute names; looked at on rank 0 only. how:
    of embedding. beside: networks that are scored plainly too. Raises UserErrors (everything that can be wrong is looked at
    before embedding), and Stopped where how.stop says so.
    """
    system, how, asked = system or System(), how or Embedding(), asked or Asked()
    if isinstance(network, Embedded):
        opened = ready(network, lists, system, asked)
        return score(Extracted(opened, network, system, {}), asked)
    extracted = extract(network, lambda: ready(network, lists, system, asked), system, how, beside or {})
    return on_first("scoring", lambda: score(extracted, asked), share=False)


def extract(network, opens: Callable[[], Lists], system: System, how: Embedding, beside: dict) -> Extracted | None:
    """The first half of `evaluate`: everything embedded. opens: called on rank 0."""
    system, places = system if system.threads else replace(system, threads=torch.get_num_threads()), None
    if system.wants_cohort:
        places = on_first("looking for the cohort", lambda: _cohort_places(system, network.sample_rate))
    lists = on_first("reading the lists", opens, share=False)
    embedded = _embed_lists(network, lists, how, "utterances")
    if places is not None:
        roots, where, of = places
        rows = embed(network, Sources(*roots, network.sample_rate), where, how, "cohort")
        system = replace(system, cohort=None if rows is None else cohort.speaker_means(rows, of, system.normalize))
    others = {name: _embed_lists(other, lists, how, name) for name, other in beside.items()}
    return None if lists is None else Extracted(lists, embedded, system, others)


def ready(network, lists, system: System, asked: Asked) -> Lists:
    """The lists, once everything that can be wrong with them and with the system has been looked at."""
    system.check()
    kept = isinstance(network, Embedded)
    lists = lists() if callable(lists) else lists
    if lists is None or (isinstance(lists, Lists) and not lists.lists):
        raise TrialError("no list to evaluate: the run names none; give --trials LIST --root FOLDER")
    if not isinstance(lists, Lists):
        lists = read_lists(lists) if kept else open_lists(lists, sample_rate=network.sample_rate)
    if kept:
        require(lists, set(utterances(lists)) - set(network.rows), lambda _: "the embeddings")
        if system.wants_cohort and not isinstance(system.cohort, np.ndarray):
            raise ScoringError(
                "these embeddings hold no cohort.npy; extract once more with --as_norm and --keep_embeddings"
            )
    if system.calibration is True and lists.dev is None:
        raise ScoringError("calibration is learned on development trials with labels; give --dev_trials LIST")
    _check_breakdown(lists, asked)
    if asked.ready is not None:
        asked.ready(lists)
    return lists


def _cohort_places(system: System, sample_rate: int) -> tuple | None:
    """((data sets, folders), utterances, speaker of each) of a cohort that is to be embedded; None where it is there."""
    system.check()
    if isinstance(system.cohort, np.ndarray):
        return None
    source = system.cohort or Cohort()
    if not isinstance(source, Cohort):
        source = Cohort.of_run(*load_network(source)[1:])
    where, of = source.places(sample_rate)
    if system.top:
        cohort.check_top(system.top, len(set(of.tolist())))
    return (source.shards, source.root), where, of


def _embed_lists(model: torch.nn.Module, lists: Lists | None, how: Embedding, what: str) -> Embedded | None:
    """Embedded utterances of rank 0's lists, on rank 0 (None elsewhere). Called on all ranks."""
    known = on_first("sharing the lists", lambda: (lists.places, (lists.sources.folders, lists.sources.roots)))
    places, where = known
    sources = lists.sources if lists else Sources(*where, model.sample_rate)
    rows = embed(model, sources, places, how, what)
    return None if rows is None else Embedded(rows, lists.rows, places.samples, sources.sample_rate)


def _check_breakdown(lists: Lists, asked: Asked) -> None:
    """Raises TrialError for breakdowns that cannot be."""
    if asked.by and not asked.metadata:
        raise TrialError("--by names columns of a CSV; give it as --metadata FILE")
    for trials in lists.lists:
        for column in asked.by:
            groups.groups_of(trials, column, asked.metadata, asked.speakers)


def score(extracted: Extracted, asked: Asked) -> Report:
    """The second half of `evaluate`: every list by every system, with its figures."""
    lists, embedded, system = extracted.lists, extracted.embedded, extracted.system
    if asked.keep is not None:
        asked.keep(embedded, system.cohort if system.wants_cohort else None)
    if system.calibration is True:
        system = system.learned(lists.dev, embedded)
    reports = []
    for trials, role in zip(lists.lists, lists.roles):
        plain = {name: system.plain().scores(trials, other) for name, other in extracted.beside.items()}
        scores = {name: list(found.values())[-1] for name, found in plain.items()} | system.scores(trials, embedded)
        reports.append(ListReport(trials, role, scores, remarks=list(trials.remarks)))
    labelled = [one for one in reports if one.trials.labels is not None]
    dev = next((one for one in labelled if one.role == "dev"), None)
    for one in labelled:
        _describe(one, dev, embedded, asked)
    report = Report(reports)
    if lists.places is not None and lists.places.notes:
        report.facts["audio"] = lists.places.notes
    if labelled:
        names = labelled[0].trials.utterances()
        rows = scoring.vectors(embedded.embeddings[[embedded.rows[name] for name in names]])
        report.points = scoring.unit(rows), [speaker_of(name, asked.speakers) for name in names]
    return report


def _describe(one: ListReport, dev: ListReport | None, embedded: Embedded, asked: Asked) -> None:
    """Fills in a labelled list's figures, thresholds, groups and remarks."""
    trials, labels, who = one.trials, one.trials.labels, speakers(one.trials, asked.speakers)
    one.speakers = len(who.names)
    for system, scores in one.scores.items():
        options = {"definition": asked.metrics, "replicates": asked.bootstrap, "llr": system == "calibrated"}
        one.systems[system] = figures(scores, trials, who, **options)
    system, scores = one.last
    last = one.systems[system]
    if last["interval"] is None and asked.bootstrap:
        one.remarks.append(f"no intervals: {last['no_interval']}")
    if last["eer"] > 50:
        one.remarks.append(INVERTED)
    if one.role == "test":
        one.thresholds = threshold_card(
            (scores, labels), None if dev is None else (dev.scores[system], dev.trials.labels)
        )
    if asked.breakdown:
        threshold = last["eer_threshold"]
        shorter = np.minimum(*embedded.sides(trials, embedded.seconds, np.sum))
        one.groups["shorter side"] = groups.by_duration(scores, labels, shorter, threshold)
        for column in asked.by:
            sides = groups.groups_of(trials, column, asked.metadata, asked.speakers)
            one.groups[column] = groups.by_group(scores, labels, *sides, threshold)


def figures(
    scores: np.ndarray,
    trials: Trials,
    who: Speakers | None = None,
    *,
    definition: str = "default",
    replicates: int = bootstrap.REPLICATES,
    llr: bool = False,
) -> dict:
    """Figures of one system on one labelled list, with 95 % intervals over speakers (who: None for those the names tell).

    definition: of EER and minDCF, default or voxceleb_trainer. llr: scores are log-likelihood ratios. `interval` is None, with
    the reason in `no_interval`, where names do not tell speakers.
    """
    found = metrics.figures(scores, trials.labels, definition)
    if llr:
        found |= metrics.llr_figures(scores, trials.labels)
    who = who or speakers(trials)
    if who.contradicting or replicates == 0 or len(who.names) < 2:
        said = f"{who.contradicting} labels contradict the speakers in the names; give --utt2spk"
        said = said if who.contradicting else "all trials are of one speaker" if replicates else "not asked for"
        return found | {"interval": None, "no_interval": said}
    drawn = bootstrap.replicate(scores, trials.labels, who.left, who.right, replicates)
    return found | {"interval": bootstrap.intervals(drawn), "replicates": replicates}


def check(config: Config, enrolment: str | None = None, sample_rate: int = SAMPLE_RATE) -> Lists | None:
    """The lists that config.eval names, with everything looked at that can be wrong; None where it names none.

    enrolment: a list of models of several utterances. sample_rate: the network's, Hz, and so the audio's. Talks to no other
    rank. Raises UserErrors: list, line, what is wrong.
    """
    how_of(config, sample_rate)
    system_of(config).check()
    if not as_list(config.eval.trials) + as_list(config.eval.dev_trials):
        return None
    where = {"root": config.eval.root, "shards": config.eval.shards, "sample_rate": sample_rate}
    lists = open_lists(config.eval.trials, config.eval.dev_trials, **where, enrolment=enrolment)
    if config.eval.scores:
        check_file(config.eval.scores)
    return lists


def evaluate_network(
    model: torch.nn.Module,
    config: Config,
    *,
    out_dir: str | Path,
    step: int = 0,
    trials: Lists | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict:
    """Evaluates on config.eval.trials and dev_trials where the network is; called on all ranks; writes out_dir on rank 0.

    trials: what `check(config)` gave on rank 0, to save checking again. stop: asked between batches on every rank; where it
    says yes, Stopped is raised on all. Returns on rank 0 {"eer" (percent), "min_dcf_p01", "min_dcf_p05", ...} of the first
    test list (of the development list where there is no other), the same of the development list as "dev_eer", ..., and of
    every list under "lists"; {} on other ranks.
    """
    rate, asked = model.sample_rate, Asked(metrics=config.eval.metrics, breakdown=False)
    how = replace(how_of(config, rate), stop=stop)
    report = evaluate(model, lambda: trials or check(config, sample_rate=rate), system_of(config), how, asked)

    def finish() -> dict:
        report.facts = {"step": step} | report.facts
        report.write(out_dir, pictures=False)
        keep_scores(config, Path(out_dir))
        return report.numbers()

    return on_first("reporting", finish, share=False) or {}


def keep_scores(config: Config, out_dir: Path) -> None:
    """Writes the first list's scores to the file that eval.scores names, too."""
    if config.eval.scores:
        write_file(config.eval.scores, (out_dir / "scores.txt").read_bytes())


def how_of(config: Config, sample_rate: int) -> Embedding:
    """What of each utterance is embedded, as config.eval says. Raises ConfigError for crops that cannot be."""
    crops = Crops.of_seconds(config.eval.crop_seconds, config.eval.crops, sample_rate, config.eval.padding)
    return Embedding(crops, config.eval.batch_seconds)


def system_of(config: Config) -> System:
    """The plain scoring that config.eval asks for."""
    said, score = config.eval.normalize_embeddings, config.eval.score
    # voxceleb_trainer does not length-normalise the embeddings of a network trained with proto.
    auto = not (score == "mean_distance" and config.loss.name == "proto")
    return System(score, normalize={"auto": auto, "always": True, "never": False}[said])


def untrained(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The same network with its initial weights."""
    device = next(model.parameters()).device
    other = copy.deepcopy(model).cpu()  # a GPU's generator draws other numbers
    rng.initialize(other, seed)
    return other.to(device)
