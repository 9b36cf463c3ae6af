"""MUSAN and RIRS_NOISES to shards of noise and of room impulse responses. The category takes the speaker's place.

    SHARDS/musan   noise, music, speech         key  noise/free-sound/noise-free-sound-0000
    SHARDS/rirs    rir                          key  rir/smallroom/Room001/Room001-00001

With --test-share 0.2 a fifth of the recordings (of MUSAN: files; of the impulse responses: rooms) goes into SHARDS/musan_test
and SHARDS/rirs_test instead, chosen by their names alone: noise for tests that no training has heard.

Recordings stay whole: crops are read in place, so nothing is cut into pieces first. Snyder et al. 2015 (arXiv 1510.08484), openslr.org/17;
Ko et al. 2017, openslr.org/28: the simulated small and medium rooms, as voxceleb_trainer uses them (--rooms for others).

    spknet musan all --save_path data
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards import errors
from shards.commands import Parser
from shards.format import atomic_write, remove_leftovers
from shards.pack import pack
from spknet import rng
from tools.voxceleb.download import Access, fetch_all
from tools.voxceleb.extract import ArchiveError, check_members, name_problem
from tools.voxceleb.files import read_checksums

MUSAN, MUSAN_MD5 = "musan.tar.gz", "0c472d4fc0c5141eca47ad1ffeb2a7df"
RIRS, RIRS_MD5 = "rirs_noises.zip", "e6f48e257286e05de56413b4779d8ffb"
SOURCES = {
    MUSAN: ("https://www.openslr.org/resources/17", MUSAN_MD5),
    RIRS: ("https://www.openslr.org/resources/28", RIRS_MD5),
}
CATEGORIES = ("noise", "music", "speech")
LARGEST_TAR = 64 << 30  # bytes; MUSAN unpacked has about 12


def download(options: argparse.Namespace) -> None:
    for name in wanted(options):
        if _packed(name, options):
            continue
        url, md5 = SOURCES[name]
        access = Access(options.base_url or url, timeout=options.timeout, retries=options.retries)
        fetch_all({name: options.checksums.get(name, md5)}, options.save_path, access)


def wanted(options: argparse.Namespace) -> list[str]:
    sets = {"musan": MUSAN, "rirs": RIRS}
    return [sets[name] for name in options.sets.split(",")]


def _outs(name: str, options: argparse.Namespace) -> list[Path]:
    """Where its shards go: for training, and for tests where these are wanted."""
    stem = "musan" if name == MUSAN else "rirs"
    return [options.shards / (stem + part) for part in (["", "_test"] if options.test_share else [""])]


def _packed(name: str, options: argparse.Namespace) -> bool:
    return all((out / "index" / "index.json").exists() for out in _outs(name, options))


def for_test(key: str, share: float) -> bool:
    """Whether a recording is one of the test's: decided by the name of its file, or of its room, the same everywhere."""
    parts = key.split("/")
    recording = "/".join(parts[:3]) if parts[0] == "rir" else key
    return float(rng.uniform(0, 0, "test noise " + recording, np.zeros(1))[0]) < share


def unpack_gzip(archive: Path) -> Path:
    """musan.tar.gz -> musan.tar beside it, which is read in place and removed afterwards: gzip allows no reading by position."""
    out = archive.with_suffix("")
    remove_leftovers(archive.parent, out.name)
    if out.exists():
        return out
    try:
        with (
            gzip.open(archive) as source,
            atomic_write(out) as sink,
            tqdm(desc=f"inflate {archive.name}", unit="B", unit_scale=True, delay=2) as bar,
        ):
            while piece := source.read(1 << 22):
                sink.write(piece)
                bar.update(len(piece))
                if sink.tell() > LARGEST_TAR:
                    raise ArchiveError(
                        f"{archive} unpacks to more than {LARGEST_TAR >> 30} GiB: it is not MUSAN; nothing was kept"
                    )
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        raise ArchiveError(f"{archive}: cannot be unpacked ({error}): download it again, or make room") from None
    return out


