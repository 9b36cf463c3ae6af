"""Before anything is embedded: lists read, utterances found, mistakes named; then the utterances embedded on all ranks.

prepared = check(config); embedded = embed_lists(model, config, prepared, device)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from spknet.config import Config
from spknet.evaluate.embed import SHORTEST_SECONDS, Crops, embed
from spknet.evaluate.systems import Embedded
from spknet.evaluate.trials import TrialError, Trials, read_enrolment, read_trials
from spknet.evaluate.utterances import SAMPLE_RATE, Places, Sources, as_list
from spknet.parallel.gather import rank, world_size
from spknet.parallel.ranks import RankError


@dataclass(frozen=True)
class Prepared:
    """Lists that have been checked, and where their utterances lie. The first list is the headline; dev is never it
    where there is a test list."""

    lists: list[Trials]
    roles: list[str]  # test or dev, one a list
    sources: Sources
    places: Places  # every utterance of every list once, sorted by name

    @property
    def rows(self) -> dict[str, int]:
        """Row of each utterance in the embeddings."""
        return {name: i for i, name in enumerate(self.places.names)}


def check(config: Config, enrolment: str | None = None, sample_rate: int = SAMPLE_RATE) -> Prepared | None:
    """Reads all lists, finds all their utterances and their lengths; None where the config names no list.

    enrolment: a list of models of several utterances. sample_rate: the network's, Hz, and so the audio's. Talks to no other rank. Raises TrialError (list, line, what is
    wrong), ShardError (audio that cannot be read) or ConfigError (crops that cannot be).
    """
    crops_of(config, sample_rate)
    lists, roles = read_lists(config, enrolment)
    if not lists:
        return None
    sources = Sources(config.eval.shards, config.eval.root, sample_rate)
    places = sources.locate(utterances(lists))
    require(lists, set(places.missing()), sources.describe(config.eval.shards))
    return Prepared(lists, roles, sources, sources.measure(places))


def read_lists(config: Config, enrolment: str | None = None) -> tuple[list[Trials], list[str]]:
    """The test lists, then the development list, and the role of each."""
    tests, dev = as_list(config.eval.trials), as_list(config.eval.dev_trials)
    models = read_enrolment(enrolment) if enrolment else None
    lists = [read_trials(path, models) for path in tests + dev]
    names = [trials.name for trials in lists]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise TrialError(f"two lists are called {twice!r}; reports tell lists apart by file name: rename one")
    return lists, ["test"] * len(tests) + ["dev"] * len(dev)


def utterances(lists: list[Trials]) -> list[str]:
    """Every distinct utterance of several lists, sorted."""
    return sorted(set().union(*(trials.utterances() for trials in lists)))


def require(lists: list[Trials], missing: set[str], searched: str) -> None:
    """Raises TrialError naming the first line whose utterance is missing."""
    for trials in lists if missing else ():
        absent = [name for name in trials.utterances() if name in missing]
        if absent:
            line, first = trials.first_line_of(set(absent))
            raise TrialError(
                f"{trials.path}, line {line}: {first} not found in {searched} ({len(absent)} utterances of this list are missing)"
            )


def crops_of(config: Config, sample_rate: int) -> Crops:
    """What of each utterance is embedded, as config.eval says."""
    samples = round(config.eval.crop_seconds * sample_rate)
    return Crops(samples, config.eval.crops, config.eval.padding, shortest=round(SHORTEST_SECONDS * sample_rate))


def embed_lists(
    model: torch.nn.Module, config: Config, prepared: Prepared | None, device, bf16=False, what="utterances"
):
    """Embedded utterances of rank 0's lists, on rank 0 (None elsewhere). Called on all ranks."""
    places = on_first(lambda: prepared.places)
    rate = model.sample_rate
    sources = prepared.sources if prepared else Sources(config.eval.shards, config.eval.root, rate)
    found = embed(
        model,
        sources,
        places,
        crops_of(config, rate),
        device=device,
        batch_seconds=config.eval.batch_seconds,
        bf16=bf16,
        what=what,
    )
    return None if found is None else Embedded(found, prepared.rows, places.samples, rate)


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
            error = None if message is None else RankError(message)
    if error is not None:
        raise error
    return result
