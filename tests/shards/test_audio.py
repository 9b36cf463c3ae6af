"""Sources of every kind end as the same samples: WAV, FLAC, OGG, MP3, m4a, zip and tar members, converted ones."""

import shutil
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import soundfile

from shards.audio import read_audio
from shards.format import ShardError
from shards.lists import key_of, read_list
from shards.pack import pack
from shards.reader import open_shards
from tests.shards.test_corpus import entries_of, make_corpus, noise, write_wav

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


def sine(seconds: float, hertz: float, rate: int) -> np.ndarray:
    return np.rint(10000 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.int16)


def test_wav_and_flac_are_read_bit_exact(tmp_path):
    samples = noise(np.random.default_rng(0), 5000)
    write_wav(tmp_path / "a.wav", samples)
    soundfile.write(tmp_path / "a.flac", samples, 16000)
    assert np.array_equal(read_audio(tmp_path / "a.wav", 16000), samples)
    assert np.array_equal(read_audio(tmp_path / "a.flac", 16000), samples)


def test_wav_with_further_chunks_and_of_unknown_length_is_read_bit_exact(tmp_path):
    samples = noise(np.random.default_rng(0), 5000)
    write_wav(tmp_path / "a.wav", samples)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(data[:36] + b"LIST\3\0\0\0abc\0" + data[36:] + b"more\2\0\0\0xy")
    (tmp_path / "c.wav").write_bytes(data[:40] + b"\xff\xff\xff\xff" + data[44:])
    for name in ("b.wav", "c.wav"):
        assert np.array_equal(read_audio(tmp_path / name, 16000), samples)
    (tmp_path / "d.wav").write_bytes(data[:40] + bytes(4) + b"LIST\4\0\0\0abcd")
    with pytest.raises(ShardError, match=r"d.wav: no audio in it \(0 samples\)"):
        read_audio(tmp_path / "d.wav", 16000)


@pytest.mark.parametrize("ending, subtype", [("ogg", "VORBIS"), ("opus", "OPUS"), ("mp3", "MPEG_LAYER_III")])
def test_lossy_files_are_read_without_conversion(tmp_path, ending, subtype):
    if ending not in ("ogg", "opus") and "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile has no MP3")
    samples = sine(0.5, 440, 16000)
    form = "MP3" if ending == "mp3" else "OGG"
    soundfile.write(tmp_path / f"a.{ending}", samples, 16000, format=form, subtype=subtype)
    read = read_audio(tmp_path / f"a.{ending}", 16000)
    spectrum = np.abs(np.fft.rfft(read[:8000].astype(float)))
    assert abs(spectrum.argmax() * 16000 / 8000 - 440) <= 4 and 8000 < np.abs(read[2000:6000]).max() < 12500


def test_convert_resamples_averages_and_rounds(tmp_path):
    left, right = sine(0.5, 1000, 48000), sine(0.5, 1000, 48000) // 2
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 48000)
    soundfile.write(tmp_path / "b.wav", sine(0.5, 1000, 16000) / 32768, 16000, subtype="FLOAT")
    for name in ("a.wav", "b.wav"):
        with pytest.raises(ShardError, match="convert it, or pack with --convert"):
            read_audio(tmp_path / name, 16000)
    read = read_audio(tmp_path / "a.wav", 16000, convert=True)
    expected = 0.75 * sine(0.5, 1000, 16000).astype(float)
    assert len(read) == 8000 and np.abs(read - expected)[400:-400].max() < 5
    assert np.array_equal(read_audio(tmp_path / "b.wav", 16000, convert=True), sine(0.5, 1000, 16000))


def archives(folder, audio):
    """The corpus as a deflated zip, a stored zip and a tar."""
    with zipfile.ZipFile(folder / "deflated.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for key in audio:
            file.write(folder / "wav" / f"{key}.wav", f"dev/aac/{key}.wav")
    with zipfile.ZipFile(folder / "stored.zip", "w", zipfile.ZIP_STORED) as file:
        for key in audio:
            file.write(folder / "wav" / f"{key}.wav", f"dev/aac/{key}.wav")
    with tarfile.open(folder / "plain.tar", "w") as file:
        for key in audio:
            file.add(folder / "wav" / f"{key}.wav", f"dev/aac/{key}.wav")


def test_members_of_zips_and_tars_are_packed_without_extracting_them(tmp_path):
    audio = make_corpus(tmp_path / "wav")
    archives(tmp_path, audio)
    pack(entries_of(tmp_path / "wav", audio), tmp_path / "plain", shard_bytes=60000, progress=False)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "plain").rglob("*.npy")}
    for name in ("deflated.zip", "stored.zip", "plain.tar"):
        lines = [f"{key.split('/')[0]} {name}::dev/aac/{key}.wav\n" for key in audio]
        (tmp_path / "list.txt").write_text("".join(lines))
        out = tmp_path / f"out-{name}"
        pack(read_list(tmp_path / "list.txt", tmp_path), out, shard_bytes=60000, progress=False, workers=2)
        assert {path.name: path.read_bytes() for path in out.rglob("*.npy")} == expected
        key = min(audio)
        assert np.array_equal(read_audio(f"{tmp_path / name}::dev/aac/{key}.wav", 16000), audio[key])


