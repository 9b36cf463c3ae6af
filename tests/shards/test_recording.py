"""A recording that is decoded block by block is the one that is decoded whole: samples, rate, notes, errors."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from shards.audio import BLOCK, decode
from shards.errors import UserError
from shards.recording import Recording

NOISE = 0.1 * np.random.default_rng(0).standard_normal((3 * BLOCK // 2, 2))  # more than a block of every kind
FILES = {
    "plain.wav": (NOISE[:, 0], 16000, "PCM_16"),
    "loud.wav": (8 * NOISE[:, 0], 16000, "PCM_16"),
    "wide.wav": (NOISE, 44100, "PCM_24"),
    "float.wav": (20 * NOISE, 16000, "FLOAT"),
    "bytes.wav": (NOISE, 8000, "PCM_U8"),
    "a.flac": (NOISE, 22050, "PCM_24"),
    "plain.flac": (NOISE[:, 0], 16000, "PCM_16"),
    "a.ogg": (NOISE[: BLOCK // 4], 16000, "VORBIS"),
    "a.mp3": (NOISE[: BLOCK // 4], 32000, "MPEG_LAYER_III"),
}


@pytest.mark.parametrize("name", [*FILES, "a.m4a"])
def test_blocks_are_the_samples_of_the_whole(name, tmp_path):
    if name == "a.m4a":
        soundfile.write(tmp_path / "b.wav", NOISE[: BLOCK // 4], 48000)
        subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "b.wav", tmp_path / name], check=True)
        rate = 48000
    else:
        samples, rate, subtype = FILES[name]
        soundfile.write(tmp_path / name, samples, rate, subtype=subtype)
    path = str(tmp_path / name)
    recording = Recording(path, 16000)
    blocks = list(recording.blocks())
    whole = decode(Path(path).read_bytes(), path, 16000, convert=True)
    np.testing.assert_array_equal(np.concatenate(blocks), np.frombuffer(whole.pcm, "<i2"))
    assert max(map(len, blocks)) <= 2 * BLOCK
    assert (recording.rate, recording.notes) == (rate, whole.notes)
    assert recording.samples == len(whole.pcm) // 2


def test_an_archives_member_is_read_like_a_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", NOISE[:40000], 48000, subtype="PCM_24")
    subprocess.run(["tar", "-cf", "a.tar", "a.wav"], cwd=tmp_path, check=True)
    found = [np.concatenate(list(Recording(tmp_path / n, 16000).blocks())) for n in ("a.wav", "a.tar::a.wav")]
    np.testing.assert_array_equal(*found)


def test_a_cut_file_is_named_and_so_is_a_missing_one(tmp_path):
    soundfile.write(tmp_path / "a.wav", NOISE[:4000], 16000, subtype="FLOAT")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:-100])
    for name, message in (
        ("cut.wav", "cut.wav: cut: its header promises 32000 bytes of audio, 31900 are there"),
        ("no.wav", "no.wav: no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            list(Recording(tmp_path / name, 16000).blocks())
