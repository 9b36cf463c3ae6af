"""VoxCeleb from the internet to shards. Every step goes on where it was killed; a step that is done costs nothing.

    download   the parts, each with its md5 (tools/voxceleb/download.py)
    join       the parts to one zip, in place (tools/voxceleb/extract.py); extract, lists, pack and all do it by themselves
    extract    the zip to voxceleb2/dev/aac/id00012/...; only for those who want loose files
    convert    voxceleb2/dev/aac/*.m4a to voxceleb2/dev/wav/*.wav; only for those who want loose files
    lists      lists/vox2_dev.txt from what is there, compared with the published counts; checks official lists
    pack       to shards/vox2_dev, straight from the zip (m4a too): a million small files never touch the disk
    all        download, join, lists, pack

voxceleb_trainer's `dataprep.py` flags (--download --user --password --extract --convert --augment) work as they are.

    VOXCELEB_PASSWORD=... spknet voxceleb all --save_path data --base-url https://HOST/FOLDER --user NAME
"""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import sys
from collections import Counter
from collections.abc import MutableMapping
from pathlib import Path

from shards import errors
from shards.commands import Parser
from shards.format import atomic_write
from shards.pack import pack
from tools import musan
from tools.voxceleb import files as voxceleb_files
from tools.voxceleb.download import Access, DownloadError, fetch_all, is_verified, receipt
from tools.voxceleb.extract import ArchiveError, convert, extract, join, journal
from tools.voxceleb.files import Archive

SECRETS = {"--user": "VOXCELEB_USER", "--password": "VOXCELEB_PASSWORD", "--key": "VOXCELEB_KEY"}
STEPS = ("download", "join", "extract", "convert", "lists", "pack", "all")


def hide_secrets(argv: list[str], environ: MutableMapping[str, str]) -> list[str]:
    """argv without the values of --user, --password, --key, which go to environ: a command line is readable by everybody."""
    kept, rest = [], iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in SECRETS:
            kept.append(word)
            continue
        value = value if equals else next(rest, "")
        if value:
            environ[SECRETS[name]] = value
    return kept


def _restart_without_secrets() -> None:
    environ = dict(os.environ)
    argv = hide_secrets(sys.orig_argv, environ)
    if argv != sys.orig_argv:
        os.execve(sys.executable, argv, environ)


def _access(options: argparse.Namespace) -> Access:
    """Who asks where; asks at the terminal for what is missing."""
    given = options.secrets
    base_url = options.base_url or os.environ.get("VOXCELEB_URL", "")
    if not base_url:
        raise DownloadError(
            "no address: give --base-url or set VOXCELEB_URL. It comes with the permission to use the data (see docs/voxceleb.md)"
        )
    if given["--user"] and not given["--password"]:
        given["--password"] = getpass.getpass(f"password of {given['--user']}: ")
    if "{key}" in base_url and not given["--key"]:
        given["--key"] = getpass.getpass("key: ")
    return Access(base_url, given["--user"], given["--password"], given["--key"], options.timeout, options.retries)


def extracted(archive: Archive, root: Path) -> Path:
    """The receipt that stays when an archive was unpacked and removed."""
    return root / (archive.zip + ".extracted")


def packed(name: str, options: argparse.Namespace) -> bool:
    return (options.shards / name / "index" / "index.json").exists()


def download(archives: dict[str, Archive], options: argparse.Namespace) -> None:
    wanted = {}
    for archive in archives.values():
        whole = options.save_path / archive.zip
        joining = journal(whole).exists()
        if not (joining or extracted(archive, options.save_path).exists() or is_verified(whole, archive.md5)):
            wanted.update(archive.files())
    if wanted:
        fetch_all(wanted, options.save_path, _access(options), parallel=options.connections)


def join_parts(archive: Archive, root: Path) -> Path:
    """The whole zip of a set, made of its parts where need be. Raises ArchiveError, DownloadError."""
    whole = root / archive.zip
    if archive.parts and (journal(whole).exists() or not whole.exists()):
        parts = [root / name for name in archive.parts]
        for part in [] if journal(whole).exists() else parts:
            if part.exists():
                is_verified(part, archive.parts[part.name])
        join(parts, whole, archive.md5)
    if not is_verified(whole, archive.md5):
        raise ArchiveError(f"{whole} is not there: run `download` first")
    return whole


def _join_what_is_there(archives: dict[str, Archive], root: Path) -> None:
    for archive in archives.values():
        there = [root / name for name in (archive.zip, *archive.parts)] + [journal(root / archive.zip)]
        if any(path.exists() for path in there):
            join_parts(archive, root)


