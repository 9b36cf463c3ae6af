"""The index of a packed data set: written once from sorted rows, opened as memory maps that all workers of a machine share.

    index/index.json         what there is: counts, tars with size and sha256, the files below with size and sha256; written last
    index/utterances.npy     (N,) ROW, sorted by key, hence by speaker
    index/keys.npy           (N,) byte strings of one width
    index/speaker_rows.npy   (S + 1,) u64: rows of speaker s are [p[s], p[s + 1])
    index/speakers.npy       (S,) byte strings, in the order of their keys
    index/labels.npy         (S,) u32: class labels; those of an appended pack follow those that were there
    index/tars.npy           (tars,) TAR: the numbers of index.json's shardlist, whose 25,000 entries at 100 M utterances take 60 ms to parse
    index/identities.npy     (tars,) 32 bytes: what stands in the last block of each tar; zeros for a tar of an older pack

Opening costs the check of index.json's own checksum, of every file's size and type, of the sha256 of the small files, and of a CRC-32 over
256 rows and keys, which those of another data set do not have. A row and a key carry a CRC-16 each, checked when they are used, so the
big files need not be read. Data sets packed before November 2026 have neither identities nor that CRC; they are read without them.

Usage: index = open_index("data/shards/vox2"); index.rows["samples"].sum()
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards import cache, format, plan
from shards.commands import command
from shards.format import REMAKE, ROW, TAR, VERSION, ShardError

KIND = "spknet-shards"
SMALL_FILES = ("speaker_rows.npy", "speakers.npy", "labels.npy", "tars.npy")
FILES = ("utterances.npy", "keys.npy", *SMALL_FILES)
IDENTITIES = "identities.npy"  # not in older data sets
PROBED = ("utterances.npy", "keys.npy")
PROBES = 256  # rows and keys whose CRC-32 is compared at every opening
NO_IDENTITY = bytes(32)
COUNTS = {
    "sample_rate": 2**20,
    "utterances": 2**40,
    "speakers": 2**32,
    "samples": 2**60,
    "skipped": 2**40,
    "tars": 2**32,
}
COUNTS |= {"key_bytes": format.MAX_KEY, "speaker_bytes": format.MAX_KEY}  # the most that each may be
NO_CHECKSUM = "0" * 64
SHARDLIST = b',\n "shardlist": ['  # the last key: what stands before it is enough to open a data set


@dataclass
class Index:
    """An opened index. Arrays are read-only maps; row numbers and labels count from 0."""

    folder: Path  # the data set: OUT
    meta: dict  # index.json, less its shardlist
    rows: np.ndarray  # (N,) ROW
    keys: np.ndarray  # (N,) S
    speakers: np.ndarray  # (S,) S
    labels: np.ndarray  # (S,) u32
    speaker_rows: np.ndarray  # (S + 1,) u64
    tars: np.ndarray  # (tars,) TAR
    identities: np.ndarray | None = None  # (tars,) V32

    def identity(self, shard: int) -> str | None:
        """Hex, what the last block of a tar must say; None where it is not known."""
        known = NO_IDENTITY if self.identities is None else bytes(self.identities[shard])
        return None if known == NO_IDENTITY else known.hex()

    def entry(self, shard: int) -> dict:
        """What index.json's shardlist says of a tar."""
        return shard_entry(shard, self.tars[shard])

    @property
    def codec(self) -> str:
        return self.meta["codec"]

    @property
    def sample_rate(self) -> int:
        return self.meta["sample_rate"]


def tar_name(shard: int) -> str:
    return f"train-{shard:06d}.tar"


def shard_entry(shard: int, tar: np.void) -> dict:
    """The entry of shardlist for a row of tars.npy."""
    numbers = {name: int(tar[name]) for name in ("nsamples", "filesize", "head_crc32", "generation")}
    return {"url": tar_name(shard), **numbers, "sha256": bytes(tar["sha256"]).hex()}


@dataclass
class Contents:
    """What an index is made of. rows: (N,) ROW in the order of keys, (N,) sorted S; tars: (tars,) TAR; identities: (tars,) V32;
    skipped: utterances left out; sums: further (sha256, path) for SHA256SUMS."""

    rows: np.ndarray
    keys: np.ndarray
    tars: np.ndarray
    identities: np.ndarray
    settings: plan.Settings
    skipped: int
    sums: list[tuple[str, str]]


