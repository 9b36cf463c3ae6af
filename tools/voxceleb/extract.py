"""From the parts of an archive to audio files, with no second copy of anything and nothing half-written.

`join` makes `NAME.zip` of its parts in place: each part is moved behind the ones before it piece by piece from its END, and cut by
the piece that has just become durable. So the parts' own sizes say how far a killed run came, and the disk holds one piece twice:

    part ab  |......xxxx|   ->  |......|      truncated after fsync
    target   |aaaa|          ->  |aaaa|      xxxx|

`check_members` refuses an archive that could write outside its folder or fill the disk, before anything of it is used.

    join([Path("x_partaa"), Path("x_partab")], Path("x.zip"), md5); extract(Path("x.zip"), Path("out"), place=lambda name: name)
"""

from __future__ import annotations

import itertools
import json
import os
import posixpath
import shutil
import stat
import struct
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from tqdm import tqdm

from shards.errors import UserError
from shards.format import atomic_write, remove_leftovers, write_file
from tools.voxceleb.download import md5_of, receipt, write_receipt

SMALLEST_PIECE, LARGEST_PIECE = 1 << 18, 64 << 20  # bytes that lie on the disk twice while parts are joined
LARGEST_MEMBER = 2 << 30  # bytes; an utterance has some 250 kB, VoxCeleb's longest some 5 MB
LARGEST_RATIO = 100  # unpacked to packed bytes of a whole archive; deflate reaches 1000, speech 1.2
BATCH = 16  # files for one ffmpeg: starting it takes ten times as long as decoding an utterance
RATE = 16000  # Hz, of a converted file
DEEPEST, LONGEST_NAME, LONGEST_PATH = 64, 255, 1024  # folders, bytes of one and of all: what file systems take
# What zipfile and zlib raise for a damaged archive.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, IndexError)
DAMAGED += (struct.error, RuntimeError)


class ArchiveError(UserError):
    """What was found, what was expected, what to do."""


def journal(whole: Path) -> Path:
    """The file that says, while parts are being joined, how long each was."""
    return whole.with_name(whole.name + ".joining")


def join(parts: list[Path], whole: Path, md5: str) -> None:
    """Makes `whole` of its parts, which are used up. Goes on where a killed run stopped. Raises ArchiveError."""
    target = whole.with_name(whole.name + ".partial")
    if whole.exists():  # killed just before the journal went
        return _tidy(parts, whole)
    if not journal(whole).exists():
        missing = [part.name for part in parts if not part.exists()]
        if missing:
            raise ArchiveError(f"{whole.parent} lacks {', '.join(missing)}: download them first")
        sizes = {part.name: part.stat().st_size for part in parts}
        write_file(journal(whole), json.dumps(sizes))
    try:
        sizes = json.loads(journal(whole).read_text())
        list(sizes), sum(sizes.values())
    except (ValueError, AttributeError, TypeError) as error:
        raise ArchiveError(f"{journal(whole)} is damaged ({error}): delete it and download the parts again") from None
    if list(sizes) != [part.name for part in parts]:
        raise ArchiveError(f"{journal(whole)} names the parts {list(sizes)}, expected {[part.name for part in parts]}")
    if parts[0].exists() and not target.exists():
        os.replace(parts[0], target)
    if not target.exists():
        raise ArchiveError(
            f"{target} is gone in the middle of joining: delete {journal(whole)} and download the parts again"
        )
    piece = min(LARGEST_PIECE, max(SMALLEST_PIECE, sum(sizes.values()) // 32))
    starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0)))
    with tqdm(total=sum(sizes.values()), desc=f"joining {whole.name}", unit="B", unit_scale=True, delay=2) as bar:
        for part in parts:
            _move_into(part, target, starts[part.name], sizes[part.name], piece, bar)
    found = md5_of(target)
    if target.stat().st_size != sum(sizes.values()) or found != md5:
        raise ArchiveError(
            f"{target}: md5 {found}, expected {md5}, although every part was right: is the disk sound? "
            f"Delete it and {journal(whole).name}, then download again"
        )
    os.replace(target, whole)
    write_receipt(whole, md5)
    _tidy(parts, whole)


def _tidy(parts: list[Path], whole: Path) -> None:
    for part in parts:
        receipt(part).unlink(missing_ok=True)
    journal(whole).unlink(missing_ok=True)


