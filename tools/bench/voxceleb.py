"""From VoxCeleb's parts to usable audio: this package's way beside voxceleb_trainer's, in time and in disk, as ratios of one run.

There: `cat` the parts, unzip everything, one ffmpeg a file, one after the other. Here: join in place, decode out of the zip into shards. The
corpus is made up, in the real layout (parts of a zip of AAC files), so ffmpeg is needed. The disk is looked at every 20 ms.

    spknet bench voxceleb --files 240 --workers 2
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from tools import synth
from tools.bench.table import Row
from tools.voxceleb import __main__ as voxceleb
from tools.voxceleb.files import ARCHIVES


def make_aac(folder: Path, speakers: int, utterances: int, seconds: float) -> list[Path]:
    """folder/id00012/21Uxsk56VDQ/00001.m4a and so on: made-up speech, 64 kbit/s AAC, mono, 16 kHz."""
    paths, inputs, outputs = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for s in range(speakers):
            rng = np.random.default_rng([7, s])
            voice, session = synth.draw_speaker(rng), synth.draw_session(rng)
            for u in range(utterances):
                wave = Path(scratch) / f"{s}-{u}.wav"
                soundfile.write(wave, synth.draw_utterance(voice, session, seconds, rng), synth.RATE)
                path = folder / f"id{12 + s:05d}" / f"session{u % 2:04d}" / f"{1 + u // 2:05d}.m4a"
                path.parent.mkdir(parents=True, exist_ok=True)
                inputs += ["-i", str(wave)]
                outputs += ["-map", str(len(paths) % 20), "-c:a", "aac", "-b:a", "64k", str(path)]
                paths.append(path)
                if len(paths) % 20 == 0 or len(paths) == speakers * utterances:
                    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *inputs, *outputs], check=True)
                    inputs, outputs = [], []
    return paths


def make_parts(folder: Path, name: str, files: dict[str, bytes], parts: int) -> list[str]:
    """The zip of an ARCHIVES entry in `parts` pieces (1: whole) in folder; returns its lines `md5  name`."""
    archive = ARCHIVES[name]
    whole = folder / archive.zip
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as file:
        for member, content in files.items():
            file.writestr(archive.inside + member, content)
    data = whole.read_bytes()
    lines = [f"{hashlib.md5(data).hexdigest()}  {archive.zip}"]
    if parts == 1:
        return lines
    whole.unlink()
    size = -(-len(data) // parts)
    for i in range(parts):
        part, piece = f"{archive.zip[:-4]}_parta{chr(97 + i)}", data[i * size : (i + 1) * size]
        (folder / part).write_bytes(piece)
        lines.append(f"{hashlib.md5(piece).hexdigest()}  {part}")
    return lines


class DiskWatch:
    """Largest number of bytes that a folder took while this was open."""

    def __init__(self, folder: Path):
        self.folder, self.peak, self.done = folder, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, used(self.folder))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, used(self.folder))


def used(folder: Path) -> int:
    """Bytes of all files below a folder, as allocated."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # renamed since it was listed
    return total


def trainer_way(folder: Path) -> None:
    """What voxceleb_trainer's dataprep.py does with the parts, without its shells."""
    parts = sorted(folder.glob("vox2_dev_aac_part*"))
    whole = folder / "vox2_dev_aac.zip"
    with open(whole, "wb") as sink:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, sink, 1 << 20)
    with open(whole, "rb") as file:
        hashlib.file_digest(file, "md5") if hasattr(hashlib, "file_digest") else hashlib.md5(file.read())
    for part in parts:
        part.unlink()
    with zipfile.ZipFile(whole) as file:
        file.extractall(folder)
    for path in sorted(folder.rglob("*.m4a")):
        command = ["ffmpeg", "-y", "-v", "error", "-i", str(path), "-ac", "1", "-vn", "-acodec", "pcm_s16le"]
        subprocess.run([*command, "-ar", "16000", str(path.with_suffix(".wav"))], check=True, stdin=subprocess.DEVNULL)


def our_way(folder: Path, workers: int) -> None:
    options = ["--save_path", str(folder), "--checksums", str(folder / "checksums.txt"), "--workers", str(workers)]
    size = sum(path.stat().st_size for path in folder.glob("vox2_dev_aac_part*"))
    if voxceleb.main(["pack", *options, "--shard-bytes", str(max(1 << 20, size))]):
        raise RuntimeError("packing did not end well")


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--files", type=int, default=240, help="made-up utterances (240)")
    p.add_argument("--seconds", type=float, default=8.0, help="length of an utterance; VoxCeleb2 has 7.8 on average")
    p.add_argument("--workers", type=int, default=2, help="processes (2)")


def rows(options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        speakers = max(4, options.files // 20)
        paths = make_aac(made, speakers, options.files // speakers, options.seconds)
        files = {str(path.relative_to(made)): path.read_bytes() for path in paths}
        shutil.rmtree(made)
        results = {}
        for name in ("trainer", "here"):
            folder = Path(scratch) / name
            folder.mkdir()
            lines = make_parts(folder, "vox2_dev", files, parts=8)
            (folder / "checksums.txt").write_text("\n".join(lines) + "\n")
            archive = used(folder)
            begin = time.perf_counter()
            with DiskWatch(folder) as watch:
                trainer_way(folder) if name == "trainer" else our_way(folder, options.workers)
            seconds = time.perf_counter() - begin
            result = sum(used(path) for path in [folder / "shards"]) if name == "here" else _waves(folder)
            results[name] = seconds, watch.peak, archive, result
    yield from report(results, len(files))


def _waves(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*.wav"))


def report(results: dict[str, tuple], files: int) -> Iterator[Row]:
    """Speed, and the disk at its fullest: in all, and beyond the archive and the result in percent of the archive."""
    (slow, their_peak, _, _), (seconds, peak, _, _) = results["trainer"], results["here"]
    for name, (_, most, archive, result) in results.items():
        yield Row(f"{name}, disk beyond archive and result", 100 * (most - archive - result) / archive, "% of archive")
    yield Row("here", files / seconds, "files/s", slow / seconds, "voxceleb_trainer's way")
    yield Row("here, disk at its fullest", peak / 1e6, "MB", peak / their_peak, "voxceleb_trainer's way")
