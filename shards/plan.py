"""Which utterance goes to which tar: a pure function of the list, the seed and the tar size, the same on every machine.

Speakers are put in the order of a keyed hash of their names and dealt to tars one after the other until a tar is full; the utterances
of a tar are put in the order of a keyed hash of their keys. Hashes rather than a random generator: whoever reads FORMAT.md
can compute the same order, with any version of any library. Sizes come from the source files and are written down at the first
run (parts/plan-*.npz), so that a file repaired later does not move everything behind it.

Everything per utterance lies in arrays (about 100 bytes each, and the list's text); a worker gets one tar's share.

Usage: entries = read_list("train_list.txt", "voxceleb2/dev/wav"); plan = make_plan(entries, OUT, settings)
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards import archive
from shards.format import ShardError, atomic_write, check_key, check_speaker, open_regular
from shards.lists import TrainingList

# Bytes of 16 kHz mono PCM for a byte of the source, by ending: only how full a tar gets depends on it.
EXPANSION = {".wav": 1.0, ".flac": 1.8, ".m4a": 4.0, ".aac": 4.0, ".mp3": 6.0, ".ogg": 6.0, ".opus": 8.0}
LATER = ("settings", "keys_sha256")  # fields of a record that those of older packs lack
# What numpy and zipfile raise for a damaged .npz.
DAMAGED = (ValueError, LookupError, OSError, EOFError, TypeError, SyntaxError, NotImplementedError)
DAMAGED += (zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Settings:
    """What, beside the list, decides the bytes of a pack."""

    sample_rate: int = 16000
    codec: str = "wav"
    convert: bool = False  # not part of the identity: a file that needed none has the same bytes with it
    seed: int = 0
    shard_bytes: int = 2**30
    generation: int = 0  # 0: the first pack, k: the k-th --append
    first_shard: int = 0


@dataclass
class Entries:
    """A list in the order of its keys. keys: (n,) bytes; sources: text of all sources, bounds: (n + 1,) where each lies in it."""

    keys: np.ndarray
    sources: bytes
    bounds: np.ndarray
    order: np.ndarray  # (n,) position in the list, from 0, of each key

    def source(self, i: int) -> str:
        j = self.order[i]
        return os.fsdecode(self.sources[self.bounds[j] : self.bounds[j + 1]])


@dataclass
class Record:
    """What parts/plan-GGG.npz holds: sizes (n,) u8 in the order of the keys, and what follows from them."""

    sizes: np.ndarray
    identity: str
    digest: str
    n_shards: int
    first_shard: int
    sample_rate: int
    codec: str
    settings: str = ""  # JSON, as it went into identity; empty in those of older packs
    keys_sha256: str = ""


@dataclass
class Plan:
    """shard: (n,) u32 number of each entry's tar, counted from settings.first_shard; digest: hex, of all that matters."""

    entries: Entries
    settings: Settings
    where: np.ndarray | None  # (n,) LOCATION; None where the sizes came from the record
    shard: np.ndarray
    n_shards: int
    digest: str


def make_entries(items: Iterable[tuple[str, str, str]], progress: bool = False) -> Entries:
    """Entries of (speaker, key, source) triples; every name is checked, a key that stands twice is an error."""
    keys, sources = bytearray(), bytearray()
    key_bounds, bounds = array("q", [0]), array("q", [0])
    for speaker, key, source in tqdm(items, "list", unit=" lines", delay=5, disable=not progress):
        check_speaker(speaker)
        keys += check_key(speaker, key)
        sources += os.fsencode(source)
        key_bounds.append(len(keys))
        bounds.append(len(sources))
    n = len(bounds) - 1
    if n == 0:
        raise ShardError("the list is empty; expected lines `speaker path`")
    fixed = np.zeros(n, f"S{int(np.diff(key_bounds).max())}")
    for i in range(n):
        fixed[i] = bytes(keys[key_bounds[i] : key_bounds[i + 1]])
    order = np.argsort(fixed, kind="stable")
    entries = Entries(fixed[order], bytes(sources), np.array(bounds, np.int64), order.astype(np.int64))
    twice = np.flatnonzero(entries.keys[1:] == entries.keys[:-1])
    if len(twice):
        raise _twice(entries, int(twice[0]), items)
    return entries