def musan_entries(archive: Path) -> Iterator[tuple[str, str, str]]:
    """(category, key, source) of musan/CATEGORY/SOURCE/NAME.wav in an uncompressed tar. Raises ArchiveError."""
    seen = set()
    try:
        with tarfile.open(archive, "r:") as file:
            for member in file:
                problem = name_problem(member.name) or ("stands there twice" if member.name in seen else "")
                if problem or not (member.isreg() or member.isdir()):
                    raise ArchiveError(
                        f"{archive}: member {member.name!r} {problem or 'is a link or a device'}; nothing was packed"
                    )
                seen.add(member.name)
                parts = member.name.removeprefix("./").split("/")
                if member.isreg() and len(parts) == 4 and parts[1] in CATEGORIES and parts[3].endswith(".wav"):
                    yield parts[1], "/".join(parts[1:]).removesuffix(".wav"), f"{archive}::{member.name}"
    except (tarfile.TarError, ValueError, OSError) as error:
        raise ArchiveError(f"{archive}: not a whole tar archive ({error}): download it again") from None


def rir_entries(archive: Path, rooms: list[str]) -> Iterator[tuple[str, str, str]]:
    """(`rir`, key, source) of RIRS_NOISES/simulated_rirs/ROOM/*/*.wav. Raises ArchiveError."""
    for info in check_members(archive):
        parts = info.filename.split("/")
        if parts[:2] == ["RIRS_NOISES", "simulated_rirs"] and parts[2] in rooms and parts[-1].endswith(".wav"):
            yield "rir", "/".join(["rir", *parts[2:]]).removesuffix(".wav"), f"{archive}::{info.filename}"


def pack_all(options: argparse.Namespace) -> None:
    for name in wanted(options):
        archive = options.save_path / name
        if _packed(name, options):
            print(f"{' and '.join(map(str, _outs(name, options)))}: there already")
            continue
        if not archive.exists():
            raise ArchiveError(f"{archive} is not there: run `download` first, or put it there")
        if name == RIRS:
            _pack(archive, rir_entries(archive, options.rooms.split(",")), _outs(name, options), options)
            continue
        tar = unpack_gzip(archive)
        try:
            _pack(archive, musan_entries(tar), _outs(name, options), options)
        finally:
            tar.unlink()


def _pack(
    archive: Path, entries: Iterator[tuple[str, str, str]], outs: list[Path], options: argparse.Namespace
) -> None:
    items = list(entries)
    if not items:
        raise ArchiveError(
            f"{archive}: no recordings in it that are wanted; is it the archive of that name (see --rooms)?"
        )
    kept_out = [for_test(key, options.test_share) for _, key, _ in items]
    for part, out in enumerate(outs):
        chosen = [item for item, test in zip(items, kept_out) if test == bool(part)]
        if not chosen:
            raise ArchiveError(
                f"{archive}: --test-share {options.test_share} leaves nothing for {out}; choose another share"
            )
        pack(chosen, out, workers=options.workers, convert=options.convert)


def parser() -> Parser:
    p = Parser("spknet musan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("step", choices=("download", "pack", "all"), help="what to do; all: both")
    p.add_argument("--save_path", "--save-path", type=Path, default=Path("data"), help="folder of the archives (data)")
    p.add_argument("--shards", type=Path, help="folder of the shards (SAVE_PATH/shards)")
    p.add_argument("--sets", default="musan,rirs", help="of musan,rirs (both)")
    p.add_argument("--rooms", default="smallroom,mediumroom", help="of smallroom,mediumroom,largeroom")
    p.add_argument(
        "--test-share", type=float, default=0.0, help="share of the recordings kept apart for tests, 0 to 1 (0)"
    )
    p.add_argument("--base-url", help="another host of both archives (openslr.org)")
    p.add_argument("--checksums", type=Path, help="file of `md5  name` lines for another edition of the archives")
    p.add_argument("--timeout", type=float, default=60.0, help="seconds without a byte (60)")
    p.add_argument("--retries", type=int, default=8, help="tries in a row that bring nothing (8)")
    p.add_argument("--convert", action="store_true", help="take recordings of another rate or with several channels")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (all cores)")
    return p


@errors.told
def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    options.shards = options.shards or options.save_path / "shards"
    unknown = set(options.sets.split(",")) - {"musan", "rirs"}
    if unknown:
        parser().error(f"--sets {','.join(sorted(unknown))}: expected musan, rirs or both")
    if not 0 <= options.test_share < 1:
        parser().error(f"--test-share {options.test_share}: expected 0 (no test noise) to 1")
    options.checksums = read_checksums(options.checksums) if options.checksums else {}
    if options.step in ("download", "all"):
        download(options)
    if options.step in ("pack", "all"):
        pack_all(options)


if __name__ == "__main__":
    sys.exit(main())