def extract_all(archives: dict[str, Archive], options: argparse.Namespace, keep: bool) -> None:
    for archive in archives.values():
        done = extracted(archive, options.save_path)
        if done.exists():
            continue
        whole = join_parts(archive, options.save_path)
        count = extract(whole, options.save_path, archive.place, workers=4 * options.workers)
        if keep:
            continue
        with atomic_write(done) as file:
            file.write(f"{archive.md5}  {archive.zip}: {count} files in {archive.folder}\n".encode())
        whole.unlink()
        receipt(whole).unlink(missing_ok=True)


def convert_all(archives: dict[str, Archive], options: argparse.Namespace) -> None:
    """Every m4a to a WAV in the folder `wav` beside `aac`, or beside itself where there is no `aac`."""
    pairs = []
    for folder in dict.fromkeys(options.save_path / archive.folder for archive in archives.values()):
        target = folder.parent / "wav" if folder.name == "aac" else folder
        pairs += [
            (path, target / path.relative_to(folder).with_suffix(".wav")) for path in sorted(folder.rglob("*.m4a"))
        ]
    if not pairs:
        raise ArchiveError(f"{options.save_path}: no m4a files below voxceleb2: run `extract` first")
    failed = convert(pairs, workers=options.workers)
    if failed:
        raise ArchiveError(f"{len(failed)} of {len(pairs)} files could not be converted:\n" + "\n".join(failed[:20]))


def make_lists(archives: dict[str, Archive], options: argparse.Namespace) -> None:
    """lists/NAME.txt of each set with its counts; official lists checked against all of them."""
    root, sources = options.save_path, {}
    _join_what_is_there(archives, root)
    for name, archive in archives.items():
        counts, lines = Counter(), []
        for speaker, key, source in voxceleb_files.entries(archive, root):
            counts[speaker] += 1
            sources[key] = os.path.relpath(source, root)
            lines.append(f"{speaker} {sources[key]}")
        _write_lines(root / "lists" / f"{name}.txt", lines)
        print(voxceleb_files.count_report(name, archive, counts)[1])
    for path in options.train_list:
        lines = voxceleb_files.check_train_list(path, sources)
        _write_lines(root / "lists" / path.name, lines)
        speakers = len({line.split()[0] for line in lines})
        print(f"{path}: {speakers:,} speakers, {len(lines):,} utterances, all there: {root / 'lists' / path.name}")
    for path in options.test_list:
        print(voxceleb_files.check_trials(path, sources))


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write("".join(line + "\n" for line in lines).encode())


def pack_all(archives: dict[str, Archive], options: argparse.Namespace) -> None:
    _join_what_is_there(archives, options.save_path)
    for name, archive in archives.items():
        if packed(name, options):
            print(f"{options.shards / name} is there already")
            continue
        _check_room(name, archive, options)
        items = list(voxceleb_files.entries(archive, options.save_path))
        print(voxceleb_files.count_report(name, archive, Counter(speaker for speaker, _, _ in items))[1])
        pack(
            items,
            options.shards / name,
            workers=options.workers,
            codec=options.codec,
            shard_bytes=options.shard_bytes,
            skip_bad=options.skip_bad and f"{options.skip_bad}.{name}",
        )


def _check_room(name: str, archive: Archive, options: argparse.Namespace) -> None:
    whole, out = options.save_path / archive.zip, options.shards / name
    growth = 3.5 if "aac" in archive.zip else 1.0  # 64 kbit/s to 256 kbit/s, less what m4a adds
    need = growth * (0.5 if options.codec == "flac" else 1.0) * (whole.stat().st_size if whole.exists() else 0)
    out.mkdir(parents=True, exist_ok=True)
    need, free = need - sum(path.stat().st_size for path in out.glob("*.tar")), shutil.disk_usage(out).free
    if need > free:
        raise ArchiveError(
            f"{out} needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room, choose another --shards, or --codec flac"
        )


def do_all(archives: dict[str, Archive], options: argparse.Namespace) -> None:
    archives = {name: archive for name, archive in archives.items() if not packed(name, options)}
    download(archives, options)
    if archives:
        make_lists(archives, options)
        pack_all(archives, options)
    print(f"the shards lie in {options.shards}")


