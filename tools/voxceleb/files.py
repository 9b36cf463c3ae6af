"""What VoxCeleb consists of: archives with their md5, the layout inside, the published counts, the official trial lists.

Counts: Nagrani et al. 2017 (arXiv 1706.08612), Chung et al. 2018 (arXiv 1806.05622). The lists were cleaned later under
other names; only the number of their lines tells them apart.

    for speaker, key, source in entries(ARCHIVES["vox2_dev"], Path("data")): ...   # data/vox2_dev_aac.zip::dev/aac/id00012/...
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from shards import lists
from tools.voxceleb.extract import ArchiveError, check_members

AUDIO = (".wav", ".m4a", ".flac")
SPEAKER = re.compile(r"id\d{5}")


@dataclass(frozen=True)
class Archive:
    """One zip of the corpus. parts: {name: md5}, empty where it comes whole; inside: folder of the speakers in the zip."""

    zip: str
    md5: str
    parts: dict[str, str]
    inside: str
    folder: str  # of the speakers once it is extracted, below --save_path
    speakers: int | None = None
    utterances: int | None = None

    def place(self, member: str) -> str:
        """Where a member goes: the speakers below `folder`, anything else beside it."""
        if member.startswith(self.inside):
            return f"{self.folder}/{member[len(self.inside) :]}"
        return f"{os.path.dirname(self.folder)}/{member}"

    def flat(self) -> Archive:
        """The same with voxceleb_trainer's folders: voxceleb1/id10001/..., whatever set a speaker belongs to."""
        return replace(self, folder=self.folder.split("/")[0])

    def files(self) -> dict[str, str]:
        """{name: md5} of what is downloaded."""
        return self.parts or {self.zip: self.md5}


def _parts(prefix: str, *digests: str) -> dict[str, str]:
    return {f"{prefix}_part{'a' + chr(ord('a') + i)}": digest for i, digest in enumerate(digests)}


ARCHIVES = {
    "vox1_dev": Archive(
        "vox1_dev_wav.zip",
        "ae63e55b951748cc486645f532ba230b",
        _parts(
            "vox1_dev_wav",
            "e395d020928bc15670b570a21695ed96",
            "bbfaaccefab65d82b21903e81a8a8020",
            "017d579a2a96a077f40042ec33e51512",
            "7bb1e9f70fddc7a678fa998ea8b3ba19",
        ),
        "wav/",
        "voxceleb1/dev/wav",
        1211,
        148642,
    ),
    "vox1_test": Archive(
        "vox1_test_wav.zip", "185fdc63c3c739954633d50379a3d102", {}, "wav/", "voxceleb1/test/wav", 40, 4874
    ),
    "vox2_dev": Archive(
        "vox2_dev_aac.zip",
        "bbc063c46078a602ca71605645c2a402",
        _parts(
            "vox2_dev_aac",
            "da070494c573e5c0564b1d11c3b20577",
            "17fe6dab2b32b48abaf1676429cdd06f",
            "1de58e086c5edf63625af1cb6d831528",
            "5a043eb03e15c5a918ee6a52aad477f9",
            "cea401b624983e2d0b2a87fb5d59aa60",
            "fc886d9ba90ab88e7880ee98effd6ae9",
            "d160ecc3f6ee3eed54d55349531cb42e",
            "6b84a81b9af72a9d9eecbb3b1f602e65",
        ),
        "dev/aac/",
        "voxceleb2/dev/aac",
        5994,
        1092009,
    ),
    "vox2_test": Archive("vox2_test_aac.zip", "0d2b3ea430a821c33263b5ea37ede312", {}, "aac/", "voxceleb2/test/aac"),
}

# (trials, targets) -> which list it is
TRIAL_LISTS = {
    (37720, 18860): "VoxCeleb1-O, original (veri_test.txt)",
    (37611, 18802): "VoxCeleb1-O, cleaned (veri_test2.txt)",
    (552536, 276270): "VoxCeleb1-H, original (list_test_hard.txt)",
    (550894, 275488): "VoxCeleb1-H, cleaned (list_test_hard2.txt)",
    (581480, 290743): "VoxCeleb1-E, original (list_test_all.txt)",
    (579818, 289921): "VoxCeleb1-E, cleaned (list_test_all2.txt)",
}


def read_checksums(path: Path) -> dict[str, str]:
    """{name: md5} of a file of lines `md5  name`, as md5sum prints them. Raises ArchiveError naming a bad line."""
    found = {}
    for number, line in lists.read_lines(path):
        words = line.split()
        if len(words) != 2 or not re.fullmatch(r"[0-9a-f]{32}", words[0]):
            raise ArchiveError(f"{path}, line {number}: found {line!r}, expected `md5  name`")
        found[words[1].lstrip("*")] = words[0]
    return found


def with_checksums(path: Path) -> dict[str, Archive]:
    """ARCHIVES with the md5s, and the parts, that a file of checksums names; the others are left out."""
    found = read_checksums(path)
    made = {}
    for name, archive in ARCHIVES.items():
        stem = archive.zip.removesuffix(".zip")
        if archive.zip in found:
            parts = {part: found[part] for part in sorted(found) if re.fullmatch(stem + "_part[a-z]+", part)}
            made[name] = replace(archive, md5=found[archive.zip], parts=parts)
    if not made:
        raise ArchiveError(f"{path} names none of {', '.join(archive.zip for archive in ARCHIVES.values())}")
    return made


