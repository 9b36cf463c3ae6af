"""Before anything is embedded: lists read, utterances found, mistakes named. Done once, on rank 0 alone.

lists = open_lists("veri_test.txt", root="voxceleb1/test/wav"); lists.places.samples
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spknet.config import Config
from spknet.data.corpus import dev_speakers
from spknet.evaluate.cohort import spread
from spknet.evaluate.scoring import ScoringError
from spknet.evaluate.trials import TrialError, Trials, read_enrolment, read_trials, read_utterances
from spknet.evaluate.utterances import SAMPLE_RATE, Places, Sources, as_list


@dataclass(frozen=True)
class Lists:
    """Trial lists that have been checked, and where their utterances lie. The first list is the headline; dev is never it
    where there is a test list."""

    lists: list[Trials]
    roles: list[str]  # test or dev, one a list
    sources: Sources | None = None  # None: embeddings are there already
    places: Places | None = None  # every utterance of every list once, sorted by name

    @property
    def rows(self) -> dict[str, int]:
        """Row of each utterance in the embeddings."""
        return {name: i for i, name in enumerate(self.places.names)}

    @property
    def dev(self) -> Trials | None:
        """The first development list with labels: calibration and thresholds are learned on it."""
        return next((t for t, role in zip(self.lists, self.roles) if role == "dev" and t.labels is not None), None)


def read_lists(trials, dev_trials=None, enrolment: str | None = None) -> Lists:
    """The test lists, then the development list, without their audio. Raises TrialError."""
    tests, dev = as_list(trials), as_list(dev_trials)
    models = read_enrolment(enrolment) if enrolment else None
    lists = [read_trials(path, models) for path in tests + dev]
    names = [trials.name for trials in lists]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise TrialError(f"two lists are called {twice!r}; reports tell lists apart by file name: rename one")
    return Lists(lists, ["test"] * len(tests) + ["dev"] * len(dev))


def open_lists(
    trials, dev_trials=None, *, root=None, shards=None, enrolment: str | None = None, sample_rate: int = SAMPLE_RATE
) -> Lists:
    """Reads all lists, finds all their utterances and their lengths. trials, root, shards: one path or several.

    enrolment: a list of models of several utterances. sample_rate: the network's, Hz, and so the audio's. Talks to no other rank. Raises TrialError (list, line, what is
    wrong) or ShardError (audio that cannot be read).
    """
    lists = read_lists(trials, dev_trials, enrolment)
    sources = Sources(shards, root, sample_rate)
    places = sources.locate(utterances(lists))
    require(lists, set(places.missing()), sources.describe)
    return Lists(lists.lists, lists.roles, sources, sources.measure(places))


def utterances(lists: Lists) -> list[str]:
    """Every distinct utterance of all lists, sorted."""
    return sorted(set().union(*(trials.utterances() for trials in lists.lists)))


def require(lists: Lists, missing: set[str], searched: Callable[[str], str]) -> None:
    """Raises TrialError naming the first line whose utterance is missing. searched: where it was looked for, in words."""
    for trials in lists.lists if missing else ():
        absent = [name for name in trials.utterances() if name in missing]
        if absent:
            line, first = trials.first_line_of(set(absent))
            raise TrialError(
                f"{trials.path}, line {line}: {first} not found in {searched(first)} ({len(absent)} utterances of this list"
                " are missing)"
            )


@dataclass(frozen=True)
class Cohort:
    """Where a cohort's utterances come from: packed data sets, or a list `speaker path` with the folder of its paths."""

    shards: str | list[str] | None = None
    list_path: str | None = None
    root: str | None = None
    speakers: tuple[str, ...] | None = None  # those that may be used; None: all
    utterances: int = 10  # of a speaker at most, spread over what there is

    @classmethod
    def of_run(cls, config: Config, meta: dict, utterances: int = 10) -> Cohort:
        """The training data of a network of spknet.checkpoints.network.load_network, without the speakers it kept out."""
        speakers, data = trained_speakers(config, meta), config.data
        known = None if speakers is None else tuple(speakers)
        return cls(data.train_shards, data.train_list, data.train_root, known, utterances)

    def places(self, sample_rate: int) -> tuple[Places, np.ndarray]:
        """The utterances, and the speaker number of each (n,). sample_rate: the network's, Hz. Raises ScoringError, TrialError or ShardError."""
        sources = Sources(self.shards, self.root, sample_rate)
        if self.shards:
            return self._packed(sources)
        if not self.list_path:
            raise ScoringError(
                "mean subtraction and AS-norm need a cohort, and the run names no training data: give --cohort LIST"
                " --cohort_root FOLDER, or --cohort_shards FOLDER"
            )
        of_speaker = read_utterances(self.list_path)
        kept = sorted(of_speaker if self.speakers is None else set(of_speaker) & set(self.speakers))
        names = [(s, of_speaker[s][i]) for s in kept for i in spread(len(of_speaker[s]), self.utterances)]
        places = sources.locate([name for _, name in names])
        if places.missing():
            first = places.missing()[0]
            raise TrialError(f"{self.list_path}: {first} not found in {sources.describe(first)}")
        if not names:
            raise ScoringError(f"{self.list_path}: none of its speakers is one that the network was trained on")
        return sources.measure(places), np.unique([speaker for speaker, _ in names], return_inverse=True)[1]

    def _packed(self, sources: Sources) -> tuple[Places, np.ndarray]:
        known = None if self.speakers is None else set(self.speakers)
        names, where, samples, of = [], [], [], []
        for number, (folder, packed) in enumerate(zip(as_list(self.shards), sources.sets)):
            bounds = packed.speaker_rows.tolist()
            for s, (speaker, first, last) in enumerate(zip(packed.speakers, bounds, bounds[1:])):
                # A run on several data sets calls its speakers SET/SPEAKER.
                if known is not None and known.isdisjoint((speaker, f"{Path(folder).name}/{speaker}")):
                    continue
                rows = [first + i for i in spread(last - first, self.utterances)]
                names += [packed.key(row) for row in rows]
                where += [(number, row) for row in rows]
                samples += [int(packed.samples[row]) for row in rows]
                of += [(number, s)] * len(rows)
        if not names:
            raise ScoringError(f"{self.shards}: none of its speakers is one that the network was trained on")
        return Places(names, where, np.array(samples)), np.unique(of, axis=0, return_inverse=True)[1].reshape(-1)


def trained_speakers(config: Config, meta: dict) -> list[str] | None:
    """The speakers that a network of spknet.checkpoints.network.load_network was trained on; None where its file does not say.

    Those kept out are the names in the checkpoint. Older ones lack them: there a number of speakers is drawn again, and a
    file is read again, which may have changed.
    """
    if "speakers" not in meta:
        return None
    if meta.get("dev_speakers") is not None:
        kept_out = set(meta["dev_speakers"])
        return [name for name in meta["speakers"] if name not in kept_out]
    kept_out = dev_speakers(meta["speakers"], config.data.dev_speakers)
    return [name for name, out in zip(meta["speakers"], kept_out) if not out]
