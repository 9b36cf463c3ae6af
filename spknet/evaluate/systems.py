"""Every way of scoring a list from the same embeddings, each building on the one before.

    cosine | mean_distance  ->  mean-subtracted  ->  AS-norm  ->  calibrated

The cohort is one mean vector for each training speaker; calibration is learned on the development list.

    backend = Backend(as_norm=300); systems = backend.systems(trials, rows, Embedded(embeddings, samples))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spknet.config import Config, DataConfig
from spknet.data.corpus import dev_speakers
from spknet.evaluate import scoring
from spknet.evaluate.calibration import Calibration, features, fit
from spknet.evaluate.scoring import ScoringError
from spknet.evaluate.trials import TrialError, Trials, open_text
from spknet.evaluate.utterances import SAMPLE_RATE, Places, Sources, as_list


@dataclass(frozen=True)
class Embedded:
    """Embeddings (utterances, crops, D) and what else is known of the utterances: name -> row, length in samples."""

    embeddings: np.ndarray
    rows: dict[str, int]
    samples: np.ndarray
    sample_rate: int = SAMPLE_RATE  # Hz

    def sides(self, trials: Trials, values: np.ndarray, together=np.mean) -> tuple[np.ndarray, np.ndarray]:
        """A quantity of utterances for the left and the right of each trial; together: what makes a model's of several."""
        models = [together(values[[self.rows[u] for u in trials.utterances_of(m)]]) for m in trials.models]
        tests = [values[self.rows[t]] for t in trials.tests]
        return np.array(models)[trials.left], np.array(tests)[trials.right]

    def magnitudes(self) -> np.ndarray:
        """Mean length of each utterance's embeddings before normalisation."""
        return np.linalg.norm(self.embeddings, axis=-1).mean(axis=1)


@dataclass
class Backend:
    """How lists are scored. cohort: (speakers, D) mean vectors, for subtract_mean and as_norm (the K of its top K)."""

    score: str = "cosine"
    normalize: bool = True  # mean_distance: length-normalise; voxceleb_trainer does not where it trained with proto
    subtract_mean: bool = False
    as_norm: int = 0
    qualities: tuple[str, ...] = ()
    cohort: np.ndarray | None = None
    calibration: Calibration | None = None

    def check(self) -> None:
        """Raises ScoringError for a combination that cannot be."""
        if self.score != "cosine" and (self.subtract_mean or self.as_norm):
            raise ScoringError("mean subtraction and AS-norm work on cosine scores; give --score cosine")

    def systems(self, trials: Trials, embedded: Embedded) -> dict[str, np.ndarray]:
        """{system: (n,) scores} of one list, the last being the one that counts. Raises TrialError for a score that is NaN."""
        right = np.array([embedded.rows[name] for name in trials.tests])[trials.right]
        found = {}
        if self.score == "mean_distance":
            found[self.score] = self._distances(trials, embedded, right)
        else:
            rows = scoring.vectors(embedded.embeddings)
            left = scoring.enrol(trials, embedded.rows, rows)
            units = scoring.unit(left), scoring.unit(rows)
            found["cosine"] = scoring.cosine(*units, trials.left, right)
            if self.subtract_mean:
                mean = self.cohort.mean(axis=0)
                units = scoring.unit(left - mean), scoring.unit(rows - mean)
                found["mean-subtracted"] = scoring.cosine(*units, trials.left, right)
            if self.as_norm:
                base = list(found.values())[-1]
                found["AS-norm"] = self._as_norm(base, units, trials.left, right)
        for scores in found.values():
            scoring.check_finite(scores, trials)
        if self.calibration is not None:
            found["calibrated"] = self.calibration(self._features(list(found.values())[-1], trials, embedded))
        return found

    def calibrate(self, trials: Trials, embedded: Embedded) -> None:
        """Learns the calibration from a labelled development list."""
        scores = list(self.systems(trials, embedded).values())[-1]
        self.calibration = fit(self._features(scores, trials, embedded), trials.labels)

    def _distances(self, trials: Trials, embedded: Embedded, right: np.ndarray) -> np.ndarray:
        # All crops of a model's utterances against the test's: the mean over its utterances, each a pair of its own.
        models = [[embedded.rows[u] for u in trials.utterances_of(m)] for m in trials.models]
        sizes = np.array([len(own) for own in models])
        firsts, size = (np.cumsum(sizes) - sizes)[trials.left], sizes[trials.left]
        starts = np.cumsum(size) - size
        left = np.concatenate(models)[np.arange(size.sum()) + np.repeat(firsts - starts, size)]
        crops = embedded.embeddings
        pairs = scoring.mean_distance(crops, crops, left, np.repeat(right, size), self.normalize)
        return (np.add.reduceat(pairs, starts) / size).astype(pairs.dtype)

    def _as_norm(self, scores, units, left, right) -> np.ndarray:
        cohort = self.cohort - self.cohort.mean(axis=0) if self.subtract_mean else self.cohort
        cohort = scoring.unit(cohort)
        used, right = np.unique(right, return_inverse=True)
        statistics = [scoring.cohort_statistics(rows, cohort, self.as_norm) for rows in (units[0], units[1][used])]
        return scoring.as_norm(scores, *statistics, left, right)

    def _features(self, scores: np.ndarray, trials: Trials, embedded: Embedded) -> np.ndarray:
        # A model has all its utterances' speech, but the mean of their magnitudes.
        known = {
            "duration": (embedded.samples / embedded.sample_rate, np.sum),
            "magnitude": (embedded.magnitudes(), np.mean),
        }
        sides = [tuple(map(np.log, embedded.sides(trials, *known[quality]))) for quality in self.qualities]
        return features(scores, sides)


