"""A small corpus of distinct noises for the shard tests, and the first thing to know of a pack: every sample is kept."""

import wave
from pathlib import Path

import numpy as np

from shards.pack import pack
from shards.reader import open_shards

RATE = 16000


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    return rng.integers(-20000, 20000, samples).astype(np.int16)


def make_corpus(
    root: Path, speakers: int = 6, utterances: int = 4, seed: int = 0, prefix: str = "id"
) -> dict[str, np.ndarray]:
    """WAV files ROOT/idN/sM/K.wav of 0.1 to 0.4 s and ROOT/list.txt; returns key -> samples."""
    rng = np.random.default_rng(seed)
    audio, lines = {}, []
    for s in range(speakers):
        for u in range(utterances + s % 3):
            key = f"{prefix}{s:03d}/session{u % 2}/{u:05d}"
            audio[key] = noise(rng, int(rng.integers(1600, 6400)))
            write_wav(root / f"{key}.wav", audio[key])
            lines.append(f"{prefix}{s:03d} {key}.wav\n")
    (root / "list.txt").write_text("".join(lines))
    return audio


def entries_of(root: Path, audio: dict[str, np.ndarray]) -> list[tuple[str, str, str]]:
    return [(key.split("/")[0], key, str(root / f"{key}.wav")) for key in audio]


def packed(folder: Path, name: str = "out", shard_bytes: int = 60000, **options) -> tuple[Path, dict[str, np.ndarray]]:
    """A packed corpus of several tars in FOLDER/NAME, and key -> samples."""
    audio = make_corpus(folder / "wav")
    pack(entries_of(folder / "wav", audio), folder / name, shard_bytes=shard_bytes, progress=False, **options)
    return folder / name, audio


def test_every_sample_of_every_utterance_is_kept(tmp_path):
    out, audio = packed(tmp_path)
    utterances = open_shards(out)
    assert [utterances.key(row) for row in range(len(utterances))] == sorted(audio)
    for row, key in enumerate(sorted(audio)):
        assert np.array_equal(utterances.read_utterance(row), audio[key])
    assert len(list(out.glob("*.tar"))) > 3
