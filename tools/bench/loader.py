"""How fast crops come out of shards, and what the index costs: every figure beside what it is compared with, in one run.

crops     random 2 s crops a second: the reader; whole files read with soundfile and cut (voxceleb_trainer's way); a bare
          loop of os.preadv into a preallocated array; FLAC shards; the whole DataLoader with one worker
packing   bytes a second beside `cp` and `sha256sum` of the same files; memory of the list per utterance
index     a synthetic index (no tars) of --index-rows rows: opening, memory of a further worker, rows of a batch of 512,
          the sampler's plan of an epoch

spknet bench loader --index-rows 1092009 10000000
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from shards import format, index, plan
from shards.pack import pack
from shards.reader import Utterances, open_shards
from tools.bench.table import Row, beside, in_turn

RATE = 16000
CROP = 2 * RATE  # samples
BATCH = 256
BATCHES = 8


def best(function, seconds: float = 2.0) -> float:
    """The least seconds of one call, over at least three calls and `seconds` in all."""
    times = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def write_wav(path: Path, samples: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(format.wav_header(len(samples), RATE) + samples.astype("<i2").tobytes())


def make_wavs(folder: Path, utterances: int, speakers: int) -> list[tuple[str, str, str]]:
    """Noise of 4 to 12 s in WAV files; (speaker, key, path) of each."""
    rng = np.random.default_rng(0)
    entries = []
    for i in tqdm(range(utterances), "noise", unit=" files", delay=5):
        key = f"id{i % speakers:05d}/a/{i:05d}"
        path = folder / f"{key}.wav"
        # Speech-like enough for FLAC: a random walk is compressed to about half, as VoxCeleb is.
        steps = rng.normal(0, 300, int(rng.integers(4 * RATE, 12 * RATE)))
        write_wav(path, np.convolve(steps, np.ones(8), "same"))
        entries.append((key.split("/")[0], key, str(path)))
    return entries


def draw(utterances: Utterances, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(utterances), n)
    spare = utterances.samples[rows].astype(np.int64) - CROP
    return rows, (rng.random(n) * (spare + 1)).astype(np.int64)


def whole_files(paths: list[str], starts: np.ndarray, out: np.ndarray) -> None:
    """voxceleb_trainer's loading: the whole file with soundfile (float64), then the crop, as float32."""
    for i, (path, start) in enumerate(zip(paths, starts.tolist())):
        audio, _ = soundfile.read(path)
        out[i] = audio[start : start + CROP]


def bare_preadv(fds: list[int], offsets: list[int], out: np.ndarray) -> None:
    target, nbytes = memoryview(out.reshape(-1)).cast("B"), 2 * CROP
    for i, (fd, offset) in enumerate(zip(fds, offsets)):
        os.preadv(fd, (target[i * nbytes : (i + 1) * nbytes],), offset)


def bench_crops(folder: Path, entries: list, seconds: float) -> Iterator[Row]:
    pack(entries, folder / "wav", shard_bytes=2**26, progress=False)
    pack(entries, folder / "flac", shard_bytes=2**26, codec="flac", progress=False)
    wav, flac = open_shards(folder / "wav"), open_shards(folder / "flac")
    path_of = {key: path for _, key, path in entries}
    opened = index.open_index(folder / "wav")
    fds = [os.open(folder / "wav" / index.tar_name(i), os.O_RDONLY) for i in range(len(opened.tars))]
    batches = []
    for seed in range(BATCHES):
        rows, starts = draw(wav, BATCH, seed)
        table = opened.rows[rows]
        places = [fds[shard] for shard in table["shard"].tolist()]
        offsets = (table["offset"] + 2 * starts.astype(np.uint64)).tolist()
        batches.append((rows, starts, places, offsets, [path_of[wav.key(row)] for row in rows.tolist()]))
    out, floats = np.empty((BATCH, CROP), np.int16), np.empty((BATCH, CROP), np.float32)
    ways = {
        "reader, WAV shards": lambda rows, starts, places, offsets, paths: wav.read_batch(rows, starts, out),
        "bare os.preadv": lambda rows, starts, places, offsets, paths: bare_preadv(places, offsets, out),
        "whole files, soundfile": lambda rows, starts, places, offsets, paths: whole_files(paths, starts, floats),
        "reader, FLAC shards": lambda rows, starts, places, offsets, paths: flac.read_batch(rows, starts, out),
    }
    speed = crops_per_second(ways, batches, seconds)
    for fd in fds:
        os.close(fd)
    yield from beside(speed, "crops/s/core")
    size = {name: sum(path.stat().st_size for path in (folder / name).glob("*.tar")) for name in ("wav", "flac")}
    yield Row("FLAC shards of this noise", size["flac"] / 1e6, "MB", size["flac"] / size["wav"], "WAV shards")