def entries(archive: Archive, root: Path) -> Iterator[tuple[str, str, str]]:
    """(speaker, key, source) of all audio of a set, from its zip if that is there, else from its folders.

    Where a folder holds an utterance as WAV and as m4a, the WAV is taken. Raises ArchiveError where neither is there.
    """
    if (root / archive.zip).exists():
        yield from _zip_entries(archive, root)
        return
    folders = [root / archive.folder.replace("/aac", "/wav"), root / archive.folder]
    seen: set[str] = set()
    for folder in dict.fromkeys(folders):
        for path in _audio_files(folder):
            key = os.path.splitext(os.path.relpath(path, folder))[0]
            if key not in seen:
                seen.add(key)
                yield key.split(os.sep)[0], key, path
    if not seen:
        raise ArchiveError(
            f"{root} has neither {archive.zip} nor audio in {archive.folder}: run `download` (and `extract`) first"
        )


def _zip_entries(archive: Archive, root: Path) -> Iterator[tuple[str, str, str]]:
    found = False
    for info in check_members(root / archive.zip):
        stem, ending = os.path.splitext(info.filename)
        if info.filename.startswith(archive.inside) and ending.lower() in AUDIO:
            found, key = True, stem[len(archive.inside) :]
            yield key.split("/")[0], key, f"{root / archive.zip}::{info.filename}"
    if not found:
        raise ArchiveError(
            f"{root / archive.zip} has no audio in {archive.inside}: it is not the VoxCeleb archive of that name"
        )


def _audio_files(folder: Path) -> Iterator[str]:
    """WAV files first, so that they win over the m4a they were made of."""
    later = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".wav"):
                yield os.path.join(parent, name)
            elif name.endswith(AUDIO):
                later.append(os.path.join(parent, name))
    yield from later


def count_report(name: str, archive: Archive, utterances: dict[str, int]) -> tuple[bool, str]:
    """(complete, one line) for {speaker: number of utterances} beside the published counts."""
    speakers, total = len(utterances), sum(utterances.values())
    line = f"{name}: {speakers:,} speakers, {total:,} utterances"
    odd = [speaker for speaker in utterances if not SPEAKER.fullmatch(speaker)]
    if odd:
        line += f"; names that are not like id00012: {', '.join(odd[:3])}"
    if archive.speakers is None:
        return not odd, line
    if (speakers, total) == (archive.speakers, archive.utterances):
        return not odd, line + ", complete"
    published = f"published {archive.speakers:,} and {archive.utterances:,}"
    gaps = [
        f"{wanted - have:,} {what}"
        for wanted, have, what in ((archive.speakers, speakers, "speakers"), (archive.utterances, total, "utterances"))
        if wanted > have
    ]
    return False, f"{line}; {published}: {'missing ' + ' and '.join(gaps) if gaps else 'more than there should be'}"


def key_of(path: str) -> str:
    """The last three parts of a path without its ending: `wav/id1/a/0.wav` -> `id1/a/0`."""
    return os.path.splitext("/".join(path.split("/")[-3:]))[0]


def check_train_list(path: Path, sources: dict[str, str]) -> list[str]:
    """Lines `speaker source` of a list `speaker path`. Raises ArchiveError naming bad lines and what is missing."""
    lines, missing = [], []
    for number, words in _lines(path, 2, "speaker path"):
        speaker, key = words[0], key_of(words[1])
        if key.split("/")[0] != speaker:
            raise ArchiveError(f"{path}, line {number}: speaker {speaker} has the path {words[1]} of another")
        if key in sources:
            lines.append(f"{speaker} {sources[key]}")
        else:
            missing.append(words[1])
    _require(path, missing)
    return lines


def check_trials(path: Path, sources: dict[str, str]) -> str:
    """One line that says which list of trials it is. Raises ArchiveError naming bad lines and files that are missing."""
    trials, targets, keys = 0, 0, {}
    for number, (label, *pair) in _lines(path, 3, "label path path"):
        if label not in ("0", "1"):
            raise ArchiveError(f"{path}, line {number}: label {label!r}, expected 0 or 1")
        trials, targets = trials + 1, targets + (label == "1")
        keys.update((key_of(file), file) for file in pair)
    _require(path, [file for key, file in keys.items() if key not in sources])
    known = TRIAL_LISTS.get((trials, targets), "not one of the published lists")
    return f"{path}: {trials:,} trials, {targets:,} targets, {len(keys):,} files: {known}"


def _lines(path: Path, words: int, form: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in lists.read_lines(path):
        found = line.split()
        if len(found) != words:
            raise ArchiveError(f"{path}, line {number}: found {line.strip()!r}, expected `{form}`")
        yield number, found


def _require(path: Path, missing: list[str]) -> None:
    if missing:
        raise ArchiveError(f"{path}: {len(missing):,} files are not there, first {', '.join(missing[:3])}")