def test_damaged_and_missing_archives_are_named(tmp_path):
    audio = make_corpus(tmp_path / "wav")
    archives(tmp_path, audio)
    key = min(audio)
    with pytest.raises(ShardError, match="stored.zip::x.wav: no such member"):
        read_audio(f"{tmp_path}/stored.zip::x.wav", 16000)
    with pytest.raises(ShardError, match="none.zip::x.wav: there is no archive"):
        read_audio(f"{tmp_path}/none.zip::x.wav", 16000)
    data = bytearray((tmp_path / "stored.zip").read_bytes())
    at = data.index(audio[key].tobytes())
    data[at + 7] ^= 1
    (tmp_path / "flipped.zip").write_bytes(data)
    with pytest.raises(ShardError, match="flipped.zip::dev/aac/.*damaged in its archive: length or crc32 differ"):
        read_audio(f"{tmp_path}/flipped.zip::dev/aac/{key}.wav", 16000)
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match="cut.zip: not a readable zip"):
        read_audio(f"{tmp_path}/cut.zip::dev/aac/{key}.wav", 16000)
    with zipfile.ZipFile(tmp_path / "bzip.zip", "w", zipfile.ZIP_BZIP2) as file:
        file.write(tmp_path / "wav" / f"{key}.wav", "a.wav")
    with pytest.raises(ShardError, match="compressed by a method other than deflate"):
        read_audio(f"{tmp_path}/bzip.zip::a.wav", 16000)


def test_keys_begin_where_the_speaker_stands_in_the_path():
    assert key_of("id1", "dev/aac/id1/x/00001.m4a") == "id1/x/00001"
    assert key_of("id1", "id1/x/00001.wav") == "id1/x/00001"
    assert key_of("id1", "x/00001.wav") == "id1/x/00001"
    assert key_of("noise", "free/noise.wav") == "noise/free/noise"


def m4a(folder, samples, rate, name):
    write_wav(folder / "source.wav", samples, rate)
    command = ["ffmpeg", "-v", "error", "-y", "-i", str(folder / "source.wav"), "-c:a", "aac", str(folder / name)]
    subprocess.run(command, check=True)


@needs_ffmpeg
def test_m4a_goes_to_shards_in_one_pass_also_out_of_a_zip(tmp_path):
    m4a(tmp_path, sine(0.5, 440, 16000), 16000, "a.m4a")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.write(tmp_path / "a.m4a", "dev/id1/a.m4a")
    entries = [("id1", "id1/a", str(tmp_path / "a.m4a")), ("id1", "id1/b", f"{tmp_path}/a.zip::dev/id1/a.m4a")]
    pack(entries, tmp_path / "out", progress=False)
    utterances = open_shards(tmp_path / "out")
    a, b = utterances.read_utterance(0), utterances.read_utterance(1)
    command = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "a.m4a"), "-f", "s16le", "pipe:1"]
    expected = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, "<i2")
    assert np.array_equal(a, expected) and np.array_equal(b, expected)


@needs_ffmpeg
def test_m4a_of_another_rate_and_damaged_m4a_are_refused(tmp_path):
    m4a(tmp_path, sine(0.5, 440, 44100), 44100, "a.m4a")
    with pytest.raises(ShardError, match="a.m4a: 44100 Hz, expected 16000 Hz; convert it"):
        read_audio(tmp_path / "a.m4a", 16000)
    assert abs(len(read_audio(tmp_path / "a.m4a", 16000, convert=True)) - 8000) < 800
    (tmp_path / "b.m4a").write_bytes((tmp_path / "a.m4a").read_bytes()[:1000])
    with pytest.raises(ShardError, match="b.m4a: cut or damaged: the part at byte"):
        read_audio(tmp_path / "b.m4a", 16000)


def test_without_ffmpeg_an_m4a_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x1cftypM4A " + bytes(16) + b"\0\0\0\x08moov")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ShardError, match=r"a.m4a: only ffmpeg reads this kind of file, .* \(Debian: package ffmpeg\)"):
        read_audio(tmp_path / "a.m4a", 16000)
