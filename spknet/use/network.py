"""The front door: a trained network as an object that takes any audio.

    network = spknet.load("runs/a")
    vectors = network.embed(["a.wav", "b.m4a"])           # (2, D) float32, unit length
    verdict = network.verify("a.wav", "b.wav")
    report = network.evaluate("veri_test.txt", root="voxceleb1/wav")

A recording is embedded alone, whatever stands beside it in a list: networks see no padding, and recordings hardly ever have
equal lengths. Lists are fast because the processor's cores each embed another recording, one thread each; that also makes
an embedding's bits independent of the list. The embeddings are those of `spknet evaluate` and `spknet embed` with whole
utterances; recordings of over a minute are cut into windows (spknet.use.audio) and their unit embeddings averaged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spknet.checkpoints import card as cards
from spknet.checkpoints.card import Card
from spknet.checkpoints.network import load_network
from spknet.config import Config
from spknet.errors import UserError
from spknet.evaluate import evaluation
from spknet.evaluate.evaluation import how_of, system_of
from spknet.evaluate.lists import open_lists
from spknet.evaluate.report import Report
from spknet.evaluate.scoring import unit
from spknet.evaluate.systems import System
from spknet.evaluate.utterances import Crops
from spknet.use import verdict
from spknet.use.audio import Heard, narrow, open_audio, pieces
from spknet.use.verdict import Verdict

GPU_WORKERS = 8  # threads that decode and embed beside each other on a GPU, each with a recording's maps in its memory
Audio = Any  # str, os.PathLike, numpy array or torch tensor


def load(path: str | os.PathLike, device: str = "auto", weights: str | None = None) -> Network:
    """The network of a run folder (its best checkpoint, else its newest) or of a file, with its card where it has one.

    device: auto (a GPU where there is one), cpu, cuda, cuda:1, ... weights: averaged or trained; None: as the run evaluates.
    Raises UserError naming what is wrong with the file.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"device {device!r} is none; expected auto, cpu, cuda, or cuda:1 for the second GPU")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device}: torch sees no GPU here; give cpu, or see `spknet doctor`")
    model, config, meta = load_network(path, device, weights=weights)
    card, problem = _card(Path(path), model, meta)
    return Network(model, config, meta, card, problem)


def _card(path: Path, model: torch.nn.Module, meta: dict) -> tuple[Card | None, str]:
    """The card inside the file or beside it, and why there is none."""
    card = cards.from_dict(meta["card"], str(path)) if meta.get("card") else cards.find(path)
    if card is None:
        return None, f"this network was never calibrated: it has no card; make one with `spknet card {path}`"
    if card.weights_sha256 != cards.weights_digest(model.state_dict()):
        step = card.provenance.get("step")
        return None, f"its card is that of other weights (step {step}); make it anew with `spknet card {path}`"
    return card, ""


