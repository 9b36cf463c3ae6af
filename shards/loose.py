"""Loose audio files through the reader's interface, so that a run can start without packing.

Every file's header is read when the list is opened (about 20,000 WAV or FLAC files a second from a local disk, far fewer from a network
one: pack there). Where the header does not tell the length, the whole file is decoded for it. Crops of 16-bit PCM WAV are read
at their offset, as from shards; FLAC is decoded from the crop on; everything else from its beginning, at every crop. No sum of a
loose file's content is known, so nothing checks it; a file that has changed since is looked at again, and refused if it
is not what it was.

Usage: utterances = open_files("train_list.txt", "voxceleb2/dev/wav"); utterances.read_batch(rows, starts, out)
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from shards import archive, audio, flac, format, headers, plan
from shards.format import ShardError
from shards.lists import read_list
from shards.utterances import Names, as_batch, check_bounds, check_rows, repeated, search_sorted

FLAC_TAIL = 1 << 16  # bytes in which the last frame of a FLAC begins
BY_OFFSET, BY_SEEKING, BY_DECODING = range(3)  # how a crop is read
# changed: the file's ctime in ns, which no program can set back, and its size: equal as long as nobody wrote to it.
FILE = np.dtype([("offset", "<u8"), ("samples", "<u4"), ("way", "u1"), ("size", "<u8"), ("changed", "<i8")])


def open_files(list_path: str | Path, root: str | Path, sample_rate: int = 16000) -> LooseUtterances:
    """Loose files, lines `speaker path`, as Utterances. Every file's header is read; errors name the line."""
    return LooseUtterances(list_path, root, sample_rate)


class LooseUtterances:
    """Utterances whose rows are files. Raises ShardError naming the line of a file that is missing or does not fit."""

    def __init__(self, list_path: str | Path, root: str | Path, sample_rate: int = 16000):
        self._arguments = (list_path, root, sample_rate)
        self.sample_rate = sample_rate
        self._listed = read_list(list_path, root)
        self._entries = plan.make_entries(self._listed, progress=True)
        self.remarks = self._listed.remarks()
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

    def __getstate__(self):
        return {"arguments": self._arguments, "fingerprint": self.fingerprint}

    def __setstate__(self, state):
        self.__init__(*state["arguments"])
        if self.fingerprint != state["fingerprint"]:
            raise ShardError(f"{self._arguments[0]}: the files have changed since the run began; start the run again")

    def __len__(self) -> int:
        return len(self.samples)

    def _header(self, i: int) -> tuple:
        path = self._entries.source(i)
        try:
            if archive.split(path)[1] is not None:
                raise ShardError(f"{path} lies in an archive, which only shards.pack reads; pack the list")
            with format.open_regular(path) as file:
                return describe(file.fileno(), path, self.sample_rate)
        except (FileNotFoundError, NotADirectoryError):
            problem = f"{path} is not there; correct the list or the root folder"
        except OSError as error:
            problem = f"{path} is not readable ({error.strerror})"
        except ShardError as error:
            problem = str(error)
        raise ShardError(f"{self._listed.path}, line {self._listed.numbers[int(self._entries.order[i])]}: {problem}")

    def key(self, row: int) -> str:
        return bytes(self._keys[row]).decode()

    def find(self, keys) -> np.ndarray:
        return search_sorted(self._keys, [key.encode("utf-8", "surrogateescape") for key in keys])

    def read_utterance(self, row: int) -> np.ndarray:
        out = np.empty(int(self.samples[row]), np.int16)
        self._fill(row, 0, out)
        return out

    def read_batch(self, rows: np.ndarray, starts: np.ndarray, out: np.ndarray) -> None:
        rows, starts = as_batch(rows, starts, out)
        check_rows(rows, len(self))
        check_bounds(rows, starts, self.samples[rows].astype(np.int64), out.shape[1])
        for row, start, crop in zip(rows.tolist(), starts.tolist(), out):
            if int(self.samples[row]) >= len(crop):
                self._fill(row, start, crop)
            else:
                crop[:] = repeated(self.read_utterance(row), start, len(crop))

    def _fill(self, row: int, start: int, out: np.ndarray) -> None:
        path = self._entries.source(row)
        try:
            with format.open_regular(path) as file:
                self._check_unchanged(row, file.fileno(), path)
                found = self._read(row, file, start, out)
        except (soundfile.SoundFileError, RuntimeError, ValueError, OSError) as error:
            raise ShardError(f"{path}: not readable any more ({error}); it was when the list was opened") from None
        if found != len(out):
            raise ShardError(
                f"{path}: found {found} samples at {start}, expected {len(out)}: it was cut since it was opened"
            )

    def _read(self, row: int, file, start: int, out: np.ndarray) -> int:
        """Fills out with samples from `start` on; how many there were."""
        entry = self._table[row]
        if entry["way"] == BY_OFFSET:
            return os.preadv(file.fileno(), (memoryview(out).cast("B"),), int(entry["offset"]) + 2 * start) // 2
        if entry["way"] == BY_SEEKING:
            with soundfile.SoundFile(file) as decoder:
                decoder.seek(start)
                return len(decoder.read(len(out), dtype="int16", out=out))
        pcm = audio.decode(file.read(), self._entries.source(row), self.sample_rate).pcm
        crop = np.frombuffer(pcm, "<i2")[start : start + len(out)]
        out[: len(crop)] = crop
        return len(crop)

    def _check_unchanged(self, row: int, fd: int, path: str) -> None:
        """A file that was written to since is looked at again: stereo, float or shorter audio must not be read as it was."""
        entry, status = self._table[row], os.fstat(fd)
        if (entry["size"], entry["changed"]) == (status.st_size, status.st_ctime_ns):
            return
        new = describe(fd, path, self.sample_rate)
        if new[:4] != tuple(entry.tolist()[:4]):
            raise ShardError(
                f"{path}: replaced or cut since it was opened: it has another length or format; start the run again"
            )
        self._table[row] = new


def _ends_there(fd: int, header: headers.Header) -> bool:
    """Whether the length in a FLAC's header is that of its last frame."""
    tail = os.pread(fd, FLAC_TAIL, max(0, header.size - FLAC_TAIL))
    return flac.ends_at(tail, header.samples, int.from_bytes(os.pread(fd, 2, 8), "big"))


def describe(fd: int, path: str, sample_rate: int) -> tuple:
    """A FILE of an open file. Raises ShardError where it is not mono 16-bit audio at sample_rate (Hz)."""
    header, changed = headers.header_of(fd, path), os.fstat(fd).st_ctime_ns
    if header.is_plain(sample_rate):
        if not 0 < header.samples <= format.MAX_SAMPLES:
            raise ShardError(f"{path}: no audio in it ({header.samples} samples); leave it out of the list")
        return header.offset, header.samples, BY_OFFSET, header.size, changed
    known = (header.rate, header.channels, f"PCM_{header.bits}")
    if header.container == "FLAC" and 0 < (header.samples or 0) <= format.MAX_SAMPLES and _ends_there(fd, header):
        problem = audio.mismatch(known, sample_rate)
        if problem:
            raise ShardError(f"{path}: {problem}; convert it, or pack the list with --convert")
        return 0, header.samples, BY_SEEKING, header.size, changed
    pcm = audio.decode(os.pread(fd, header.size, 0), path, sample_rate).pcm  # the header does not tell how long it is
    return 0, len(pcm) // 2, BY_DECODING, header.size, changed