def _twice(entries: Entries, first: int, items: Iterable) -> ShardError:
    same = range(first, first + int(np.sum(entries.keys == entries.keys[first])))
    name, places = entries.keys[first].decode(), [int(entries.order[i]) for i in same]
    where = f"entries {', '.join(str(place + 1) for place in places[:5])}"
    if isinstance(items, TrainingList):
        where = f"{items.path}, lines {', '.join(str(items.numbers[place]) for place in places[:5])}"
    files = list(dict.fromkeys(entries.source(i) for i in same))
    what = "take one out" if len(files) == 1 else f"of {files[0]} and {files[1]}; rename one"
    return ShardError(f"key {name!r} stands {len(same)} times in the list ({where}), expected once: {what}")


def keyed_hash(seed: int, name: bytes) -> bytes:
    """8 bytes by which names are put in order: BLAKE2b of the name, keyed with the seed in decimal."""
    return hashlib.blake2b(name, digest_size=8, key=b"%d" % seed).digest()


def make_plan(
    entries: Entries,
    out: Path,
    settings: Settings,
    skip_missing: bool = False,
    alone: Callable[[], bool] = lambda: True,
) -> Plan:
    """The plan, with the sizes of an earlier run of the same list where OUT has them.

    A plan of another list or other settings makes way as long as nothing was packed by it and nobody else is at work (alone).
    """
    path = out / "parts" / f"plan-{settings.generation:03d}.npz"
    where = None
    if path.exists():
        record = read_record(path)
        changed = differences(record, entries, settings)
        if changed and (_is_written(out, record) or not alone()):
            raise ShardError(
                f"{out} was begun with {' and '.join(changed)}; give what it was begun with, add to it with --append,"
                " or pack to another folder"
            )
        if changed:
            _begin_anew(out, path, record)
    if not path.exists():
        where = locate(entries, np.arange(len(entries.keys)), skip_missing)
        _write_record(path, entries, settings, estimate(entries, where))
    record = read_record(path)
    if differences(record, entries, settings) or len(record.sizes) != len(entries.keys):
        raise ShardError(
            f"{out}: another pack with another list or other settings has begun there; wait for it or stop it"
        )
    shard, _ = assign(entries.keys, record.sizes, settings)
    return Plan(entries, settings, where, shard, record.n_shards, record.digest)


def _identified(settings: Settings) -> str:
    return json.dumps({name: value for name, value in asdict(settings).items() if name != "convert"}, sort_keys=True)


def list_identity(entries: Entries, settings: Settings) -> str:
    """Hex digest of the keys and the settings."""
    return hashlib.sha256(_identified(settings).encode() + entries.keys.tobytes()).hexdigest()


NAMES = {"sample_rate": "a rate of", "codec": "the codec", "seed": "the seed", "shard_bytes": "a tar size of"}


def differences(record: Record, entries: Entries, settings: Settings) -> list[str]:
    """What a plan was begun with that is not so now, in words; empty where it is of this list and these settings."""
    if record.identity == list_identity(entries, settings):
        return []
    if not record.settings:
        old = json.dumps(asdict(settings), sort_keys=True).encode() + entries.keys.tobytes()
        same = record.identity == hashlib.sha256(old).hexdigest()
        return [] if same else ["another list, seed, tar size, codec, rate or --convert"]
    then, now = json.loads(record.settings), asdict(settings)
    changed = [f"{NAMES[name]} {then[name]} (now {now[name]})" for name in NAMES if then.get(name) != now[name]]
    if record.keys_sha256 != hashlib.sha256(entries.keys.tobytes()).hexdigest():
        changed.insert(0, f"another list ({len(record.sizes)} utterances, now {len(entries.keys)})")
    return changed or ["other settings"]


def _tars_of(out: Path, record: Record) -> list[tuple[Path, Path]]:
    """(part, tar) of all that a plan would write."""
    numbers = range(record.first_shard, record.first_shard + record.n_shards)
    return [(out / "parts" / f"{i:06d}.npz", out / f"train-{i:06d}.tar") for i in numbers]


def _is_written(out: Path, record: Record) -> bool:
    return any(part.exists() for part, _ in _tars_of(out, record))


