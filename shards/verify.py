"""Checks every byte of a packed data set, and says which speakers and utterances any damage touches.

Each tar is read once: its sha256 goes over everything, and beside it every member's header, name and crc32 are compared with the index, so that
a damaged tar names its damaged utterances. Then the index itself, the part files and SHA256SUMS.

Usage: spknet check data/shards/vox2 --workers 8     (exit status 1 on any damage)
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards import errors, format, index, plan
from shards.commands import Parser, command
from shards.format import BLOCK, ShardError

SHOWN = 10  # affected utterances printed for a tar


@dataclass
class Damage:
    """One damaged file. affected: (key, reason) of each utterance that it touches, as far as the index can tell."""

    path: str
    found: str
    affected: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Report:
    """What verify found. files: how many were checked; readable: whether the index could be opened."""

    files: int
    damages: list[Damage]
    utterances: int = 0
    speakers: int = 0

    def affected(self) -> dict[str, str]:
        """key -> reason of every affected utterance."""
        return {key: reason for damage in self.damages for key, reason in damage.affected}


def verify(out: str | Path, workers: int = 1, progress: bool = False) -> Report:
    """Checks OUT; damage is reported, never raised."""
    out = Path(out)
    try:
        meta = index.read_meta(out)
    except (ShardError, OSError) as error:
        return Report(1, [Damage("index/index.json", str(error))])
    sums, damages = _read_sums(out, meta)
    opened = None
    try:
        opened = index.open_index(out)
        damages += _check_index(opened)
        if [opened.entry(shard) for shard in range(len(opened.tars))] != meta["shardlist"]:
            damages.append(Damage("index/tars.npy", f"it differs from index.json's shardlist; {format.REMAKE}"))
    except (ShardError, OSError) as error:
        damages.append(Damage("index", str(error)))
    small = [f"index/{name}" for name in meta["files"]] + sorted(path for path in sums if path.startswith("parts/"))
    total = sum(entry["filesize"] for entry in meta["shardlist"])
    with (
        tqdm(total=total, desc="verify", unit="B", unit_scale=True, delay=1, disable=not progress) as bar,
        ThreadPoolExecutor(max(workers, 1)) as pool,
    ):
        groups = _rows_of_tars(opened, len(meta["shardlist"]))
        check = functools.partial(check_tar, out, opened, bar.update)
        damages += [damage for damage in pool.map(check, meta["shardlist"], groups) if damage]
    expected = {f"index/{name}": meta["files"][name]["sha256"] for name in meta["files"]}
    damages += [damage for path in small if (damage := _check_small(out, path, expected.get(path, sums.get(path))))]
    return Report(len(meta["shardlist"]) + len(small) + 2, damages, meta["utterances"], meta["speakers"])


def _check_small(out: Path, path: str, sha256: str) -> Damage | None:
    try:
        found = format.sha256_file(out / path)
    except (OSError, ShardError) as error:
        return Damage(path, _unreadable(error))
    return None if found == sha256 else Damage(path, f"sha256 is {found[:16]}..., expected {sha256[:16]}...")


def _unreadable(error: OSError | ShardError) -> str:
    return f"not readable: {error.strerror}" if isinstance(error, OSError) else str(error)


def _read_sums(out: Path, meta: dict) -> tuple[dict[str, str], list[Damage]]:
    """SHA256SUMS as path -> sum, and what is wrong with it."""
    known = {entry["url"]: entry["sha256"] for entry in meta["shardlist"]}
    known |= {f"index/{name}": entry["sha256"] for name, entry in meta["files"].items()}
    known["index/index.json"] = format.sha256_file(out / "index" / "index.json")
    parts = {f"parts/{i:06d}.npz" for i in range(len(meta["shardlist"]))}
    generations = {entry["generation"] for entry in meta["shardlist"]}
    parts |= {f"parts/plan-{generation:03d}.npz" for generation in generations}
    try:
        lines = format.read_bytes(out / "SHA256SUMS").split(b"\n")
    except (OSError, ShardError) as error:
        return {}, [Damage("SHA256SUMS", _unreadable(error))]
    sums = {}
    for line in lines[:-1]:
        digest, _, path = line.decode("utf-8", "replace").partition("  ")
        sums[path] = digest
    wrong = sorted(path for path in known if sums.get(path) != known[path])
    wrong += sorted(sums.keys() - known.keys() - parts) + sorted(parts - sums.keys())
    damage = []
    if wrong:
        damage.append(Damage("SHA256SUMS", f"its line of {wrong[0]!r} is missing, unknown or not what index.json says"))
    if lines[-1]:
        damage.append(Damage("SHA256SUMS", "cut in its last line"))
    return {path: digest for path, digest in sums.items() if path in known or path in parts}, damage


def _check_index(opened: index.Index) -> list[Damage]:
    """Whether rows, keys and speakers fit each other; their sums are checked with the other files."""
    problems = []
    for a in range(0, len(opened.rows), 1 << 18):
        rows, keys = opened.rows[a : a + (1 << 18)], opened.keys[max(a - 1, 0) : a + (1 << 18)]
        if (format.row_checks(np.ascontiguousarray(rows)) != rows["row_check"]).any():
            problems.append(("utterances.npy", f"a row from {a} on fails its check"))
        if (keys[1:] <= keys[:-1]).any():
            problems.append(("keys.npy", f"the keys from {a} on are not in order"))
        if any(format.crc16(k) != c for k, c in zip(keys[1 if a else 0 :].tolist(), rows["key_check"].tolist())):
            problems.append(("keys.npy", f"a key from {a} on fails its check"))
    bounds, names = plan.speaker_bounds(opened.keys)
    if not np.array_equal(bounds.astype(np.uint64), opened.speaker_rows) or names != opened.speakers.tolist():
        problems.append(("speaker_rows.npy", "speakers and their rows are not those of the keys"))
    if not np.array_equal(np.sort(opened.labels), np.arange(len(opened.labels))):
        problems.append(("labels.npy", f"labels are not the numbers from 0 to {len(opened.labels) - 1}"))
    return [Damage(f"index/{name}", f"{what}; {format.REMAKE}") for name, what in problems]


def _rows_of_tars(opened: index.Index | None, n: int) -> list[np.ndarray]:
    """The rows of each of n tars, in the order of their offsets."""
    if opened is None:
        return [np.empty(0, np.int64)] * n
    shards = opened.rows["shard"]
    order = np.lexsort((opened.rows["offset"], shards))
    return np.split(order, np.searchsorted(shards[order], np.arange(1, n + 1)))[:n]


def check_tar(out: Path, opened: index.Index | None, progress, entry: dict, rows: np.ndarray) -> Damage | None:
    """Reads a tar once. progress(bytes); entry: of the shardlist; rows: its utterances in the order of their offsets."""
    path, affected = out / entry["url"], []
    digest, position = hashlib.sha256(), 0
    try:
        with format.open_regular(path, -1) as file:
            size = os.fstat(file.fileno()).st_size
            for row in rows.tolist():
                end = _end(opened.rows[row])
                piece = file.read(end - position) if position < end <= entry["filesize"] else b""
                reason = _problem(piece, position, opened, row)
                digest.update(piece)
                position += len(piece)
                if reason:
                    affected.append((bytes(opened.keys[row]).decode("utf-8", "replace"), reason))
                progress(len(piece))
            while piece := file.read(1 << 22):
                digest.update(piece)
    except (OSError, ShardError) as error:
        reason = f"the tar is not readable: {getattr(error, 'strerror', None) or error}"
        keys = [bytes(opened.keys[row]).decode("utf-8", "replace") for row in rows.tolist()]
        return Damage(entry["url"], reason, [(key, reason) for key in keys])
    if size != entry["filesize"]:
        return Damage(entry["url"], f"found {size} bytes, expected {entry['filesize']}", affected)
    if digest.hexdigest() != entry["sha256"]:
        return Damage(
            entry["url"], f"sha256 is {digest.hexdigest()[:16]}..., expected {entry['sha256'][:16]}...", affected
        )
    if affected or len(rows) != entry["nsamples"]:
        return Damage(
            entry["url"], f"its {len(rows)} rows in the index do not fit its {entry['nsamples']} utterances", affected
        )
    return None


def _end(row: np.void) -> int:
    end = int(row["offset"]) + int(row["nbytes"])
    return end + -end % BLOCK


def _problem(piece: bytes, position: int, opened: index.Index, row: int) -> str | None:
    """What is wrong with the two members of an utterance. piece: their bytes, at `position` of the tar."""
    entry, key = opened.rows[row], bytes(opened.keys[row])
    speaker = key.split(b"/", 1)[0]
    riff = format.wav_header(int(entry["samples"]), opened.sample_rate) if opened.codec == "wav" else b""
    name = key + b"." + opened.codec.encode()
    head = format.tar_header(key + b".spk", len(speaker)) + speaker + format.padding(len(speaker))
    head += format.tar_header(name, len(riff) + int(entry["nbytes"])) + riff
    payload = piece[len(head) : len(head) + int(entry["nbytes"])]
    if position + len(head) != entry["offset"] or len(payload) != entry["nbytes"]:
        return "cut off, or not where the index says"
    if piece[: len(head)] != head:
        return "its headers are damaged, or are those of another utterance"
    return None if zlib.crc32(payload) == entry["crc32"] else "its audio is damaged (crc32)"


def print_report(out: str | Path, report: Report) -> None:
    """The report as text for a person."""
    for damage in report.damages:
        print(f"DAMAGED {damage.path}: {damage.found}")
        for key, reason in damage.affected[:SHOWN]:
            print(f"    {key}: {reason}")
        if len(damage.affected) > SHOWN:
            print(f"    and {len(damage.affected) - SHOWN} more utterances")
    affected = report.affected()
    if report.damages:
        speakers = sorted({key.split("/", 1)[0] for key in affected})
        print(f"{out}: {len(report.damages)} damaged of {report.files} files")
        print(f"affected: {len(affected)} utterances of {len(speakers)} speakers: {', '.join(speakers) or 'none'}")
        print("Copy the damaged files again from a whole copy, or delete them with their part and pack again.")
    else:
        counts = f"{report.utterances} utterances of {report.speakers} speakers"
        print(f"{out}: all {report.files} files are whole ({counts})")


@errors.told
def main(argv: list[str] | None = None) -> int:
    p = Parser(command("check"), description="Check every byte of packed data sets.")
    p.add_argument("out", nargs="+", help="folder of a packed data set")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: all cores)")
    p.add_argument("--list", metavar="FILE", help="write every affected utterance and the reason to FILE")
    args = p.parse_args(argv)
    if args.list:
        inputs = {
            f"{name} of {out}": Path(out) / name for out in args.out for name in ("SHA256SUMS", "index/index.json")
        }
        format.refuse_overwriting(args.list, inputs)
    reports = [verify(out, args.workers, progress=True) for out in args.out]
    for out, report in zip(args.out, reports):
        print_report(out, report)
    if args.list:
        affected = [pair for report in reports for pair in report.affected().items()]
        format.write_file(args.list, "".join(f"{key}\t{reason}\n" for key, reason in affected))
    return 1 if any(report.damages for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
