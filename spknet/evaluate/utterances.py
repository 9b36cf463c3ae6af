"""Where the utterances of trial lists lie: packed data sets and folders of audio files, asked in this order.

A name is looked for in each packed data set under its key (the name, or the name without its ending), then under each
root: as it stands, then with `.wav` or `.flac` for its ending. The first that has it wins.

    places = Sources(roots=["vox1/test/wav"]).locate(names)  # where each lies and how long it is
    samples = sources.read(places, 7)  # (samples,) int16
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from shards.audio import read_audio
from shards.format import ShardError
from shards.headers import read_header
from shards.lists import key_of_name

SAMPLE_RATE = 16000  # Hz, where no network says otherwise
ENDINGS = (".wav", ".flac")
PROBES = 8  # headers read at a time: hides the latency of a network file system


@dataclass(frozen=True)
class Places:
    """Where utterances lie: (data set, row) or a path for each; plain values, so that ranks can pass them on."""

    names: list[str]
    where: list[tuple[int, int] | str | None]  # None: nowhere
    samples: np.ndarray  # (n,) int64, PCM samples; 0 where not looked at

    def missing(self) -> list[str]:
        return [name for name, place in zip(self.names, self.where) if place is None]


def as_list(value: str | list[str] | None) -> list[str]:
    """An option that may be one path, several or none, as a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


class Sources:
    """The data sets and folders of an evaluation."""

    def __init__(
        self,
        shards: str | list[str] | None = None,
        roots: str | list[str] | None = None,
        sample_rate: int = SAMPLE_RATE,
    ):
        self.roots, self.sample_rate = as_list(roots), sample_rate
        self.sets = []
        for folder in as_list(shards):
            from shards.reader import open_shards

            self.sets.append(open_shards(folder))
            if self.sets[-1].sample_rate != sample_rate:
                raise ShardError(
                    f"{folder}: {self.sets[-1].sample_rate} Hz, expected {sample_rate} Hz; pack it at that rate"
                )

    def describe(self, shards: str | list[str] | None) -> str:
        """The places that were searched, for an error message."""
        return ", ".join(as_list(shards) + self.roots) or "nowhere: give --root FOLDER or --shards FOLDER"

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
            paths = (os.path.join(root, form) for root in self.roots for form in _forms(names[i]))
            where[i] = next(filter(os.path.isfile, paths), None)
        return Places(names, where, samples)

    def measure(self, places: Places) -> Places:
        """The places with the lengths of the files, from their headers. Raises ShardError naming a file that is no audio."""
        samples = places.samples.copy()
        files = [i for i, place in enumerate(places.where) if isinstance(place, str)]
        with ThreadPoolExecutor(PROBES) as pool:
            samples[files] = list(pool.map(lambda i: self._length(places.where[i]), files))
        return Places(places.names, places.where, samples)

    def _length(self, path: str) -> int:
        """Samples of a file from its header; where that is unusual, by decoding it (which names what is wrong)."""
        header = read_header(path)
        if header.samples and (header.rate, header.channels, header.bits) == (self.sample_rate, 1, 16):
            return header.samples
        return len(read_audio(path, self.sample_rate))

    def read(self, places: Places, index: int) -> np.ndarray:
        """(samples,) int16 of one utterance. Raises ShardError where it is damaged or no longer as long as it was."""
        place = places.where[index]
        if isinstance(place, str):
            audio = read_audio(place, self.sample_rate)
        else:
            audio = self.sets[place[0]].read_utterance(place[1])
        if len(audio) != places.samples[index]:
            raise ShardError(
                f"{places.names[index]}: {len(audio)} samples read, {places.samples[index]} when the lists were checked;"
                " the file changed or its header is wrong"
            )
        return audio


def stem(name: str) -> str:
    """A name without its ending: the key it has in a packed data set."""
    return str(PurePosixPath(name).with_suffix("")) if PurePosixPath(name).suffix else name


def _forms(name: str) -> list[str]:
    """The file names to look for under a root."""
    return list(dict.fromkeys([name, *(stem(name) + ending for ending in ENDINGS)]))
