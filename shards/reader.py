"""Crops from packed shards, by row: one pread of just the bytes of the crop, straight into the batch.

A batch is sorted by (tar, offset), announced to the kernel (posix_fadvise WILLNEED, which halves cold reads), then read. Tars are
never mapped; at most 256 are open in a process, and a forked process opens its own. A tar's size and first header are checked at
its first touch, a row's CRC at every use, the length at every read, the crc32 of the audio when a whole utterance is read. A crop
of WAV shards cannot be checked against a sum of the whole: `spknet check` does that.

Usage: utterances = open_shards("data/shards/vox2"); utterances.read_batch(rows, starts, out)  # (n, samples) int16
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards import audio, format, index, union
from shards.cache import Cache
from shards.commands import command
from shards.format import ShardError
from shards.loose import open_files
from shards.tars import MAX_OPEN, Tars
from shards.utterances import Names, Utterances, as_batch, check_bounds, check_rows, repeated, search_sorted

__all__ = ["PackedUtterances", "Utterances", "open_files", "open_shards"]


def open_shards(
    paths: str | Path | Sequence[str | Path],
    *,
    cache_dir: str | Path | None = None,
    cache_gib: float = 0.0,
    unite_speakers: bool = False,
) -> PackedUtterances:
    """Opens one packed data set or several. With several, speakers are `FOLDER/SPEAKER` unless unite_speakers joins equal names.

    cache_dir: node-local folder that tars are copied to, up to cache_gib GiB (0: no limit). Raises ShardError.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise ShardError("no data set given; expected the folder of at least one")
    return PackedUtterances([Path(path) for path in paths], cache_dir, cache_gib, unite_speakers)