def run_dataprep(archives: dict[str, Archive], options: argparse.Namespace) -> None:
    """voxceleb_trainer's flags, in its order and with its folders: voxceleb1/id.../, voxceleb2/id.../ with WAV beside m4a."""
    archives = {name: archive.flat() for name, archive in archives.items()}
    if options.augment:
        shards = ["--save_path", str(options.save_path), "--shards", str(options.shards)]
        if musan.main(["all", *shards, "--workers", str(options.workers)]):
            raise ArchiveError("--augment did not end well")
    if options.download:
        download(archives, options)
    if options.concatenate and not options.extract:
        _join_what_is_there(archives, options.save_path)
    if options.extract:
        extract_all(archives, options, keep=True)
    if options.convert:
        convert_all(archives, options)


DATAPREP = {
    "download": "as the step",
    "concatenate": "as the step join",
    "extract": "as the step; the zips stay",
    "convert": "as the step",
    "augment": "download and pack MUSAN and the impulse responses, as `spknet musan all`",
}


def parser() -> Parser:
    p = Parser(
        "spknet voxceleb",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("step", nargs="?", choices=STEPS, help="what to do, see above")
    p.add_argument("--save_path", "--save-path", type=Path, default=Path("data"), help="folder of everything (data)")
    p.add_argument("--sets", default="all", help="of vox1_dev,vox1_test,vox2_dev,vox2_test (all)")
    p.add_argument("--checksums", type=Path, help="file of `md5  name` lines for another edition of the archives")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (all cores)")
    where = p.add_argument_group("download")
    where.add_argument("--base-url", help="https://HOST/FOLDER or with {file} and {key} in it; or VOXCELEB_URL")
    for option, variable in SECRETS.items():
        where.add_argument(option, help=f"better {variable}, or wait to be asked")
    where.add_argument("--connections", type=int, default=4, help="files at a time (4)")
    where.add_argument("--timeout", type=float, default=60.0, help="seconds without a byte (60)")
    where.add_argument("--retries", type=int, default=8, help="tries in a row that bring nothing (8)")
    other = p.add_argument_group("extract, lists, pack")
    other.add_argument("--keep-archives", action="store_true", help="leave the zips after extracting them")
    other.add_argument("--train-list", type=Path, action="append", default=[], help="official list to check")
    other.add_argument("--test-list", type=Path, action="append", default=[], help="trials to check")
    other.add_argument("--shards", type=Path, help="folder of the shards (SAVE_PATH/shards)")
    other.add_argument("--shard-bytes", type=int, default=2**30, help="about the size of a tar (2^30)")
    other.add_argument("--codec", choices=("wav", "flac"), default="wav", help="of the shards (wav)")
    other.add_argument("--skip-bad", help="leave unreadable audio out and list it in SKIP_BAD.SET")
    old = p.add_argument_group("dataprep.py's flags, instead of a step")
    for flag, step in DATAPREP.items():
        old.add_argument(f"--{flag}", action="store_true", help=step)
    return p


def _chosen(options: argparse.Namespace) -> dict[str, Archive]:
    known = voxceleb_files.with_checksums(options.checksums) if options.checksums else voxceleb_files.ARCHIVES
    names = list(known) if options.sets == "all" else options.sets.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ArchiveError(f"--sets {','.join(unknown)}: expected some of {','.join(known)}")
    return {name: known[name] for name in names}


def _run(options: argparse.Namespace) -> None:
    archives = _chosen(options)
    if options.step is None:
        run_dataprep(archives, options)
    elif options.step == "download":
        download(archives, options)
    elif options.step == "join":
        _join_what_is_there(archives, options.save_path)
    elif options.step == "extract":
        extract_all(archives, options, options.keep_archives)
    elif options.step == "convert":
        convert_all(archives, options)
    elif options.step == "lists":
        make_lists(archives, options)
    elif options.step == "pack":
        pack_all(archives, options)
    else:
        do_all(archives, options)


def main(argv: list[str] | None = None) -> int:
    return errors.run(_main, argv)


def _main(argv: list[str] | None) -> None:
    argv = hide_secrets(sys.argv[1:] if argv is None else argv, os.environ)
    options = parser().parse_args(argv)
    # Out of the environment, so that no child process sees them.
    options.secrets = {name: os.environ.pop(variable, "") for name, variable in SECRETS.items()}
    options.shards = options.shards or options.save_path / "shards"
    flags = (options.download, options.concatenate, options.extract, options.convert, options.augment)
    if (options.step is None) != any(flags):
        parser().error(f"give one step of {', '.join(STEPS)}, or dataprep.py's flags")
    options.save_path.mkdir(parents=True, exist_ok=True)
    _run(options)


if __name__ == "__main__":
    _restart_without_secrets()
    sys.exit(main())
