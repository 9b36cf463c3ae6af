"""Loose WAV and FLAC files through the reader's interface, so that a run can start without packing.

Every file's header is read when the list is opened (about 20,000 files a second from a local disk, far fewer from a network one:
pack there). Crops of 16-bit PCM WAV are read at their offset, as from shards; FLAC is decoded from the crop on. Nothing checks a
loose file's content: no sum of it is known.

Usage: utterances = open_files("train_list.txt", "voxceleb2/dev/wav"); utterances.read_batch(rows, starts, out)
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from shards import archive, audio, plan
from shards.format import ShardError
from shards.reader import Names, Utterances, check_bounds, check_rows, search_sorted

HEAD = 4096  # bytes of a file in which a WAV's data chunk is expected to begin
FILE = np.dtype([("offset", "<u8"), ("samples", "<u4"), ("size", "<u8")])  # offset 0: not 16-bit PCM WAV


class LooseUtterances(Utterances):
    """Utterances whose rows are files. Raises ShardError naming the line of a file that is missing or does not fit."""

    def __init__(self, list_path: str | Path, root: str | Path, sample_rate: int = 16000):
        self._arguments = (list_path, root, sample_rate)
        self.sample_rate = sample_rate
        self._list = list_path
        listed = plan.read_list(list_path, root)
        self._entries = plan.make_entries(tqdm(listed, "list", unit=" lines", delay=5))
        self._keys = self._entries.keys
        self._table = np.empty(len(self._keys), FILE)
        for i in tqdm(range(len(self._keys)), "headers", unit=" files", delay=5):
            self._table[i] = self._header(i)
        bounds, names = plan.speaker_bounds(self._keys)
        self.speakers = Names(np.array(names))
        self.labels = np.arange(len(names), dtype=np.uint32)
        self.speaker_rows = bounds.astype(np.uint64)
        self.samples = self._table["samples"]
        digest = hashlib.sha256(b"%d" % sample_rate + self._keys.tobytes())
        digest.update(self.samples.tobytes() + self._table["size"].tobytes())
        self.fingerprint = digest.hexdigest()

    def _header(self, i: int) -> tuple[int, int, int]:
        path = self._entries.source(i)
        if archive.split(path)[1] is not None:
            raise self._wrong(i, "lies in an archive, which only shards.pack reads; pack the list")
        try:
            with open(path, "rb", buffering=0) as file:
                size, layout = os.fstat(file.fileno()).st_size, audio.riff_layout(file.read(HEAD))
        except (FileNotFoundError, NotADirectoryError):
            raise self._wrong(i, "is not there; correct the list or the root folder") from None
        if layout is not None and layout[:2] == (self.sample_rate, 1):
            if layout[2] + layout[3] > size or layout[3] == 0:
                raise self._wrong(
                    i, f"is cut: its header promises {layout[3]} bytes of audio, {size - layout[2]} are there"
                )
            return layout[2], layout[3] // 2, size
        try:
            info = soundfile.info(path)
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise self._wrong(i, f"is not readable as audio ({error}); pack the list with --skip-bad FILE") from None
        problem = audio.mismatch((info.samplerate, info.channels, info.subtype), self.sample_rate)
        if problem or not 0 < info.frames < 2**32:
            problem = problem or f"{info.frames} samples"
            raise self._wrong(i, f"has {problem}; convert it, or pack the list with --convert")
        return 0, info.frames, size

    def _wrong(self, i: int, what: str) -> ShardError:
        position = int(self._entries.order[i])
        with open(self._list, "rb") as file:
            line = [number for number, text in enumerate(file, 1) if text.strip()][position]
        return ShardError(f"{self._list}, line {line}: {self._entries.source(i)} {what}")

    def key(self, row: int) -> str:
        return bytes(self._keys[row]).decode()

    def find(self, keys) -> np.ndarray:
        return search_sorted(self._keys, [key.encode("utf-8", "surrogateescape") for key in keys])

    def read_utterance(self, row: int) -> np.ndarray:
        out = np.empty(int(self.samples[row]), np.int16)
        self._fill(row, 0, out)
        return out

    def _read(self, rows: np.ndarray, starts: np.ndarray, out: np.ndarray) -> None:
        check_rows(rows, len(self))
        check_bounds(rows, starts, self.samples[rows].astype(np.int64), out.shape[1])
        for row, start, crop in zip(rows.tolist(), starts.tolist(), out):
            samples = int(self.samples[row])
            if samples >= len(crop):
                self._fill(row, start, crop)
            else:
                crop[:] = np.resize(np.roll(self.read_utterance(row), -(start % samples)), len(crop))

    def _fill(self, row: int, start: int, out: np.ndarray) -> None:
        path, entry = self._entries.source(row), self._table[row]
        try:
            if entry["offset"]:
                with open(path, "rb", buffering=0) as file:
                    found = (
                        os.preadv(file.fileno(), (memoryview(out).cast("B"),), int(entry["offset"]) + 2 * start) // 2
                    )
            else:
                with soundfile.SoundFile(path) as file:
                    file.seek(start)
                    found = len(file.read(len(out), dtype="int16", out=out))
        except (soundfile.SoundFileError, RuntimeError, OSError) as error:
            raise ShardError(f"{path}: not readable any more ({error}); it was when the list was opened") from None
        if found != len(out):
            raise ShardError(
                f"{path}: found {found} samples at {start}, expected {len(out)}: it was cut since it was opened"
            )