class PackedUtterances:
    """Utterances of one packed data set or several; see shards.utterances."""

    def __init__(self, paths: list[Path], cache_dir=None, cache_gib: float = 0.0, unite_speakers: bool = False):
        self._arguments = (paths, cache_dir, cache_gib, unite_speakers)
        self._indexes = [index.open_index(path, cache_dir) for path in paths]
        joined = union.join(self._indexes, unite_speakers)
        self.sample_rate: int = self._indexes[0].sample_rate
        self.speakers: Sequence[str] = Names(joined.speakers)
        self.labels: np.ndarray = joined.labels
        self.speaker_rows: np.ndarray = joined.speaker_rows
        self.samples: np.ndarray = joined.samples
        self.fingerprint: str = joined.fingerprint
        self.remarks: list[str] = []
        self._first_row = joined.first_row  # (sets + 1,)
        self._order = joined.order  # None, or (N,) the row of the sets laid end to end
        self._first_shard = np.cumsum([0] + [len(i.tars) for i in self._indexes])
        self._tars = Tars(self._indexes, Cache(cache_dir, cache_gib) if cache_dir is not None else None)

    def __getstate__(self):
        return {"arguments": self._arguments, "fingerprint": self.fingerprint}

    def __setstate__(self, state):
        self.__init__(*state["arguments"])
        if self.fingerprint != state["fingerprint"]:
            raise ShardError(f"{self._arguments[0]}: the data set has changed since the run began; start the run again")

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, row: int) -> str:
        """The key of a row, as it was packed."""
        where, row = self._place(row)
        opened = self._indexes[where]
        key = bytes(opened.keys[row])
        if format.crc16(key) != opened.rows["key_check"][row]:
            raise ShardError(f"{opened.folder}/index: key {row}, {key!r}, is damaged; {format.REMAKE}")
        return key.decode()

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """(n,) int64 rows of keys, -1 where there is none. Raises ShardError where a key stands in two of several sets."""
        names = [key.encode("utf-8", "surrogateescape") for key in keys]
        found = np.full(len(names), -1, np.int64)
        for first, opened in zip(self._first_row.tolist(), self._indexes):
            rows = _search(opened, names)
            twice = np.flatnonzero((rows >= 0) & (found >= 0))
            if len(twice):
                raise ShardError(f"key {keys[twice[0]]!r} stands in several of the data sets; ask one at a time")
            found = np.where(rows >= 0, rows + first, found)
        if self._order is not None:
            found = np.where(found >= 0, self._inverse()[found], -1)
        return found

    def read_utterance(self, row: int) -> np.ndarray:
        """(samples,) int16, the whole utterance, checked against its crc32. Raises ShardError."""
        table = self._rows(np.array([row]))
        entry = table[0]
        data = self._payload(entry, row)
        if self._is_wav(table)[0]:
            return np.frombuffer(data, "<i2").astype(np.int16, copy=False)
        samples = np.empty(int(entry["samples"]), np.int16)
        self._decode(data, 0, samples, row)
        return samples

    def read_batch(self, rows: np.ndarray, starts: np.ndarray, out: np.ndarray) -> None:
        rows, starts = as_batch(rows, starts, out)
        table = self._rows(rows)
        check_bounds(rows, starts, table["samples"].astype(np.int64), out.shape[1])
        direct = (table["samples"] >= out.shape[1]) & self._is_wav(table)
        self._read_crops(table, rows, starts, out, np.flatnonzero(direct))
        for i in np.flatnonzero(~direct).tolist():
            row, start = int(rows[i]), int(starts[i])
            if table["samples"][i] >= out.shape[1]:  # of a FLAC member
                self._decode(self._payload(table[i], row), start, out[i], row)
            else:
                out[i] = repeated(self.read_utterance(row), start, out.shape[1])

    def _read_crops(self, table, rows, starts, out, chosen) -> None:
        """The hot path: crops that lie in WAV members as they are."""
        offsets = (table["offset"] + 2 * starts.astype(np.uint64))[chosen]
        shards = table["shard"][chosen]
        order = np.lexsort((offsets, shards))
        chosen, shards, offsets = chosen[order].tolist(), shards[order].tolist(), offsets[order].tolist()
        nbytes = 2 * out.shape[1]
        target = memoryview(out.reshape(-1)).cast("B") if out.size else memoryview(b"")
        # No more rows at a time than files may be open: what was announced is still open when it is read.
        for a in range(0, len(chosen), MAX_OPEN):
            b = min(a + MAX_OPEN, len(chosen))
            with self._tars.lock() as opened:
                fds = [opened(shard) for shard in shards[a:b]]
                for fd, offset in zip(fds, offsets[a:b]):
                    os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)
                for fd, offset, i in zip(fds, offsets[a:b], chosen[a:b]):
                    found = os.preadv(fd, (target[i * nbytes : (i + 1) * nbytes],), offset)
                    if found != nbytes:
                        self._raise_short(table[i], int(rows[i]), found, nbytes)
        if not _LITTLE_ENDIAN:
            out[chosen] = out[chosen].byteswap()

    def _payload(self, entry: np.void, row: int) -> bytes:
        shard, nbytes = int(entry["shard"]), int(entry["nbytes"])
        with self._tars.lock() as opened:
            data = os.pread(opened(shard), nbytes, int(entry["offset"]))
        if len(data) != nbytes:
            self._raise_short(entry, row, len(data), nbytes)
        found = zlib.crc32(data)
        if found != entry["crc32"]:
            raise ShardError(
                f"{self._tars.path(shard)}: utterance {self.key(row)}: crc32 {found:08x}, expected {entry['crc32']:08x}: "
                f"the audio is damaged; pack it again (`{command('check')}` lists all that is)"
            )
        return data

    def _decode(self, data: bytes, start: int, out: np.ndarray, row: int) -> None:
        try:
            audio.decode_flac(data, start, len(out), out)
        except ShardError as error:
            raise ShardError(f"utterance {self.key(row)}: {error}; pack it again") from None

    def _raise_short(self, entry: np.void, row: int, found: int, expected: int) -> None:
        raise ShardError(
            f"{self._tars.path(int(entry['shard']))}: utterance {self.key(row)}: found {found} bytes, expected {expected}: "
            "the tar has been cut since it was opened; copy or pack it again"
        )

    def _is_wav(self, table: np.ndarray) -> np.ndarray:
        if len(self._indexes) == 1:
            return np.full(len(table), self._indexes[0].codec == "wav")
        wav = np.array([i.codec == "wav" for i in self._indexes])
        return wav[np.searchsorted(self._first_shard, table["shard"], "right") - 1]

    def _inverse(self) -> np.ndarray:
        inverse = np.empty(len(self._order), np.int64)
        inverse[self._order] = np.arange(len(self._order))
        return inverse

    def _place(self, row: int) -> tuple[int, int]:
        """(set, row in that set) of a row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row}, there are {len(self)}")
        if self._order is not None:
            row = int(self._order[row])
        where = int(np.searchsorted(self._first_row, row, "right")) - 1
        return where, row - int(self._first_row[where])

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """(n,) ROW, checked, with the tars of all sets numbered through."""
        check_rows(rows, len(self))
        if len(self._indexes) == 1:
            return _checked(self._indexes[0], rows)
        if self._order is not None:
            rows = self._order[rows]
        where = np.searchsorted(self._first_row, rows, "right") - 1
        table = np.empty(len(rows), format.ROW)
        for i in np.unique(where).tolist():
            mask = where == i
            part = _checked(self._indexes[i], rows[mask] - self._first_row[i])
            part["shard"] += np.uint32(self._first_shard[i])
            table[mask] = part
        return table


_LITTLE_ENDIAN = np.dtype("<i2") == np.dtype(np.int16)


def _checked(opened: index.Index, rows: np.ndarray) -> np.ndarray:
    table = np.take(opened.rows, rows)
    wrong = format.row_checks(table) != table["row_check"]
    wrong |= (table["shard"] >= len(opened.tars)) | (table["samples"] == 0)
    if not wrong.any():
        wrong = table["offset"] + table["nbytes"] > opened.tars["filesize"][table["shard"]]
        if opened.codec == "wav":
            wrong |= table["nbytes"] != 2 * table["samples"]
    if wrong.any():
        i = int(wrong.argmax())
        raise ShardError(f"{opened.folder}/index/utterances.npy: row {rows[i]} is damaged; {format.REMAKE}")
    return table


def _search(opened: index.Index, names: list[bytes]) -> np.ndarray:
    rows = search_sorted(opened.keys, names)
    checks = opened.rows["key_check"][np.maximum(rows, 0)]
    for name, row, check in zip(names, rows.tolist(), checks.tolist()):
        if row >= 0 and format.crc16(name) != check:
            raise ShardError(f"{opened.folder}/index/keys.npy: key {row}, {name!r}, is damaged; {format.REMAKE}")
    return rows