class Network:
    """A trained network. Made by `load`.

    model: the torch module, waves (batch, samples) in [-1, 1] -> (batch, D). config: options that it was trained with. meta:
    path, step, speakers, ..., as far as known. card: what its scores mean, or None. sample_rate: Hz. dimensions: D.
    """

    def __init__(self, model: torch.nn.Module, config: Config, meta: dict, card: Card | None, uncalibrated: str = ""):
        self.model, self.config, self.meta, self.card = model, config, meta, card
        self.uncalibrated = uncalibrated  # why there is no card
        self.sample_rate: int = model.sample_rate
        self.dimensions: int = config.model.embedding_size
        first = next(model.parameters())
        self.device, self._dtype = first.device, first.dtype
        self._crops = Crops.of_seconds(0, 1, self.sample_rate)

    def __repr__(self) -> str:
        calibrated = "calibrated" if self.card else "no card"
        return (
            f"Network({self.config.model.name}, {self.dimensions} dimensions, {self.sample_rate} Hz, {self.meta['path']},"
            f" {calibrated})"
        )

    def embed(self, audio: Audio | list[Audio], rate: int | None = None) -> np.ndarray:
        """(N, D) float32 of unit length: a row for each recording, one row for a single one.

        audio: paths, arrays or tensors, any rate and number of channels, one or a list; an array is (samples,) or (samples,
        channels), floats in [-1, 1] or integers. rate: Hz of arrays. Raises UserError naming a recording that cannot be read.
        """
        rows = [vector for vector, _ in self.hear(audio, rate)]
        return np.stack(rows) if rows else np.empty((0, self.dimensions), np.float32)

    def hear(self, audio: Audio | list[Audio], rate: int | None = None) -> Iterator[tuple[np.ndarray, Heard]]:
        """`embed`, one after the other: (D,) float32, and what is known of the recording, in the order given."""
        listed = list(audio) if _is_list(audio) else [audio]
        jobs = [(source, rate, number) for number, source in enumerate(listed)]
        if len(jobs) < 2:
            yield from (self._hear(*job) for job in jobs)
            return
        threads = torch.get_num_threads()
        # A worker's number of threads is its own, but torch remembers the last one that was set for threads to come.
        alone = None if self.device.type != "cpu" else lambda: torch.set_num_threads(1)
        workers = threads if alone else min(GPU_WORKERS, len(os.sched_getaffinity(0)))
        try:
            with ThreadPoolExecutor(min(workers, len(jobs)), initializer=alone) as pool:
                yield from pool.map(lambda job: self._hear(*job), jobs)
        finally:
            torch.set_num_threads(threads)

    def verify(
        self,
        left: Audio | list[Audio],
        right: Audio | list[Audio],
        rate: int | None = None,
        threshold: float | None = None,
    ) -> Verdict:
        """Whether two recordings are of one speaker. A side may be a list: several recordings of one voice.

        rate: Hz of arrays. threshold: of the cosine, instead of the card's. Raises UserError as `embed` does.
        """
        sides = [list(self.hear(side, rate)) for side in (left, right)]
        if not all(sides):
            raise UserError("an empty list given to verify; expected at least one recording a side")
        vectors = [mean_voice([vector for vector, _ in side]) for side in sides]
        heard = [[found for _, found in side] for side in sides]
        doubts = verdict.doubts(*heard, self.sample_rate) + ([] if self.card else [self.uncalibrated])
        return verdict.judge(cosine(*vectors), self.card, threshold, doubts)

    def evaluate(
        self,
        trials: str | list[str],
        root: str | list[str] | None = None,
        system: System | None = None,
        dev_trials: str | None = None,
        shards: str | list[str] | None = None,
    ) -> Report:
        """The report of trial lists, as `spknet evaluate` makes it: report.numbers()["eer"], report.write("out").

        root: folders that the paths in the lists start from; shards: packed data sets. system: of scoring; None: as the run
        evaluates. Raises UserError naming list and line.
        """
        lists = open_lists(trials, dev_trials, root=root, shards=shards, sample_rate=self.sample_rate)
        how = how_of(self.config, self.sample_rate)
        return evaluation.evaluate(self.model, lists, system or system_of(self.config), how)

    def _hear(self, source: Audio, rate: int | None, number: int) -> tuple[np.ndarray, Heard]:
        recording, vectors, band = open_audio(source, rate, self.sample_rate, number), [], None
        for piece in pieces(recording):
            band = narrow(piece, self.sample_rate) if not vectors else band
            vectors.append(self._embed_piece(piece))
        notes = recording.notes | ({"narrow": band} if band else {})
        heard = Heard(recording.name, recording.rate, recording.samples / self.sample_rate, notes)
        vector = mean_voice(vectors)
        if not np.isfinite(vector).all():
            raise UserError(f"{recording.name}: its embedding is not finite; did training diverge, or is it silent?")
        return vector, heard

    @torch.inference_mode()
    def _embed_piece(self, piece: np.ndarray) -> np.ndarray:
        """(n,) int16 -> (D,), in the network's precision."""
        wave = torch.from_numpy(self._crops.cut(piece)).to(self.device).to(self._dtype) / 32768
        return self.model(wave)[0].cpu().numpy()


def _is_list(audio: Any) -> bool:
    return isinstance(audio, (list, tuple)) or (hasattr(audio, "__next__") and not isinstance(audio, np.ndarray))


def mean_voice(vectors: list[np.ndarray]) -> np.ndarray:
    """(D,) float32 of unit length: the mean of vectors that are given length 1 first."""
    return unit(unit(np.stack(vectors), 1).mean(axis=0)[None], 1)[0].astype(np.float32)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    """Inner product of unit vectors (D,), in float64."""
    return float(np.dot(left.astype(np.float64), right.astype(np.float64)))