def crops_per_second(ways: dict, batches: list, seconds: float) -> dict[str, float]:
    """Crops a second of a core's own time for each way. The batches differ, or the CPU's cache would serve them."""
    of_batch = {name: lambda i, way=way: way(*batches[i % len(batches)]) for name, way in ways.items()}
    return {name: BATCH / value for name, value in in_turn(of_batch, seconds * len(ways))[0].items()}


def bench_dataloader(folder: Path, seconds: float) -> Iterator[Row]:
    """The whole DataLoader (one worker process, int16 batch of 256) beside the reader alone on the same rows, both per core."""
    from spknet.data.batches import Batches
    from spknet.data.corpus import Corpus
    from spknet.options import parse
    from spknet.parallel.ranks import Ranks

    words = ["--data.train_shards", str(folder / "wav"), "--data.speakers_per_batch", str(BATCH // 2)]
    config = parse([*words, "--data.workers", "1", "--data.max_utterances_per_speaker", "1000000"])
    corpus = Corpus.open(config.data, 0)
    me = Ranks()
    drawn = [draw(corpus.utterances, BATCH, seed) for seed in range(BATCHES)]
    out = np.empty((BATCH, CROP), np.int16)
    ways = {"reader": lambda rows, starts: corpus.utterances.read_batch(rows, starts, out)}
    alone = crops_per_second(ways, drawn, seconds)["reader"]
    # Two lengths: the difference is without the worker's start.
    few, many = round(seconds * 30), round(seconds * 150)
    own, wall = [], []
    for steps in (few, many):
        before, start = children_seconds(), time.perf_counter()
        with Batches(config, corpus, me, 0, steps) as batches:
            for _ in range(steps):
                next(batches)
        wall.append(time.perf_counter() - start)
        own.append(children_seconds() - before)
    crops = BATCH * (many - few)
    each, overall = crops / (own[1] - own[0]), crops / (wall[1] - wall[0])
    yield Row("DataLoader, 1 worker", each, "crops/s/core", each / alone, "the reader")
    yield Row("DataLoader, 1 worker", overall, "crops/s")


def children_seconds() -> float:
    """CPU seconds of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bench_packing(folder: Path, entries: list) -> Iterator[Row]:
    paths = [path for _, _, path in entries]
    size = sum(os.stat(path).st_size for path in paths)

    names = "\0".join(paths).encode()

    def copy_and_sum() -> None:
        shutil.rmtree(folder / "copy", ignore_errors=True)
        (folder / "copy").mkdir()
        copy = ["xargs", "-0", "cp", "--parents", "-t", str(folder / "copy")]
        subprocess.run(copy, input=names, check=True)
        subprocess.run(["xargs", "-0", "sha256sum"], input=names, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["sync", "-f", str(folder / "copy")], check=True)

    def pack_all() -> None:
        shutil.rmtree(folder / "packed", ignore_errors=True)
        pack(entries, folder / "packed", shard_bytes=2**26, progress=False)

    used = {"pack": [], "cp, sha256sum, sync": []}
    for _ in range(3):
        for name, function, clock in (
            ("pack", pack_all, time.process_time),
            ("cp, sha256sum, sync", copy_and_sum, children_seconds),
        ):
            start, started = clock(), time.perf_counter()
            function()
            used[name].append((clock() - start, time.perf_counter() - started))
    (ours, ours_wall), (theirs, theirs_wall) = (np.min(values, axis=0) for values in used.values())
    yield Row("pack, 1 process", size / ours / 1e6, "MB/s/core", theirs / ours, "cp, sha256sum, sync")
    yield Row("pack, with the disk", size / ours_wall / 1e6, "MB/s", theirs_wall / ours_wall, "cp, sha256sum, sync")
    peaks = []
    for n in (10000, 50000):
        tracemalloc.start()
        plan.make_entries(_fake_list(n))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    yield Row("packing, memory of an utterance of VoxCeleb2", (peaks[1] - peaks[0]) / 40000, "bytes")


def _fake_list(n: int):
    for i in range(n):
        key = f"id{i // 180:05d}/21Uxsk56VDQ/{i % 180:05d}"
        yield key[:7], key, f"/data/voxceleb2/dev/aac/{key}.m4a"


def synthetic_index(out: Path, n: int, utterances_per_speaker: int = 182) -> None:
    """An index of n rows in tars of 4,000 utterances that do not exist, with the lengths of VoxCeleb2."""
    rng = np.random.default_rng(0)
    numbers = np.arange(n)
    speaker = numbers // utterances_per_speaker
    keys = np.empty(n, "S25")
    octets = keys.view(np.uint8).reshape(n, 25)
    octets[:] = np.frombuffer(b"id0000000/abcdefghijk/000", np.uint8)
    for digit in range(7):
        octets[:, 8 - digit] = 48 + speaker // 10**digit % 10
    for digit in range(3):
        octets[:, 24 - digit] = 48 + numbers % utterances_per_speaker // 10**digit % 10
    rows = np.zeros(n, format.ROW)
    rows["samples"] = rng.integers(4 * RATE, 12 * RATE, n)
    rows["nbytes"] = 2 * rows["samples"]
    per_tar = 4000
    rows["shard"] = numbers // per_tar
    rows["offset"] = 1580 + numbers % per_tar * (24 * RATE + 2048)
    for a in range(0, n, 1 << 18):
        rows["key_check"][a : a + (1 << 18)] = [format.crc16(key) for key in keys[a : a + (1 << 18)].tolist()]
    counts = np.bincount(rows["shard"])
    tars = np.zeros(len(counts), format.TAR)
    tars["nsamples"], tars["filesize"] = counts, 2**31
    out.mkdir(parents=True, exist_ok=True)
    identities = np.zeros(len(counts), "V32")
    index.write_index(out, index.Contents(rows, keys, tars, identities, plan.Settings(), 0, []))


def private_bytes() -> int:
    """Memory that only this process has, in bytes (Private_* of /proc/self/smaps_rollup)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def _worker(out: str, queue) -> None:
    before = private_bytes()
    utterances = open_shards(out)
    rng = np.random.default_rng(os.getpid())
    for _ in range(200):
        utterances._rows(rng.integers(0, len(utterances), 512))
    queue.put(private_bytes() - before)


def bench_index(folder: Path, n: int) -> Iterator[Row]:
    out = folder / f"index-{n}"
    print(f"index {n:,}: writing it", file=sys.stderr)
    synthetic_index(out, n)
    opening = best(lambda: open_shards(out), 0.5)
    utterances = open_shards(out)
    checked = int(utterances.samples.sum(dtype=np.int64))  # touches every page, as the workers of an epoch do
    rng = np.random.default_rng(0)
    rows = rng.integers(0, n, 512)
    lookup = best(lambda: utterances._rows(rows), 0.5)
    queue = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=_worker, args=(str(out), queue))
    child.start()
    extra = queue.get(timeout=600)
    child.join()
    yield Row(f"index {n:,}: opening", 1000 * opening, "ms")
    yield Row(f"index {n:,}: audio", checked / RATE / 3600, "h")
    yield Row(f"index {n:,}: a further worker", extra / 1e6, "MB")
    yield Row(f"index {n:,}: 512 random rows", 1000 * lookup, "ms")
    yield from bench_sampler(utterances, n)
    shutil.rmtree(out)


def bench_sampler(utterances: Utterances, n: int) -> Iterator[Row]:
    from spknet.data.sampler import Sampler

    def planned() -> None:
        Sampler(utterances.speaker_rows, speakers_per_batch=200, utterances_per_speaker=2, cap=500, seed=0).plan(1)

    yield Row(f"index {n:,}: plan of an epoch (N=200, M=2)", best(planned, 0.5), "s")


def add_options(p: argparse.ArgumentParser) -> None:
    sizes = [1092009, 10000000]
    p.add_argument("--index-rows", type=int, nargs="*", default=sizes, help="sizes of the synthetic indexes")
    p.add_argument("--utterances", type=int, default=1024, help="noises of 4 to 12 s for crops and packing")
    p.add_argument("--seconds", type=float, default=2.0, help="time of each measurement")
    p.add_argument("--folder", help="where to work; default: the temporary folder")
    p.add_argument("--only", choices=("crops", "packing", "index"), help="only this part")


def rows(chosen: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        if chosen.only != "index":
            entries = make_wavs(folder / "files", chosen.utterances, speakers=BATCH)
        if chosen.only in (None, "crops"):
            yield from bench_crops(folder, entries, chosen.seconds)
            yield from bench_dataloader(folder, chosen.seconds)
        if chosen.only in (None, "packing"):
            yield from bench_packing(folder, entries)
        for n in chosen.index_rows if chosen.only in (None, "index") else []:
            yield from bench_index(folder, n)
