"""A file of any length decoded block by block, so that memory does not grow with it: hours of audio for a network.

The samples are those of shards.audio.decode(..., convert=True). A WAV is read piece by piece; of a compressed file the bytes
are in memory, its samples are not; what ffmpeg reads is first written to a temporary file as WAV.

    found = Recording("talk.flac", 16000)
    for block in found.blocks(): ...            # (n,) int16
    found.rate, found.samples, found.notes      # Hz of the file; known when the blocks are at their end
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import soundfile

from shards import containers, wav
from shards.archive import read_source, split
from shards.audio import BLOCK, LENGTHENED, Levels, checked_kind, pcm_blocks, tell_stray, telling
from shards.errors import of_system
from shards.ffmpeg import ffmpeg_to_file
from shards.format import open_regular


class Recording:
    """One file or archive member. rate: Hz of the file (0 before the first block); samples: at sample_rate so far."""

    def __init__(self, source: str | os.PathLike, sample_rate: int):
        self.name, self.sample_rate = os.fspath(source), sample_rate
        self.rate, self.notes, self._levels = 0, {}, Levels()

    @property
    def samples(self) -> int:
        return self._levels.samples

    def blocks(self) -> Iterator[np.ndarray]:
        """(n,) int16, mono, at sample_rate. Raises ShardError, or UserError where it cannot be opened, naming the file."""
        with telling(self.name):
            for block in self._decoded():
                yield self._levels.add(block)
            self._levels.note(self.notes, self.name)

    def _decoded(self) -> Iterator[np.ndarray]:
        if split(self.name)[1] is None:
            with self._opened() as file:
                if wav.is_wave(os.pread(file.fileno(), 12, 0)):
                    yield from self._wave(file.fileno())
                    return
        data = read_source(self.name)
        kind = checked_kind(data, self.name)
        if kind == "WAV" or kind in containers.BY_FFMPEG:
            with tempfile.TemporaryFile() as file:
                if kind == "WAV":
                    file.write(data)
                    file.flush()
                else:
                    ffmpeg_to_file(data, self.name, file.fileno())
                del data
                yield from self._wave(file.fileno())
            return
        data = LENGTHENED[kind](data, self.name) if kind in LENGTHENED else data
        yield from self._by_soundfile(io.BytesIO(data), kind, bytes(data[:42]))

    def _opened(self):
        try:
            return open_regular(self.name)
        except OSError as error:
            raise of_system(error) from None

    def _wave(self, fd: int) -> Iterator[np.ndarray]:
        found = wav.parse(lambda offset, n: os.pread(fd, n, offset), os.fstat(fd).st_size, self.name)
        tell_stray(found, self.notes)
        if not found.is_pcm16 or (found.rate, found.channels) != (self.sample_rate, 1):
            yield from self._by_soundfile(_Wave(found, fd), "WAV", b"")
            return
        self.rate = found.rate
        for start in range(0, found.nbytes, 2 * BLOCK):
            yield np.frombuffer(os.pread(fd, min(2 * BLOCK, found.nbytes - start), found.offset + start), "<i2")

    def _by_soundfile(self, data, kind: str, head: bytes) -> Iterator[np.ndarray]:
        with soundfile.SoundFile(data) as file:
            self.rate = file.samplerate
            yield from pcm_blocks(file, (kind, head, self.name), self.sample_rate, True, self.notes)


class _Wave(io.RawIOBase):
    """A WAV as every decoder reads it, without a copy: the header anew, then the audio where it lies in the file."""

    def __init__(self, found: wav.Wave, fd: int):
        self.found, self.fd, self.head, self.position = found, fd, found.header, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, len(self.head) + self.found.nbytes)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer) -> int:
        piece = self.head[self.position : self.position + len(buffer)]
        if not piece:
            at = self.position - len(self.head)
            piece = os.pread(self.fd, max(0, min(len(buffer), self.found.nbytes - at)), self.found.offset + at)
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)