def _move_into(part: Path, target: Path, start: int, size: int, piece: int, bar: tqdm) -> None:
    """Moves the part to [start, start + size) of target from its end, and deletes it."""
    left = part.stat().st_size if part.exists() else 0
    if left > size:
        raise ArchiveError(f"{part}: {left} bytes, expected at most {size}: it was replaced while it was being joined")
    bar.update(size - left)
    if not part.exists():
        return
    with open(part, "r+b", buffering=0) as source, open(target, "r+b", buffering=0) as sink:
        while left:
            count = min(piece, left)
            for at in range(left - count, left, 1 << 22):
                data = os.pread(source.fileno(), min(1 << 22, left - at), at)
                if os.pwrite(sink.fileno(), data, start + at) != len(data):
                    raise ArchiveError(f"{target}: the disk is full; make room and run this again")
            os.fsync(sink.fileno())  # the bytes must be safe before their first copy goes
            left -= count
            os.ftruncate(source.fileno(), left)
            bar.update(count)
    part.unlink()


def check_members(archive: Path) -> list[zipfile.ZipInfo]:
    """The files in a zip. Raises ArchiveError where a name, a size or the layout is not that of an honest archive."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
    except (*DAMAGED, OSError) as error:
        raise ArchiveError(f"{archive}: not a whole zip archive ({error}): download it again") from None
    files, seen, end, total = [], set(), 0, 0
    for info in sorted(members, key=lambda member: member.header_offset):
        problem = _problem(info, end)
        if not problem and not info.is_dir():
            name = plain_name(info.filename)
            problem = "stands there twice" if name in seen else ""
            seen.add(name)
            files.append(info)
        if problem:
            raise ArchiveError(f"{archive}: member {info.filename!r} {problem}; nothing was extracted")
        end, total = info.header_offset + 30 + info.compress_size, total + info.file_size
    _check_folders(archive, files, seen)
    if total > LARGEST_RATIO * archive.stat().st_size:
        raise ArchiveError(
            f"{archive} would unpack to {total} bytes, over {LARGEST_RATIO} times its size; nothing was extracted"
        )
    return files


def plain_name(name: str) -> str:
    """A name as a file system sees it: `./a//B.wav` is `a/b.wav` (on some, letters differ in nothing but their size)."""
    return posixpath.normpath(name).casefold()


def _check_folders(archive: Path, files: list[zipfile.ZipInfo], names: set[str]) -> None:
    """Raises ArchiveError where a file stands where another has a folder."""
    for info in files:
        name = plain_name(info.filename)
        above = next((folder for folder in _folders(name) if folder in names), None)
        if above:
            raise ArchiveError(
                f"{archive}: member {info.filename!r} lies below the file {above!r}; nothing was extracted"
            )


def _folders(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


def _problem(info: zipfile.ZipInfo, end: int) -> str:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if problem := name_problem(info.orig_filename):
        return problem
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.header_offset < end:
        return "overlaps another member"
    if info.file_size > LARGEST_MEMBER:
        return f"has {info.file_size} bytes, more than any recording ({LARGEST_MEMBER})"
    return ""


def name_problem(name: str) -> str:
    """What is wrong with the name of an archive's member, or nothing."""
    if not name or not name.isprintable():
        return "has a name that does not print"
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name:
        return "leaves its folder"
    parts = name.split("/")
    if len(parts) > DEEPEST or len(name.encode()) > LONGEST_PATH or any(len(p.encode()) > LONGEST_NAME for p in parts):
        return f"has a name longer than file systems take ({len(parts) - 1} folders, {len(name.encode())} bytes)"
    return ""


def extract(archive: Path, out: Path, place: Callable[[str], str], *, workers: int = 8) -> int:
    """Unpacks a zip to out/place(member), leaves alone what is there; returns the number of files. Raises ArchiveError.

    Threads are enough: reading, inflating and fsync leave Python's lock, and a process would hold its own copy of the directory.
    """
    members = check_members(archive)
    _check_places(archive, [info.filename for info in members], place)
    need = sum(info.file_size for info in members if not (out / place(info.filename)).exists())
    _need_room(out, need, f"unpacking {archive.name}")
    cleaned = set()
    with zipfile.ZipFile(archive) as file, ThreadPoolExecutor(workers) as pool:
        jobs = (partial(_unpack, file, info, _home(out / place(info.filename), cleaned)) for info in members)
        for _ in tqdm(_bounded(pool, jobs, 8 * workers), f"unpack {archive.name}", len(members), unit=" files"):
            pass
    return len(members)