def write_index(out: Path, contents: Contents) -> None:
    """Writes OUT/index and OUT/SHA256SUMS; index.json last. Fills in the speaker and row_check of the rows."""
    rows, keys, tars, settings = contents.rows, contents.keys, contents.tars, contents.settings
    folder = out / "index"
    folder.mkdir(exist_ok=True)
    (folder / "index.json").unlink(missing_ok=True)
    format.remove_leftovers(folder)
    bounds, names = plan.speaker_bounds(keys)
    speakers = np.array(names)
    labels = _labels(rows, bounds, tars["generation"])
    rows["speaker"] = np.repeat(np.arange(len(names), dtype=np.uint32), np.diff(bounds))
    rows["row_check"] = format.row_checks(rows)
    arrays = dict(zip(FILES, (rows, keys, bounds.astype("<u8"), speakers, labels, tars)))
    files = {}
    for name, array in (arrays | {IDENTITIES: contents.identities}).items():
        format.write_npy(folder / name, array)
        files[name] = {"filesize": (folder / name).stat().st_size, "sha256": format.sha256_file(folder / name)}
    shards = [shard_entry(i, tar) for i, tar in enumerate(tars)]
    meta = {
        "checksum": NO_CHECKSUM,
        "format": KIND,
        "version": VERSION,
        "sample_rate": settings.sample_rate,
        "codec": settings.codec,
        "utterances": len(rows),
        "speakers": len(speakers),
        "samples": int(rows["samples"].sum(dtype=np.uint64)),
        "key_bytes": keys.dtype.itemsize,
        "speaker_bytes": speakers.dtype.itemsize,
        "skipped": contents.skipped,
        "tars": len(tars),
        "fingerprint": _fingerprint(rows, keys, labels, settings.sample_rate),
        "probes": {name: _probe(arrays[name]) for name in PROBED},
        "files": files,
        "shardlist": shards,
    }
    text = json.dumps(meta, indent=1).encode()
    text = text.replace(NO_CHECKSUM.encode(), hashlib.sha256(text).hexdigest().encode(), 1)
    lines = [(s["sha256"], s["url"]) for s in shards] + contents.sums
    lines += [(entry["sha256"], f"index/{name}") for name, entry in files.items()]
    lines.append((hashlib.sha256(text).hexdigest(), "index/index.json"))
    format.write_file(out / "SHA256SUMS", "".join(f"{digest}  {path}\n" for digest, path in lines))
    format.write_file(folder / "index.json", text)


def _probe(array: np.ndarray) -> int:
    """CRC-32 of PROBES elements, evenly spread."""
    n = min(PROBES, len(array))
    chosen = np.arange(n) * (len(array) - 1) // max(n - 1, 1)
    return zlib.crc32(np.take(array, chosen).tobytes())


def _labels(rows: np.ndarray, bounds: np.ndarray, generation: np.ndarray) -> np.ndarray:
    # A speaker's label is decided by the pack that brought the speaker first, then by the order of the names.
    first = np.minimum.reduceat(generation[rows["shard"]], bounds[:-1])
    labels = np.empty(len(first), "<u4")
    labels[np.argsort(first, kind="stable")] = np.arange(len(first))
    return labels


def _fingerprint(rows: np.ndarray, keys: np.ndarray, labels: np.ndarray, sample_rate: int) -> str:
    # Of what a run sees: names, lengths, content, labels; not of where in which tar it lies.
    digest = hashlib.sha256(b"%d" % sample_rate)
    for a in range(0, len(rows), 1 << 20):
        piece = rows[a : a + (1 << 20)]
        digest.update(keys[a : a + (1 << 20)].tobytes())
        digest.update(piece["samples"].tobytes() + piece["crc32"].tobytes())
    digest.update(labels.tobytes())
    return digest.hexdigest()


def open_index(out: str | Path, cache_dir: str | Path | None = None) -> Index:
    """Opens OUT/index, copied to cache_dir first where one is given, or where OUT lies on a network file system.

    Raises ShardError naming the file, what was found and what was expected.
    """
    out = Path(out)
    meta = read_meta(out, shardlist=False)
    folder = cache.local_index(out / "index", meta, cache_dir)
    n, s = meta["utterances"], meta["speakers"]
    for name in FILES:
        _check_file(folder / name, meta["files"][name], hashed=name in SMALL_FILES)
    opened = Index(
        out,
        meta,
        format.open_npy(folder / "utterances.npy", ROW, n),
        format.open_npy(folder / "keys.npy", np.dtype(f"S{meta['key_bytes']}"), n),
        format.open_npy(folder / "speakers.npy", np.dtype(f"S{meta['speaker_bytes']}"), s),
        format.open_npy(folder / "labels.npy", np.dtype("<u4"), s),
        format.open_npy(folder / "speaker_rows.npy", np.dtype("<u8"), s + 1),
        format.open_npy(folder / "tars.npy", TAR, meta["tars"]),
    )
    if IDENTITIES in meta["files"]:
        _check_file(folder / IDENTITIES, meta["files"][IDENTITIES], hashed=True)
        opened.identities = format.open_npy(folder / IDENTITIES, np.dtype("V32"), meta["tars"])
    for name, array in zip(PROBED, (opened.rows, opened.keys)):
        if name in meta.get("probes", {}) and _probe(array) != meta["probes"][name]:
            raise ShardError(f"{folder / name} is damaged or of another data set; {REMAKE}")
    bounds = opened.speaker_rows
    if bounds[0] != 0 or bounds[-1] != n or np.any(bounds[1:] <= bounds[:-1]):
        raise ShardError(f"{folder / 'speaker_rows.npy'}: rows of the speakers do not rise from 0 to {n}; {REMAKE}")
    if opened.tars["nsamples"].sum(dtype=np.int64) != n:
        raise ShardError(f"{folder / 'tars.npy'}: its tars do not have {n} utterances together; {REMAKE}")
    return opened


