"""Voices that are known by name: a folder of plain files, and `spknet enroll`, which fills it.

    FOLDER/ID.npz    vectors (n, D) float32 of unit length, one a recording
    FOLDER/ID.json   {"name", "recordings": [{"file", "seconds"}, ...], "weights_sha256", "vectors_sha256", "date"}

ID is the beginning of the name's SHA-256: a name is text, never a path. Whoever writes or reads holds the kernel's lock (flock)
on FOLDER/.lock, so processes may enrol and identify at the same time. The JSON comes last and says what its npz holds.

    spknet enroll Anna a.wav b.wav --checkpoint runs/a --to voices
    voices = Enrolments("voices"); voices.add("Anna", voice); voices.all()
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.format import write_file
from spknet.checkpoints.card import weights_digest
from spknet.errors import UserError, run
from spknet.messages import warn
from spknet.use.commands import Parser, network_of

ID_CHARACTERS = 32
LONGEST_NAME = 200  # characters


class EnrolmentError(UserError):
    """A name or a folder of enrolments is not as it must be; the message says what to do."""


@dataclass(frozen=True)
class Voice:
    """vectors: (n, D), a row for each of recordings, {"file", "seconds"}; weights_sha256: of the network that made them."""

    vectors: np.ndarray
    recordings: list[dict]
    weights_sha256: str


class Enrolments:
    """The voices of a folder, which is made when the first one comes."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def add(self, name: str, voice: Voice, existing: str = "refuse") -> int:
        """Enrols a voice; returns how many recordings it has now. existing: refuse, add or replace, where the name is there.

        Raises EnrolmentError.
        """
        check_name(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_EX):
            path = self._path(name)
            if path.exists() and existing == "refuse":
                raise EnrolmentError(f"{name!r} is enrolled in {self.folder} already; give --add or --replace")
            if path.exists() and existing == "add":
                before = self._read(path)[1]
                if before.weights_sha256 != voice.weights_sha256:
                    raise EnrolmentError(f"{name!r} was enrolled with another network; enroll all anew with --replace")
                vectors = np.concatenate([before.vectors, voice.vectors])
                voice = Voice(vectors, before.recordings + voice.recordings, voice.weights_sha256)
            self._write(path, name, voice)
        return len(voice.vectors)

    def all(self) -> dict[str, Voice]:
        """Every voice by its name, sorted. Raises EnrolmentError for a folder without any, or a damaged one."""
        if not self.folder.is_dir():
            raise EnrolmentError(f"{self.folder}: no such folder of enrolments; `spknet enroll NAME FILES` makes one")
        with self._locked(fcntl.LOCK_SH):
            found = dict(sorted(self._read(path) for path in self.folder.glob("*.json")))
        if not found:
            raise EnrolmentError(f"{self.folder}: nobody is enrolled there; `spknet enroll NAME FILES` does it")
        return found

    def _path(self, name: str) -> Path:
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:ID_CHARACTERS] + ".json")

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        lock = self.folder / ".lock"
        # A reader of a folder that is not its own cannot make the lock, and nobody else writes there then.
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(lock, "ab"))
            except OSError:
                if how == fcntl.LOCK_EX:
                    raise
                yield
                return
            fcntl.flock(file, how)
            yield

    def _write(self, path: Path, name: str, voice: Voice) -> None:
        content = io.BytesIO()
        np.savez(content, vectors=voice.vectors.astype(np.float32))
        about = {"name": name, "recordings": voice.recordings, "weights_sha256": voice.weights_sha256}
        about |= {"vectors_sha256": hashlib.sha256(content.getvalue()).hexdigest(), "date": time.strftime("%Y-%m-%d")}
        write_file(path.with_suffix(".npz"), content.getvalue())
        write_file(path, json.dumps(about, indent=1))

    def _read(self, path: Path) -> tuple[str, Voice]:
        try:
            about = json.loads(path.read_bytes())
            content = path.with_suffix(".npz").read_bytes()
            whole = hashlib.sha256(content).hexdigest() == about["vectors_sha256"]
            vectors = np.load(io.BytesIO(content), allow_pickle=False)["vectors"] if whole else None
            name, voice = about["name"], Voice(vectors, about["recordings"], about["weights_sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EnrolmentError(
                f"{path}: no whole enrolment ({error}); enroll this voice anew with --replace"
            ) from None
        if not whole:
            raise EnrolmentError(f"{path} and its npz do not belong together; enroll {name!r} anew with --replace")
        return name, voice


def check_name(name: str) -> None:
    """Raises EnrolmentError for what cannot be printed as one word of a table."""
    if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
        raise EnrolmentError(f"{name!r} is no name: expected 1 to {LONGEST_NAME} characters that can be printed")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser("spknet enroll", "Remember a voice under a name, for `spknet identify`.")
    parser.add("name", metavar="NAME", help="whose voice it is; any text")
    parser.add("files", nargs="+", help="recordings of this voice")
    parser.add("--to", default="voices", metavar="FOLDER", help="folder of enrolments")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--add", action="store_true", help="to the recordings that the name has")
    existing.add_argument("--replace", action="store_true", help="what the name has")
    chosen = parser.parse_args(argv)
    check_name(chosen.name)
    network = network_of(chosen)
    vectors, recordings = [], []
    for vector, heard in network.hear(chosen.files):
        vectors.append(vector)
        recordings.append({"file": heard.name, "seconds": round(heard.seconds, 3)})
        for said in heard.doubts(network.sample_rate):
            warn(f"note: {said}")
    voice = Voice(np.stack(vectors), recordings, weights_digest(network.model.state_dict()))
    existing = "add" if chosen.add else "replace" if chosen.replace else "refuse"
    count = Enrolments(chosen.to).add(chosen.name, voice, existing)
    print(f"{chosen.name}: {count} recording{'s' * (count > 1)} in {chosen.to}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
