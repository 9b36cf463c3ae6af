"""Training lists, lines `speaker path`: the one parser of them, used by every command that reads one.

    id00012 id00012/21Uxsk56VDQ/00001.wav        speaker, blanks or tabs, path to the end of the line (it may have spaces)
    noise   musan.zip::musan/noise/a b.wav       a member of a zip or of an uncompressed tar

Text: UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one; lines may end in LF, CR LF or CR. A path starts from the
root folder; an absolute one must lie below it. The key of an utterance is its path from the speaker's folder on, without the
ending; a dot in the last part becomes `_`, and a key over 95 bytes is shortened to its beginning and a digest of the whole.

Usage: for speaker, key, source in read_list("train_list.txt", "voxceleb2/dev/wav"): ...
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

from shards import archive
from shards.format import MAX_KEY, ShardError, check_key, check_speaker, open_regular

MARKS = (  # of a byte order; the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
MAC = "._"  # what a Mac keeps beside a file on a foreign disk: no audio, whatever its ending
DIGEST_DIGITS = 16  # hexadecimal, of a shortened key


class TrainingList:
    """A list as (speaker, key, source) triples; numbers: the line of each; mac_files, renamed: what was left out, mapped."""

    def __init__(self, path: str | Path, root: str | Path):
        self.path, self.root = Path(path), os.fspath(root)
        self.numbers = array("q")
        self.mac_files = self.renamed = 0

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        self.numbers, self.mac_files, self.renamed = array("q"), 0, 0
        for number, text in read_lines(self.path):
            try:
                parsed = parse_line(text, self.root)
            except ShardError as error:
                raise ShardError(f"{self.path}, line {number}: {error}") from None
            if parsed[2].rpartition("/")[2].startswith(MAC):
                self.mac_files += 1
                continue
            self.renamed += not _is_plain(parsed[1], parsed[2])
            self.numbers.append(number)
            yield parsed

    def remarks(self) -> list[str]:
        """What a user should know of the list once it is read."""
        said = []
        if self.mac_files:
            said.append(f"{self.path}: {self.mac_files} files that a Mac keeps beside others (._NAME) left out")
        if self.renamed:
            said.append(
                f"{self.path}: {self.renamed} keys are not their paths: dots became _, long ones were shortened"
            )
        return said


def _is_plain(key: str, source: str) -> bool:
    return source.rpartition("/")[2].rpartition("::")[2].startswith(key.rpartition("/")[2])


def read_list(list_path: str | Path, root: str | Path) -> TrainingList:
    """(speaker, key, source) of each line `speaker path`. Reading it raises ShardError naming the line that breaks a rule."""
    return TrainingList(list_path, root)


@contextlib.contextmanager
def open_text(path: str | Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """A text file in whatever Unicode it says it is. What is not UTF-8 stands in it as surrogates. Raises ShardError."""
    with open_regular(path, -1) as file:
        head = file.peek(4096)[:4096]
        for magic, kind in PACKED.items():
            if head.startswith(magic):
                raise ShardError(f"{path} is compressed ({kind}); unpack it first")
        encoding = next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")
        if encoding == "utf-8" and head.count(0) > len(head) // 4:
            raise ShardError(
                f"{path} holds zero bytes: UTF-16 without a byte order mark, or no text? Make it UTF-8 with"
                " `iconv -f UTF-16LE -t UTF-8`"
            )
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        try:
            with io.TextIOWrapper(file, encoding, errors, newline) as text:
                yield text
        except UnicodeError as error:
            raise ShardError(
                f"{path} begins as {encoding.upper()} but is not ({error}); make it UTF-8 with iconv"
            ) from None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number, text) of every line that is not blank; lines end in LF, CR LF or CR. Raises ShardError."""
    with open_text(path) as text:
        for number, line in enumerate(text, 1):
            if line.strip():
                yield number, line.rstrip("\n")


def speaker_and_path(text: str) -> tuple[str, str]:
    """The two parts of a line. Raises ShardError where it is not UTF-8, or has one part only."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ShardError(f"{ascii(text.encode('utf-8', 'surrogateescape'))} is not UTF-8; rename the file") from None
    words = re.split(r"[ \t]+", text.strip(" \t"), maxsplit=1)
    if len(words) != 2:
        raise ShardError(f"found {ascii(text)}, expected `speaker path`")
    return words[0], words[1]


def parse_line(text: str, root: str) -> tuple[str, str, str]:
    """`speaker path` -> (speaker, key, source). Raises ShardError with the rule that it breaks."""
    speaker, path = speaker_and_path(text)
    path = below(root, path)
    member = archive.split(path)[1]
    key = key_of(speaker, member if member is not None else path)
    if len(speaker.encode()) > MAX_KEY - 2 or (len(speaker) > 16 and not key.startswith(speaker + "/")):
        raise ShardError(
            f"speaker {ascii(speaker)} has {len(speaker.encode())} bytes, too many for a key; `spknet lists` shortens such names"
        )
    check_speaker(speaker)
    check_key(speaker, key)
    return speaker, key, os.path.join(root, path)


def below(root: str, path: str) -> str:
    """A path that starts from root: as it stands, or an absolute one without root. Raises ShardError where it leaves root."""
    if path.startswith("/"):
        inside = os.path.relpath(path, os.path.abspath(root))
        if inside.split("/")[0] == "..":
            raise ShardError(
                f"path {ascii(path)} is not below the root folder {root}; give `/` or a folder above it as root"
            )
        return inside
    if ".." in path.replace(archive.SEPARATOR, "/").split("/"):
        raise ShardError(f"path {ascii(path)} leaves the root folder; expected a path below it, without '..'")
    return path


def key_of(speaker: str, path: str) -> str:
    """The key of a path: `dev/wav/id1/a/0.wav` of speaker id1 -> `id1/a/0`; `a/0.wav` -> `id1/a/0`."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if speaker in parts[:-1]:
        return key_of_name("/".join(parts[parts.index(speaker) :]))
    return key_of_name("/".join([speaker, *parts]))


def key_of_name(name: str) -> str:
    """The key that a file is packed under: without its ending, dots of the last part as `_`, shortened where it is too long."""
    folder, slash, last = name.rpartition("/")
    key = folder + slash + os.path.splitext(last)[0]
    data = key.encode("utf-8", "surrogateescape")
    if len(data) > MAX_KEY:
        digest = hashlib.blake2b(data, digest_size=DIGEST_DIGITS // 2).hexdigest()
        key = data[: MAX_KEY - DIGEST_DIGITS - 1].decode("utf-8", "ignore") + "-" + digest
    folder, slash, last = key.rpartition("/")
    return folder + slash + last.replace(".", "_")