def _check_places(archive: Path, names: list[str], place: Callable[[str], str]) -> None:
    """Raises ArchiveError where two members would go to one file."""
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(plain_name(place(name)), name)
        if first != name:
            raise ArchiveError(f"{archive}: members {first!r} and {name!r} would be one file; nothing was extracted")


def _home(path: Path, cleaned: set) -> Path:
    """Makes the folder of a file, and rids it of what a killed run left there."""
    if path.parent not in cleaned:
        cleaned.add(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
    return path


def _unpack(file: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    if path.exists() and path.stat().st_size == info.file_size:
        return
    try:
        with file.open(info) as source, atomic_write(path) as sink:
            shutil.copyfileobj(source, sink, 1 << 20)  # checks the crc32 at its end
            if sink.tell() != info.file_size:
                raise zipfile.BadZipFile(f"{sink.tell()} bytes, expected {info.file_size}")
    except DAMAGED as error:
        raise ArchiveError(
            f"{file.filename}: member {info.filename!r} is damaged ({error}): download it again"
        ) from None
    except OSError as error:
        raise ArchiveError(
            f"{file.filename}: member {info.filename!r} cannot be written to {path} ({error.strerror}): correct that and run this again"
        ) from None


def _need_room(folder: Path, need: int, what: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ArchiveError(f"{what} needs {need / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are free: make room")


def _bounded(pool: Executor, jobs: Iterable[Callable], limit: int) -> Iterator:
    """Results of jobs in the order of completion, with at most `limit` waiting: a million futures take a gigabyte."""
    running, jobs = set(), iter(jobs)
    try:
        while True:
            running |= {pool.submit(job) for job in itertools.islice(jobs, limit - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        for future in running:
            future.cancel()


def convert(pairs: list[tuple[Path, Path]], *, workers: int = 2) -> list[str]:
    """Each (source, target): audio of any kind -> 16-bit mono WAV; targets that exist stay. Returns what failed, a line each.

    A process decodes BATCH files with one ffmpeg into temporary names, makes them durable and renames them.
    """
    if shutil.which("ffmpeg") is None:
        raise ArchiveError("ffmpeg is needed to read m4a and is not installed (Debian: apt-get install ffmpeg)")
    cleaned = set()
    todo = [(source, _home(target, cleaned)) for source, target in pairs if not target.exists()]
    batches = [todo[i : i + BATCH] for i in range(0, len(todo), BATCH)]
    failed = []
    with ProcessPoolExecutor(workers) as pool, tqdm(total=len(todo), desc="convert", unit=" files") as bar:
        for count, problems in _bounded(pool, (partial(_convert_batch, batch) for batch in batches), 4 * workers):
            bar.update(count)
            failed += problems
    return failed


def _convert_batch(batch: list[tuple[Path, Path]]) -> tuple[int, list[str]]:
    problem = _ffmpeg(batch)
    if not problem:
        return len(batch), []
    if len(batch) == 1:
        return 1, [f"{batch[0][0]}: {problem}"]
    return len(batch), [line for pair in batch for line in _convert_batch([pair])[1]]


def _ffmpeg(batch: list[tuple[Path, Path]]) -> str:
    """One ffmpeg for the whole batch; what it complains of, or nothing. Targets appear only if all is well."""
    command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-y"]
    form = ["-ac", "1", "-ar", str(RATE), "-c:a", "pcm_s16le", "-bitexact", "-f", "wav"]
    temporary = []
    try:
        for _, target in batch:
            fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
            temporary.append((fd, name))
            os.fchmod(fd, 0o644)
        for source, _ in batch:
            command += ["-threads", "1", "-i", f"file:{source}"]
        for i, (_, name) in enumerate(temporary):
            command += ["-map", f"{i}:a:0", *form, f"file:{name}"]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if result.returncode:
            lines = result.stderr.decode(errors="replace").strip().splitlines()
            return lines[-1] if lines else f"ffmpeg ended with {result.returncode}"
        for (_, target), (fd, name) in zip(batch, temporary):
            os.fsync(fd)
            os.replace(name, target)
    finally:
        for fd, name in temporary:
            os.close(fd)
            Path(name).unlink(missing_ok=True)
    return ""
