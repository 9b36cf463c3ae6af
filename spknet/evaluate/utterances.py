"""Where the utterances of lists lie, and what of each is embedded: packed data sets and folders of audio files, in this order.

A name is looked for in each packed data set under its key (the name, or what packing makes of it: without its ending), then under each
root: as it stands, then with another ending of ENDINGS. The first that has it wins. An absolute path needs no root; where
roots are given, nothing outside them is read. Other formats, more channels and higher rates are converted, and counted.

    places = Sources(roots=["vox1/test/wav"]).locate(names)  # where each lies and how long it is
    samples = sources.read(places, 7)  # (samples,) int16
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from shards.archive import read_source
from shards.audio import decode, read_audio
from shards.format import ShardError
from shards.headers import read_header
from shards.lists import key_of_name
from shards.reader import open_shards
from spknet.config import ConfigError

SAMPLE_RATE = 16000  # Hz, where no network says otherwise
ENDINGS = (".wav", ".flac", ".m4a", ".mp3", ".ogg", ".opus")
PROBES = 8  # headers read at a time: hides the latency of a network file system
SHORTEST_SECONDS = 0.5  # shorter utterances are repeated to this length: networks need a few dozen frames


@dataclass(frozen=True)
class Crops:
    """What of an utterance is embedded: `count` crops of `samples` PCM samples, or with samples 0 all of it, once.

    As in voxceleb_trainer starts are spread evenly, `linspace(0, length - crop, crops)` truncated; an utterance no longer
    than the crop is first repeated until it is one sample longer (`zeros`: padded on both sides, as in 2020).
    """

    samples: int = 0
    count: int = 1
    padding: str = "repeat"  # of short utterances: repeat, or zeros
    shortest: int = 8000  # samples that whole utterances are repeated to

    def __post_init__(self):
        if self.count < 1 or self.samples < 0 or (self.samples == 0 and self.count != 1):
            raise ConfigError(
                f"{self.count} crops of {self.samples} samples: several crops want eval.crop_seconds above 0"
            )

    @classmethod
    def of_seconds(cls, seconds: float, count: int, sample_rate: int, padding: str = "repeat") -> Crops:
        return cls(round(seconds * sample_rate), count, padding, shortest=round(SHORTEST_SECONDS * sample_rate))

    def cut(self, audio: np.ndarray) -> np.ndarray:
        """(samples,) int16 -> (count, crop) int16."""
        if self.samples == 0:
            return np.resize(audio, max(len(audio), self.shortest))[None]
        if len(audio) <= self.samples:
            if self.padding == "zeros":
                side = (self.samples - len(audio) + 1) // 2
                audio = np.pad(audio, (side, side))
            else:
                audio = np.resize(audio, self.samples + 1)
        starts = np.linspace(0, len(audio) - self.samples, self.count).astype(np.int64)
        return np.stack([audio[start : start + self.samples] for start in starts])

    def length(self, samples: np.ndarray) -> np.ndarray:
        """Length of the crops of utterances that are `samples` long."""
        return np.full_like(samples, self.samples) if self.samples else np.maximum(samples, self.shortest)


@dataclass(frozen=True)
class Places:
    """Where utterances lie: (data set, row) or a path for each; plain values, so that ranks can pass them on."""

    names: list[str]
    where: list[tuple[int, int] | str | None]  # None: nowhere
    samples: np.ndarray  # (n,) int64, PCM samples; 0 where not looked at
    notes: str = ""  # what was converted to mono, 16 bits and the rate, is silent, clipped or cancelled, in words

    def missing(self) -> list[str]:
        return [name for name, place in zip(self.names, self.where) if place is None]


def as_list(value: str | list[str] | None) -> list[str]:
    """An option that may be one path, several or none, as a list."""
    return [] if value is None else [str(value)] if isinstance(value, (str, os.PathLike)) else list(map(str, value))


class Sources:
    """The data sets and folders of an evaluation."""

    def __init__(
        self,
        shards: str | list[str] | None = None,
        roots: str | list[str] | None = None,
        sample_rate: int = SAMPLE_RATE,
    ):
        self.folders, self.roots, self.sample_rate = as_list(shards), as_list(roots), sample_rate
        self.sets = []
        for folder in self.folders:
            self.sets.append(open_shards(folder))
            if self.sets[-1].sample_rate != sample_rate:
                raise ShardError(
                    f"{folder}: {self.sets[-1].sample_rate} Hz, expected {sample_rate} Hz; pack it at that rate"
                )

    def describe(self, name: str = "") -> str:
        """The places that were searched (for a name), for an error message."""
        if self.roots and not any(self._below(root, name) for root in self.roots):
            return f"{', '.join(self.roots)}, outside of which nothing is read; give --root / to allow that"
        where = ", ".join(self.folders + self.roots)
        return where or (
            "the file system" if os.path.isabs(name) else "any folder, as none was given; give --root or --shards"
        )

    @staticmethod
    def _below(root: str, name: str) -> bool:
        root = os.path.abspath(root)
        return os.path.commonpath([root, os.path.normpath(os.path.join(root, name))]) == root

    def locate(self, names: list[str]) -> Places:
        """Finds utterances; a name that is nowhere gets None. Lengths of files are not looked at yet."""
        where: list = [None] * len(names)
        samples = np.zeros(len(names), dtype=np.int64)
        for number, data in enumerate(self.sets):
            for form in (str, stem, key_of_name):
                wanted = [i for i, place in enumerate(where) if place is None]
                rows = data.find([form(names[i]) for i in wanted]) if wanted else []
                for i, row in zip(wanted, rows):
                    if row >= 0:
                        where[i], samples[i] = (number, int(row)), int(data.samples[row])
        for i in (i for i, place in enumerate(where) if place is None):
            where[i] = self._file(names[i])
        return Places(names, where, samples)

    def _file(self, name: str) -> str | None:
        roots = self.roots or ([""] if os.path.isabs(name) else [])
        inside = [root for root in roots if not root or self._below(root, name)]
        paths = (os.path.join(root, form) for root in inside for form in _forms(name))
        return next(filter(os.path.isfile, paths), None)

    def measure(self, places: Places) -> Places:
        """The places with the lengths of the files, from their headers. Raises ShardError naming a file that is no audio."""
        samples = places.samples.copy()
        files = [i for i, place in enumerate(places.where) if isinstance(place, str)]
        with ThreadPoolExecutor(PROBES) as pool:
            measured = list(pool.map(lambda i: self._length(places.where[i]), files))
        samples[files] = [length for length, _ in measured]
        first: dict[str, list] = {}  # what was noted, how often, and the first file's name
        for i, (_, notes) in zip(files, measured):
            for note in notes:
                first.setdefault(note, [0, places.names[i]])[0] += 1
        said = [f"{count} files {note} (first: {name})" for note, (count, name) in sorted(first.items())]
        return Places(places.names, places.where, samples, "; ".join(said))

    def _length(self, path: str) -> tuple[int, list[str]]:
        """(samples, what is to be told) of a file from its header; where that does not tell, by decoding it."""
        header = read_header(path)
        if header.samples and (header.rate, header.channels, header.bits) == (self.sample_rate, 1, 16):
            return header.samples, []
        pcm, notes = decode(read_source(path), path, self.sample_rate, convert=True)
        rate = header.rate or int((re.search(r"(\d+) Hz to", notes.get("converted", "")) or [0, self.sample_rate])[1])
        if rate < self.sample_rate:
            raise ShardError(
                f"{path}: {rate} Hz, expected {self.sample_rate} Hz or more; made of fewer samples, its scores would not be"
                " comparable"
            )
        return len(pcm) // 2, [f"converted: {said}" if kind == "converted" else kind for kind, said in notes.items()]

    def read(self, places: Places, index: int) -> np.ndarray:
        """(samples,) int16 of one utterance. Raises ShardError where it is damaged or no longer as long as it was."""
        place = places.where[index]
        loose = isinstance(place, str)
        audio = (
            read_audio(place, self.sample_rate, convert=True) if loose else self.sets[place[0]].read_utterance(place[1])
        )
        if len(audio) != places.samples[index]:
            raise ShardError(
                f"{places.names[index]}: {len(audio)} samples read, {places.samples[index]} when the lists were checked;"
                " the file changed or its header is wrong"
            )
        return audio


def stem(name: str) -> str:
    """A name without its ending."""
    return str(PurePosixPath(name).with_suffix("")) if PurePosixPath(name).suffix else name


def _forms(name: str) -> list[str]:
    """The file names to look for under a root."""
    return list(dict.fromkeys([name, *(stem(name) + ending for ending in ENDINGS)]))