def trained_speakers(config: Config, meta: dict) -> list[str] | None:
    """The speakers that a network of spknet.checkpoints.network.load_network was trained on; None where its file does not say."""
    if "speakers" not in meta:
        return None
    kept_out = dev_speakers(meta["speakers"], config.data.dev_speakers)
    return [name for name, out in zip(meta["speakers"], kept_out) if not out]


def cohort_places(
    data: DataConfig, each: int, speakers: list[str] | None, sample_rate: int = SAMPLE_RATE
) -> tuple[Places, np.ndarray]:
    """At most `each` utterances of every cohort speaker, spread over what there is, and the speaker number of each (n,).

    data: train_shards, or train_list with train_root. speakers: those the network was trained on; None for all.
    sample_rate: the network's, Hz.
    """
    sources = Sources(data.train_shards, data.train_root, sample_rate)
    if data.train_shards:
        return _packed_cohort(sources, data, each, speakers)
    if not data.train_list:
        raise ScoringError(
            "mean subtraction and AS-norm need a cohort, and the run names no training data: give --cohort LIST"
            " --cohort_root FOLDER, or --cohort_shards FOLDER"
        )
    of_speaker: dict[str, list[str]] = {}
    for number, line in open_text(data.train_list):
        words = line.split()
        if len(words) != 2:
            raise TrialError(f"{data.train_list}, line {number}: {len(words)} columns; expected `speaker path`")
        of_speaker.setdefault(words[0], []).append(words[1])
    kept = sorted(of_speaker if speakers is None else set(of_speaker) & set(speakers))
    names = [(speaker, of_speaker[speaker][i]) for speaker in kept for i in spread(len(of_speaker[speaker]), each)]
    places = sources.locate([name for _, name in names])
    if places.missing():
        raise TrialError(f"{data.train_list}: {places.missing()[0]} not found in {data.train_root}")
    if not names:
        raise ScoringError(f"{data.train_list}: none of its speakers is one that the network was trained on")
    return sources.measure(places), np.unique([speaker for speaker, _ in names], return_inverse=True)[1]


def _packed_cohort(sources: Sources, data: DataConfig, each: int, speakers: list[str] | None):
    known = None if speakers is None else set(speakers)
    names, where, samples, of = [], [], [], []
    for number, (folder, packed) in enumerate(zip(as_list(data.train_shards), sources.sets)):
        for s, speaker in enumerate(packed.speakers):
            # A run on several data sets calls its speakers SET/SPEAKER.
            if known is not None and known.isdisjoint((speaker, f"{Path(folder).name}/{speaker}")):
                continue
            first, last = int(packed.speaker_rows[s]), int(packed.speaker_rows[s + 1])
            for row in (first + i for i in spread(last - first, each)):
                names.append(packed.key(row))
                where.append((number, row))
                samples.append(int(packed.samples[row]))
                of.append((number, s))
    if not names:
        raise ScoringError(f"{data.train_shards}: none of its speakers is one that the network was trained on")
    return Places(names, where, np.array(samples)), np.unique(of, axis=0, return_inverse=True)[1].reshape(-1)


def spread(there: int, wanted: int) -> list[int]:
    """At most `wanted` of `there` positions, evenly over them."""
    return [int(i) for i in np.linspace(0, there - 1, min(wanted, there)).round()]


def speaker_means(embeddings: np.ndarray, speakers: np.ndarray) -> np.ndarray:
    """(utterances, crops, D) and the speaker number of each -> (speakers, D), means of the utterances' vectors."""
    rows = scoring.vectors(embeddings)
    sums = np.zeros((speakers.max() + 1, rows.shape[1]), rows.dtype)
    np.add.at(sums, speakers, rows)
    return sums / np.bincount(speakers)[:, None].astype(rows.dtype)
