"""Packs a corpus of `speaker path` lines into tars with an index: parallel, resumable, the same bytes whatever happens in between.

Each tar is written by one process under a temporary name, hashed while it is written, made durable and renamed; then its part file,
the commit record, the same way. A tar whose part agrees with the plan and whose size agrees with the part is kept when
the command runs again. The index is made from the parts (shards.parts.merge), index.json last.

Usage: spknet pack --list train_list.txt --root voxceleb2/dev/wav --out data/shards/vox2 --workers 8
       spknet pack ... --task 3/16      (each on its own machine), then: spknet pack --out OUT --merge
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards import audio, errors, format, index, lists, parts, plan, report
from shards.archive import read_source
from shards.claim import only_writer, room
from shards.commands import Parser, command
from shards.format import BLOCK, ROW, ShardError

TICK = 32  # utterances between two reports of a worker


@dataclass
class Job:
    """One tar to write: its utterances in the order of the tar."""

    out: Path
    shard: int
    digest: str
    settings: plan.Settings
    keys: list[bytes]
    sources: list[str]
    where: np.ndarray  # (n,) LOCATION
    skip_bad: bool


@dataclass
class Options:
    """How to pack."""

    seed: int = 0  # of the order of speakers and utterances
    shard_bytes: int = 2**30  # about the size of a tar
    codec: str = "wav"  # or flac
    convert: bool = False  # average channels, resample and round what needs it
    workers: int = 1  # processes
    append: bool = False  # add to what is packed
    skip_bad: str | Path | None = None  # where to list audio left out as missing or unreadable; None: it is an error
    sample_rate: int = 16000  # Hz
    progress: bool = True  # a bar on stderr
    task: tuple[int, int] | None = None  # (i, n): the tars i, i + n, ... alone, no index: parts.merge(out) makes it

    def settings(self) -> plan.Settings:
        return plan.Settings(self.sample_rate, self.codec, self.convert, self.seed, self.shard_bytes)


def pack(entries: Iterable[tuple[str, str, str]], out: str | Path, **options) -> int:
    """Packs (speaker, key, source) triples into OUT; returns the number of utterances that this call wrote.

    source: a path, `ARCHIVE.zip::member` or `ARCHIVE.tar::member`; options: the fields of Options.
    Raises ShardError on bad names, missing or unreadable audio (unless skip_bad is given), a full disk; running the same call
    again goes on where it stopped.
    """
    given, out = Options(**options), Path(out)
    _check_options(given, out)
    leave_out, task = given.skip_bad is not None, given.task
    if leave_out:
        check_skip_bad(given.skip_bad, getattr(entries, "path", None))
    listed = plan.make_entries(entries, given.progress)
    with room(out), only_writer(out, shared=task is not None) as alone:
        settings = parts.generation_to_write(out, listed, given.settings(), given.append)
        made = plan.make_plan(listed, out, settings, leave_out, alone)
        numbers = [s for s in range(made.n_shards) if task is None or s % task[1] == task[0]]
        todo = [s for s in numbers if not _is_done(out, s, made, leave_out)]
        written = _run(_jobs(out, made, todo, leave_out), _count(made, todo), len(todo), given.workers, given.progress)
        if task is None and (todo or leave_out or not _is_merged(out, made)):
            parts.merge(out, given.skip_bad)
    return written


def _check_options(given: Options, out: Path) -> None:
    if given.codec not in format.CODECS:
        raise ShardError(f"codec {given.codec!r}: expected wav or flac")
    if not audio.LOWEST_RATE <= given.sample_rate <= audio.HIGHEST_RATE:
        lowest, highest = audio.LOWEST_RATE, audio.HIGHEST_RATE
        raise ShardError(f"a rate of {given.sample_rate} Hz: expected {lowest} to {highest} Hz")
    if given.shard_bytes < 1 or given.seed < 0:
        raise ShardError(
            f"a tar size of {given.shard_bytes} bytes, seed {given.seed}: expected at least 1 byte and a seed from 0 on"
        )
    if out.exists() and not out.is_dir():
        raise ShardError(f"{out} is a file, expected the folder of a packed data set; give another --out")


def check_skip_bad(path: str | Path, list_path: str | Path | None) -> None:
    """Raises ShardError where the list of bad files would overwrite something else than an earlier one."""
    format.refuse_overwriting(path, {"list": list_path})
    if os.path.exists(path):
        lines = format.read_bytes(path).decode("utf-8", "replace").splitlines()
        if any(line.count("\t") != 2 for line in lines):
            raise ShardError(f"--skip-bad {path} exists and is no list of bad files; give another name")


def _is_merged(out: Path, made: plan.Plan) -> bool:
    try:
        return len(index.read_meta(out)["shardlist"]) >= made.settings.first_shard + made.n_shards
    except ShardError:
        return False


def _count(made: plan.Plan, todo: list[int]) -> int:
    return int(np.isin(made.shard, todo).sum())


def _jobs(out: Path, made: plan.Plan, todo: list[int], skip_bad: bool) -> Iterable[Job]:
    entries, settings = made.entries, made.settings
    where = made.where
    if where is None:
        chosen = np.flatnonzero(np.isin(made.shard, todo))
        where = np.zeros(len(entries.keys), plan.archive.LOCATION)
        where[chosen] = plan.locate(entries, chosen, skip_bad)
    by_shard = np.argsort(made.shard, kind="stable")
    bounds = np.searchsorted(made.shard[by_shard], np.arange(made.n_shards + 1))
    for s in todo:
        rows = by_shard[bounds[s] : bounds[s + 1]].tolist()
        keys = {i: bytes(entries.keys[i]) for i in rows}
        rows.sort(key=lambda i: (plan.keyed_hash(settings.seed, keys[i]), keys[i]))
        sources = [entries.source(i) for i in rows]
        number = settings.first_shard + s
        yield Job(out, number, made.digest, settings, [keys[i] for i in rows], sources, where[rows], skip_bad)


def _is_done(out: Path, shard: int, made: plan.Plan, skip_bad: bool) -> bool:
    number = made.settings.first_shard + shard
    try:
        part = parts.read_part(out, number)
        size = os.stat(out / index.tar_name(number)).st_size
    except (ShardError, FileNotFoundError):
        return False
    if part.is_converted() and not made.settings.convert:
        return False  # packed with --convert, and now without: to be refused
    return part.digest == made.digest and part.filesize == size and (skip_bad or not len(part.skipped))


def _run(jobs: Iterable[Job], total: int, n_jobs: int, workers: int, progress: bool) -> int:
    """Utterances written, without those that were left out."""
    every = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=total, desc="packing", unit=" utterances", mininterval=every, disable=not progress) as bar:
        if workers <= 1 or n_jobs <= 1:
            return sum(write_shard(job, bar.update) for job in jobs)
        return _run_pool(jobs, min(workers, n_jobs), bar)


def _run_pool(jobs: Iterable[Job], workers: int, bar: tqdm) -> int:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
        running, written = set(), 0
        try:
            for job in jobs:
                running.add(pool.submit(_in_worker, job))
                while len(running) >= 2 * workers:
                    written += _collect(running, counter, bar)
            while running:
                written += _collect(running, counter, bar)
            return written
        except BrokenProcessPool:
            raise ShardError("a packing worker was killed (out of memory?); run the same command again") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _collect(running: set, counter, bar: tqdm) -> int:
    """Waits for some, takes them out of `running`; utterances that they wrote."""
    done = wait(running, 0.5, FIRST_COMPLETED).done
    bar.update(counter.value - bar.n)
    running -= done
    return sum(future.result() for future in done)


_progress = None


def _start_worker(counter) -> None:
    global _progress
    _progress = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # A pool's workers outlive a killed parent: they would go on writing while the resumed pack does.
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _in_worker(job: Job) -> int:
    def report(n: int) -> None:
        with _progress.get_lock():
            _progress.value += n

    return write_shard(job, report)


def write_shard(job: Job, progress) -> int:
    """Writes one tar and its part file; returns its utterances. progress(n) is called for every few of them."""
    name = index.tar_name(job.shard)
    with room(job.out):
        format.remove_leftovers(job.out, name)
        rows, keys, skipped, notes = np.zeros(len(job.keys), ROW), [], [], []
        digest, offset = hashlib.sha256(), 0
        head = None
        with format.atomic_write(job.out / name) as file:
            for i, (key, source, data) in enumerate(zip(job.keys, job.sources, _decoded(job))):
                if i % TICK == TICK - 1:
                    progress(TICK)
                if isinstance(data, ShardError):
                    if not job.skip_bad:
                        raise ShardError(f"{data} (or leave it out with --skip-bad FILE)")
                    skipped.append((key.decode(), source, str(data)))
                    continue
                notes += [(key.decode(), word, detail) for word, detail in data.notes.items()]
                chunk = _members(key, data.pcm, job.settings, rows[len(keys)], offset)
                file.write(chunk)
                digest.update(chunk)
                head = head or chunk[:BLOCK]
                offset += len(chunk)
                keys.append(key)
            file.write(format.TAR_END)
            digest.update(format.TAR_END)
            identity = digest.hexdigest()
            file.write(format.identity_block(identity))
            digest.update(format.identity_block(identity))
        progress(len(job.keys) % TICK)
        head_crc32 = zlib.crc32(head or format.TAR_END[:BLOCK])
        rows["shard"] = job.shard
        size = offset + len(format.TAR_END) + BLOCK
        facts = (size, digest.hexdigest(), head_crc32, job.digest, skipped, identity, notes)
        parts.write_part(job.out, job.shard, parts.Part(rows[: len(keys)], keys, *facts))
    return len(keys)


def _decoded(job: Job) -> Iterator[audio.Decoded | ShardError]:
    def read(i: int) -> bytes:
        return read_source(job.sources[i], job.where[i])

    return audio.decode_ahead(job.sources, read, job.settings.sample_rate, job.settings.convert)


def _members(key: bytes, pcm, settings: plan.Settings, row: np.void, offset: int) -> bytes:
    """The two members of an utterance, and its row filled in. offset: where they begin in the tar, bytes."""
    speaker = key.split(b"/", 1)[0]
    head = format.tar_header(key + b".spk", len(speaker)) + speaker + format.padding(len(speaker))
    if settings.codec == "wav":
        riff, payload = format.wav_header(len(pcm) // 2, settings.sample_rate), pcm
    else:
        riff, payload = b"", audio.encode_flac(pcm, settings.sample_rate)
    size = len(riff) + len(payload)
    row["offset"] = offset + len(head) + BLOCK + len(riff)
    row["nbytes"] = len(payload)
    row["samples"] = len(pcm) // 2
    row["crc32"] = zlib.crc32(payload)
    row["key_check"] = format.crc16(key)
    name = key + b"." + settings.codec.encode()
    return b"".join([head, format.tar_header(name, size), riff, payload, format.padding(size)])


def parse_task(text: str) -> tuple[int, int]:
    """`3/16` -> (3, 16). Raises ShardError unless 0 <= i < n."""
    numbers = text.split("/")
    if len(numbers) != 2 or not all(n.isascii() and n.isdigit() for n in numbers) or int(numbers[0]) >= int(numbers[1]):
        raise ShardError(f"--task {text}: expected i/n with i from 0 to n - 1, for instance 0/16")
    return int(numbers[0]), int(numbers[1])


def parser() -> Parser:
    p = Parser(command("pack"), description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--list", help="lines `speaker path`; path may be ARCHIVE.zip::member or ARCHIVE.tar::member")
    p.add_argument("--root", default=".", help="folder that the paths start from")
    p.add_argument("--out", required=True, help="folder of the packed data set")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    p.add_argument("--codec", choices=format.CODECS, default="wav", help="flac: about half the size, far slower crops")
    p.add_argument(
        "--convert", action="store_true", help="average channels, resample and round to 16 bits what needs it"
    )
    p.add_argument("--sample-rate", type=int, default=16000, help="Hz")
    p.add_argument("--shard-bytes", type=int, default=2**30, help="about the size of a tar")
    p.add_argument("--seed", type=int, default=0, help="of the order of speakers and utterances")
    p.add_argument("--append", action="store_true", help="add new speakers and utterances to OUT; labels stay")
    p.add_argument(
        "--skip-bad", metavar="FILE", help="leave unreadable audio out and list it, with the reason, in FILE"
    )
    p.add_argument("--task", metavar="I/N", help="write only every N-th tar, from the I-th; --merge when all are done")
    p.add_argument("--merge", action="store_true", help="make the index of OUT from its parts")
    p.add_argument(
        "--report",
        metavar="FILE.txt",
        help="write what was converted, clipped, silent, cancelled, too short, left out; FILE.json beside it",
    )
    p.add_argument("--report-crop", type=float, default=0.0, metavar="SECONDS", help="name what is shorter than this")
    return p


@errors.told
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    out = Path(args.out)
    if args.report is not None:
        report.check_paths(args.report, {"list": args.list, "list of bad files": args.skip_bad})
        if args.task:
            raise ShardError("--report is written when all tasks are done: give it with --merge")
    if not 0 <= args.report_crop < 1e6:
        raise ShardError(f"--report-crop {args.report_crop}: expected seconds, for instance 2")
    if args.merge:
        if args.skip_bad is not None:
            check_skip_bad(args.skip_bad, args.list)
        if not (out / "parts").is_dir():
            raise ShardError(f"{out}/parts is not there; pack something first")
        with only_writer(out):
            parts.merge(out, args.skip_bad)
    else:
        _main_pack(args)
    if not args.task:
        made = report.collect(out, args.report_crop)
        print(made.totals())
        if args.report is not None:
            report.write(made, args.report)


def _main_pack(args: argparse.Namespace) -> None:
    if args.list is None:
        raise ShardError("--list is missing: a file of lines `speaker path` (or --merge, to make the index only)")
    task = parse_task(args.task) if args.task else None
    names = ("seed", "shard_bytes", "codec", "convert", "workers", "append", "skip_bad", "sample_rate")
    options = {name: getattr(args, name) for name in names}
    listed = lists.read_list(args.list, args.root)
    written = pack(listed, args.out, task=task, **options)
    for remark in listed.remarks():
        print(remark)
    if written:
        print(f"{args.out}: {written} utterances written")
    elif task and (share := _share_problem(Path(args.out), task)):
        print(f"{args.out}: {share}")
    else:
        print(f"{args.out}: everything was packed already")


def _share_problem(out: Path, task: tuple[int, int]) -> str:
    """What to say of a task beyond the last tar; empty where it has tars."""
    tars = plan.read_record(parts.records(out)[-1]).n_shards
    return "" if task[0] < tars else f"no tar for task {task[0]}/{task[1]}: there are {tars} tars, one a task at most"


if __name__ == "__main__":
    sys.exit(main())
