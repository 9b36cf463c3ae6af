"""Whatever is given as a recording: through the API and through the commands it is one clear sentence, and nothing hangs."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import soxr

import spknet
from spknet import cli, config, rng
from spknet.checkpoints import file as checkpoint
from spknet.errors import UserError
from spknet.models import build_model
from tests.conftest import voice
from tests.evaluate.test_evaluate import settings

ROOT = Path(__file__).resolve().parents[2]
VOICE = voice(3, 0, 1.5) / 32768
SAME, ALIKE = 0.0, 0.1  # distance to VOICE, of that of another voice: bit for bit the same, or through a resampler


class Case(NamedTuple):
    make: Callable[[Path], str]
    refused: str = ""  # what the error says
    doubt: str = ""  # what the verdict says
    distance: float | None = None


def sound(samples=VOICE, rate: int = 16000, subtype: str = "PCM_16", name: str = "a.wav") -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, samples, rate, subtype=subtype)
        return str(path)

    return make


def video(folder: Path) -> str:
    words = ["-f", "lavfi", "-i", "testsrc=duration=1:size=64x64:rate=5", str(folder / "v.mp4")]
    subprocess.run(["ffmpeg", "-v", "error", *words], check=True)
    return str(folder / "v.mp4")


def content(data: bytes, name: str = "a.wav") -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(data)
        return str(folder / name)

    return make


def fifo(folder: Path) -> str:
    os.mkfifo(folder / "pipe.wav")
    return str(folder / "pipe.wav")


def with_nan(samples: np.ndarray) -> np.ndarray:
    samples = samples.copy()
    samples[100] = np.nan
    return samples


CASES = {
    "no audio": Case(video, "v.mp4: no audio in it, or a picture alone; give a recording"),
    "empty": Case(content(b""), r"a.wav: not readable as audio \(an empty file\); get it again"),
    "text": Case(content(b"hello\n", "a.txt"), r"a.txt: not readable as audio \(.txt, begins with b'hello"),
    "web page": Case(content(b"<html>404</html>"), r"a.wav: not readable as audio \(a web page or XML\)"),
    "nowhere": Case(lambda folder: str(folder / "no.wav"), "no.wav: no such file or folder"),
    "folder": Case(str, "is a folder, expected a"),
    "FIFO": Case(fifo, r"pipe.wav is a pipe \(FIFO\), expected a file"),
    "URL": Case(lambda _: "https://example.org/a.wav", "a.wav: an address, expected a file; download it first"),
    "no samples": Case(sound(VOICE[:0]), r"a.wav: no audio in it \(0 samples\)"),
    "NaN": Case(sound(with_nan(VOICE), subtype="FLOAT"), "a.wav: 1 samples are NaN or infinite, the first at 100"),
    "integers as floats": Case(sound(VOICE * 32768, subtype="FLOAT"), "samples reach .*, expected -1 to 1"),
    "silent": Case(sound(VOICE * 0), doubt="a.wav is silent: all 24000 samples from 0 to 0"),
    "float beyond 1": Case(sound(VOICE * 6, subtype="FLOAT"), doubt="a.wav is clipped: .* samples over full scale"),
    "10 ms": Case(sound(VOICE[:160]), doubt="a.wav is too short: 0.01 s, expected 1 s or more"),
    "8 kHz": Case(
        sound(soxr.resample(VOICE, 16000, 8000), 8000),
        doubt="a.wav is band-limited: 8000 Hz, the network was trained on 16000 Hz.*sample rates differ: 8000 Hz and 16000 Hz",
    ),
    "from a telephone": Case(
        sound(4 * soxr.resample(soxr.resample(VOICE, 16000, 8000), 8000, 16000)),
        doubt="a.wav is band-limited: nothing above 4000 Hz",
    ),
    "8 bits": Case(sound(subtype="PCM_U8"), distance=0.5),  # with the noise of 8 bits
    "24 bits": Case(sound(subtype="PCM_24"), distance=SAME),
    "32 bits": Case(sound(subtype="PCM_32"), distance=SAME),
    "float": Case(sound(subtype="FLOAT"), distance=SAME),
    "192 kHz": Case(
        sound(soxr.resample(VOICE, 16000, 192000), 192000, "PCM_24"), doubt="sample rates differ", distance=ALIKE
    ),
    "6 channels": Case(sound(np.stack([VOICE] * 6, axis=1)), distance=SAME),
    "FLAC": Case(sound(name="a.flac"), distance=SAME),
    "a path with spaces and Unicode": Case(sound(name="mein Gespräch/ë — 日本 🎤 'x\".wav"), distance=SAME),
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> str:
    return sound(name="clean.wav")(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """Another voice."""
    return sound(voice(9, 1, 1.5) / 32768)(tmp_path_factory.mktemp("other"))


def distance(net: spknet.Network, left: str, right: str) -> float:
    vectors = net.embed([left, right])
    return float(np.abs(vectors[0] - vectors[1]).max())


def told(capsys, words: list[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(words)
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", CASES)
def test_a_recording_is_taken_doubted_or_refused_in_one_sentence(name, net, run_dir, clean, other, tmp_path, capsys):
    case = CASES[name]
    path = case.make(tmp_path)
    network = ["--checkpoint", str(run_dir), "--device", "cpu"]
    embedded = told(capsys, ["embed", path, *network, "-o", str(tmp_path / "out.npz")])
    verified = told(capsys, ["verify", path, clean, *network])
    if case.refused:
        with pytest.raises(UserError, match=case.refused):
            net.embed(path)
        for status, _, said in (embedded, verified):
            assert status == 2 and re.search(case.refused, said) and len(said.splitlines()) == 1, said
        assert not (tmp_path / "out.npz").exists()
        return
    verdict = net.verify(path, clean)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["embeddings"], net.embed(path))
    assert np.load(tmp_path / "out.npz")["names"].tolist() == [path]
    assert embedded[0] == 0 and verified[0] == int(not verdict.same)
    assert f"score {verdict.score:.3f}" in verified[1]
    assert re.search(case.doubt, "; ".join(verdict.why)) and re.search(case.doubt.split(".*")[0], verified[1])
    assert bool(verdict.why) == bool(case.doubt), verdict.why
    if case.distance is not None:
        assert distance(net, path, clean) <= case.distance * distance(net, other, clean)


MEASURE = """
import sys, spknet, torch
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
torch.set_num_threads(1)
network = spknet.load(sys.argv[1], "cpu")
network.embed(sys.argv[2])
before = peak()
vector = network.embed(sys.argv[3])
print(vector.shape, peak() - before)
"""


def long_wave(path: Path, seconds: int, rate: int) -> None:
    """A WAV of float zeros that takes no room on the disk."""
    soundfile.write(path, np.zeros(rate), rate, subtype="FLOAT")
    head = bytearray(path.read_bytes()[: -4 * rate])
    size = 4 * rate * seconds
    head[4:8], head[-4:] = (len(head) - 8 + size).to_bytes(4, "little"), size.to_bytes(4, "little")
    path.write_bytes(head)
    os.truncate(path, len(head) + size)


@pytest.mark.slow
def test_three_hours_take_hardly_more_memory_than_half_a_minute(tmp_path):
    c = settings()
    model = build_model(c.model, 2000)
    rng.initialize(model, 3)
    state = {"step": 1, "epoch": 0.0, "config": config.to_dict(c), "model": model.state_dict(), "sample_rate": 2000}
    checkpoint.save(tmp_path / "run", state, keep=0)
    long_wave(tmp_path / "short.wav", 30, 2000)
    long_wave(tmp_path / "long.wav", 3 * 3600, 2000)
    words = [tmp_path / "run", tmp_path / "short.wav", tmp_path / "long.wav"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    shape, grown = done.stdout.rsplit(None, 1)
    assert shape == "(1, 16)", done.stderr
    assert float(grown) < 60  # MiB; the file has 82, its samples in double precision 165


def test_a_list_names_the_recording_that_is_wrong(net, clean, tmp_path):
    with pytest.raises(UserError, match="no.wav: no such file or folder"):
        net.embed([clean, str(tmp_path / "no.wav"), clean])
    assert isinstance(net, spknet.Network)