def _check_file(path: Path, expected: dict, hashed: bool) -> None:
    try:
        with format.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; {REMAKE}") from None
    if size != expected["filesize"]:
        raise ShardError(
            f"{path}: found {size} bytes, index.json says {expected['filesize']}: cut or replaced; {REMAKE}"
        )
    if hashed and format.sha256_file(path) != expected["sha256"]:
        raise ShardError(f"{path}: its sha256 is not the one in index.json: damaged or of another data set; {REMAKE}")


def read_meta(out: Path, shardlist: bool = True) -> dict:
    """index.json, checked; without its shardlist where that is not needed. Raises ShardError."""
    path = out / "index" / "index.json"
    try:
        text = format.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(
            f"{path} is missing: {out} is not a packed data set, or is not packed to the end; "
            f"run the same `{command('pack')}` again, or --merge after the last --task"
        ) from None
    problem = None
    try:
        head, found, _ = text.partition(SHARDLIST)
        meta = json.loads(text if shardlist or not found else head + b"}")
        problem = _meta_problem(meta)
        if not problem and shardlist and "shardlist" not in meta:
            problem = "it has no shardlist"
    except (ValueError, RecursionError) as error:
        meta, problem = {}, f"not JSON ({error})"
    if not problem and not _has_checksum(text, meta["checksum"]):
        problem = "its checksum is wrong: edited or damaged"
    if problem:
        raise ShardError(f"{path}: {problem}; {REMAKE}")
    return meta


def _has_checksum(text: bytes, checksum: str) -> bool:
    blank = text.replace(checksum.encode(), NO_CHECKSUM.encode(), 1)
    return hashlib.sha256(blank).hexdigest() == checksum


def _meta_problem(meta) -> str | None:
    """What is wrong with the contents of index.json, or None. Numbers are bounded, so that nothing absurd is allocated."""
    if not isinstance(meta, dict) or meta.get("format") != KIND:
        return f"expected an object with format {KIND!r}"
    if meta.get("version") != VERSION:
        return f"version {meta.get('version')!r}, this program reads version {VERSION}"
    if meta.get("codec") not in format.CODECS:
        return f"codec {meta.get('codec')!r}, expected wav or flac"
    for name, most in COUNTS.items():
        least = 0 if name == "skipped" else 1
        if not _is_count(meta.get(name), least, most):
            return f"{name} is {meta.get(name)!r}, expected a number from {least} to {most}"
    if not all(_is_hex(meta.get(name)) for name in ("checksum", "fingerprint")):
        return "checksum and fingerprint must be 64 hexadecimal digits"
    files, probes = meta.get("files"), meta.get("probes", {})
    if not isinstance(files, dict) or not all(_is_file(files.get(name)) for name in FILES):
        return f"files must give filesize and sha256 of {', '.join(FILES)}"
    if not files.keys() <= {*FILES, IDENTITIES} or not _is_file(files.get(IDENTITIES, files[FILES[0]])):
        return f"files has others than {', '.join((*FILES, IDENTITIES))}"
    if not isinstance(probes, dict) or not all(_is_count(probes.get(name, 0), 0, 2**32) for name in PROBED):
        return "probes must be numbers"
    return _shardlist_problem(meta) if "shardlist" in meta else None


def _shardlist_problem(meta: dict) -> str | None:
    shards = meta["shardlist"]
    if not isinstance(shards, list) or len(shards) != meta["tars"]:
        return f"shardlist is not a list of {meta['tars']}"
    for i, shard in enumerate(shards):
        if not _is_file(shard) or shard.get("url") != tar_name(i) or not _is_count(shard.get("nsamples"), 0):
            return f"entry {i} of shardlist must have url {tar_name(i)}, nsamples, filesize and sha256"
        if not _is_count(shard.get("head_crc32"), 0) or not _is_count(shard.get("generation"), 0):
            return f"entry {i} of shardlist lacks head_crc32 or generation"
    listed = sum(shard["nsamples"] for shard in shards)
    if listed != meta["utterances"]:
        return f"utterances is {meta['utterances']}, but the tars have {listed}"
    return None


def _is_count(value, least: int, most: int = 2**40) -> bool:
    return type(value) is int and least <= value <= most


def _is_hex(value) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_file(entry) -> bool:
    return isinstance(entry, dict) and _is_count(entry.get("filesize"), 1) and _is_hex(entry.get("sha256"))