def _begin_anew(out: Path, path: Path, record: Record) -> None:
    for _, tar in _tars_of(out, record):
        tar.unlink(missing_ok=True)  # killed before its part: nothing knows of it
    path.unlink(missing_ok=True)


def _write_record(path: Path, entries: Entries, settings: Settings, sizes: np.ndarray) -> None:
    _, n_shards = assign(entries.keys, sizes, settings)
    identity = list_identity(entries, settings)
    digest = hashlib.sha256(identity.encode() + sizes.tobytes()).hexdigest()
    keys_sha256 = hashlib.sha256(entries.keys.tobytes()).hexdigest()
    facts = (settings.first_shard, settings.sample_rate, settings.codec, _identified(settings), keys_sha256)
    record = Record(sizes, identity, digest, n_shards, *facts)
    try:
        with atomic_write(path, exclusive=True) as file:
            np.savez(file, **{name: np.array(value) for name, value in vars(record).items()})
    except FileExistsError:
        pass  # another task wrote the same


def read_record(path: Path) -> Record:
    """The record of a plan. Raises ShardError where it is damaged."""
    try:
        with open_regular(path, -1) as opened, np.load(opened, allow_pickle=False) as file:
            values = {name: file[name] for name in Record.__dataclass_fields__ if name in file or name not in LATER}
    except DAMAGED as error:
        raise ShardError(f"{path} is damaged ({error}); delete it and run the same pack again") from None
    return Record(**{name: value if name == "sizes" else value.item() for name, value in values.items()})


def locate(entries: Entries, chosen: np.ndarray, skip_missing: bool) -> np.ndarray:
    """LOCATION of each chosen entry's source. Raises ShardError naming the first of those that are not there."""
    sources = (entries.source(i) for i in tqdm(chosen.tolist(), "files", unit=" files", delay=5, disable=None))
    where = archive.locate(sources, len(chosen))
    missing = np.flatnonzero(where["method"] == archive.MISSING)
    if len(missing) and not skip_missing:
        first = entries.source(chosen[missing[0]])
        raise ShardError(
            f"{len(missing)} of {len(chosen)} files of the list are not there, the first: {first}; "
            "correct the list or the root folder, or leave them out with --skip-bad FILE"
        )
    return where


def estimate(entries: Entries, where: np.ndarray) -> np.ndarray:
    """(n,) u8: about how many bytes each utterance will take in its tar."""
    factors = np.array([EXPANSION.get(os.path.splitext(entries.source(i))[1].lower(), 1.0) for i in range(len(where))])
    return (where["size"] * factors).astype("<u8") + 2048


def assign(keys: np.ndarray, sizes: np.ndarray, settings: Settings) -> tuple[np.ndarray, int]:
    """(n,) u32 shard of each key and their number: whole speakers in hashed order, a new tar where one would overflow."""
    bounds, names = speaker_bounds(keys)
    bytes_of = np.add.reduceat(sizes, bounds[:-1]).tolist()
    order = sorted(range(len(names)), key=lambda s: (keyed_hash(settings.seed, names[s]), names[s]))
    limit = settings.shard_bytes if settings.codec == "wav" else int(settings.shard_bytes * 1.8)
    shard_of = np.empty(len(names), np.uint32)
    shard, filled = 0, 0
    for s in order:
        if filled and filled + bytes_of[s] > limit:
            shard, filled = shard + 1, 0
        shard_of[s] = shard
        filled += bytes_of[s]
    return np.repeat(shard_of, np.diff(bounds)), shard + 1


def speaker_bounds(keys: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
    """Sorted keys -> (S + 1,) first row of each speaker and the end, and the speakers' names."""
    width, n = keys.dtype.itemsize, len(keys)
    new = np.ones(n, bool)
    for a in range(0, n, 1 << 18):
        octets = keys[max(a - 1, 0) : a + (1 << 18)].view(np.uint8).reshape(-1, width)
        slash = (octets == ord("/")).argmax(axis=1)
        differ = octets[1:] != octets[:-1]
        first = np.where(differ.any(axis=1), differ.argmax(axis=1), width)
        # Equal up to and including the slash: the same speaker.
        new[max(a, 1) : a + (1 << 18)] = first <= slash[1:]
    starts = np.flatnonzero(new)
    names = [keys[i].split(b"/", 1)[0] for i in starts]
    return np.append(starts, n).astype(np.int64), names
