"""Fixtures: a small corpus of harmonic voices, packed once; the real recordings beside the repository where they are."""

import ctypes
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile

from launch.processes import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG
from shards.pack import pack

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
RATE = 16000


def needed(path: Path) -> Path:
    """What lies beside the repository. Where it is absent a test is skipped; in CI, which has it, the test fails."""
    if not path.exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{path} is not there, beside the repository")
    return path


@pytest.fixture(autouse=True)
def this_process_stays_itself():
    """A job's code makes its process handle TERM, adopt orphans and end with its parent; the tests behind it would, too."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    for kind in (PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG):
        ctypes.CDLL(None).prctl(kind, 0)


@pytest.fixture(scope="session")
def shared() -> Path:
    return needed(SHARED)


def voice(speaker: int, utterance: int, seconds: float) -> np.ndarray:
    """A harmonic sound with the speaker's pitch and tilt, int16."""
    generator = np.random.default_rng([speaker, utterance])
    t = np.arange(round(seconds * RATE)) / RATE
    pitch = 90 + 17 * speaker + 5 * np.sin(2 * np.pi * generator.uniform(1, 3) * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    x = sum(np.sin(k * phase + generator.uniform(0, 6)) / k ** (1 + speaker % 3 / 2) for k in range(1, 12))
    x = 0.2 * x * (1 + 0.5 * np.sin(2 * np.pi * 4 * t)) + 0.02 * generator.standard_normal(len(t))
    return (np.clip(x / 3, -1, 1) * 32767).astype(np.int16)


def write_corpus(folder: Path, speakers: int, utterances: int) -> Path:
    """WAVs, train_list.txt (all) and test_list.txt (cross-utterance trials with both answers)."""
    lines, names = [], {}
    for s in range(speakers):
        for u in range(utterances):
            name = f"id{s:05d}/session{u % 2}/{u:05d}.wav"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, voice(s, u, 0.6 + 0.1 * ((s + u) % 5)), RATE, subtype="PCM_16")
            lines.append(f"id{s:05d} {name}")
            names[s, u] = name
    (folder / "train_list.txt").write_text("\n".join(lines) + "\n")
    pairs = [(int(a == b), names[a, 0], names[b, 1]) for a in range(speakers) for b in range(speakers)]
    (folder / "test_list.txt").write_text("".join(f"{t} {a} {b}\n" for t, a, b in pairs))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Folder with 12 speakers x 5 utterances of 0.6 to 1.0 s: WAVs, lists, and `shards/`, the same packed."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"), speakers=12, utterances=5)
    rows = [line.split() for line in (folder / "train_list.txt").read_text().splitlines()]
    entries = [(speaker, path.removesuffix(".wav"), folder / path) for speaker, path in rows]
    pack(entries, folder / "shards", shard_bytes=2**19, progress=False)
    return folder


@pytest.fixture
def options(corpus):
    return tiny_options(corpus)


def tiny_options(corpus: Path) -> list[str]:
    """Words of a tiny training command on the corpus: a quarter of ResNetSE34L's channels, 0.5 s crops, N=8, M=2."""
    return (
        f"--data.train_shards {corpus}/shards --data.speakers_per_batch 8 --data.crop_seconds 0.5 --data.workers 0"
        " --model.width 0.25 --model.embedding_size 32 --train.precision float64 --log.every_steps 1"
        " --log.tensorboard false --train.threads 1"
    ).split()


@pytest.fixture(scope="session")
def noise_and_rir(tmp_path_factory) -> tuple[Path, Path]:
    """Packed noise (categories noise, music, speech) and impulse responses."""
    folder = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(5)
    entries = {"noise": [], "rir": []}
    for kind in ("noise", "music", "speech", "rir"):
        for i in range(4):
            seconds = 0.3 if kind == "rir" else 0.4 + 0.4 * i
            x = generator.standard_normal(round(seconds * RATE))
            if kind == "rir":
                x = x * np.exp(-np.arange(len(x)) / 800)
                x[3 * i] = 5
            path = folder / f"{kind}{i}.wav"
            soundfile.write(path, x / np.abs(x).max() * 0.9, RATE, subtype="PCM_16")
            entries["rir" if kind == "rir" else "noise"].append((kind, f"{kind}/{i}", path))
    for name, rows in entries.items():
        pack(rows, folder / f"{name}_shards", progress=False)
    return folder / "noise_shards", folder / "rir_shards"
