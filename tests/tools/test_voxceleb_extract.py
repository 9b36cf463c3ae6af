"""Joining parts in place, hostile archives, unpacking and converting: killed anywhere, nothing half-written, nothing outside."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import random
import shutil
import stat
import struct
import subprocess
import warnings
import zipfile

import numpy as np
import pytest
import soundfile

from tools.bench.voxceleb import used
from tools.voxceleb import extract as module
from tools.voxceleb.extract import ArchiveError, check_members, convert, extract, join, journal

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg makes and reads AAC")


def in_parts(folder, size, count, seed=0):
    """A made archive in pieces: (paths of the parts, path of the whole, bytes of the whole)."""
    data = random.Random(seed).randbytes(size)
    parts = [folder / f"x_parta{chr(97 + i)}" for i in range(count)]
    cut = -(-size // count)
    for i, part in enumerate(parts):
        part.write_bytes(data[i * cut : (i + 1) * cut])
    return parts, folder / "x.zip", data


def test_joined_parts_are_the_whole_and_are_used_up(tmp_path):
    parts, whole, data = in_parts(tmp_path, 3_000_001, 4)
    join(parts, whole, hashlib.md5(data).hexdigest())
    assert whole.read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.zip", "x.zip.md5"]


def _join_and_die(parts, whole, md5, at):
    """Dies without a word at the n-th fsync or truncation."""
    calls = iter(range(10**6))

    def or_die(call):
        def wrapped(*arguments):
            if next(calls) == at:
                os._exit(9)
            return call(*arguments)

        return wrapped

    os.fsync, os.ftruncate, os.replace = or_die(os.fsync), or_die(os.ftruncate), or_die(os.replace)
    join(parts, whole, md5)
    os._exit(0)


def test_join_killed_at_every_step_goes_on(tmp_path):
    fork, at, died = multiprocessing.get_context("fork"), 0, True
    while died:
        folder = tmp_path / str(at)
        folder.mkdir()
        parts, whole, data = in_parts(folder, 1_500_000, 3, seed=at)
        md5 = hashlib.md5(data).hexdigest()
        process = fork.Process(target=_join_and_die, args=(parts, whole, md5, at))
        process.start()
        process.join()
        died = process.exitcode == 9
        join(parts, whole, md5)
        assert whole.read_bytes() == data and not journal(whole).exists() and not any(part.exists() for part in parts)
        at += 1
    assert at > 10  # the steps of the journal, of five pieces or more, and of the new name


def test_join_names_missing_and_damaged_parts(tmp_path):
    parts, whole, data = in_parts(tmp_path, 900_000, 3)
    parts[1].rename(tmp_path / "away")
    with pytest.raises(ArchiveError, match="lacks x_partab: download them first"):
        join(parts, whole, hashlib.md5(data).hexdigest())
    assert parts[0].exists() and parts[2].exists() and not journal(whole).exists()
    (tmp_path / "away").rename(parts[1])
    with pytest.raises(ArchiveError, match="although every part was right"):
        join(parts, whole, "0" * 32)
    assert not whole.exists()


def test_part_that_grew_in_the_middle_of_joining_is_refused(tmp_path):
    parts, whole, data = in_parts(tmp_path, 900_000, 3)
    journal(whole).write_text('{"x_partaa": 300000, "x_partab": 300000, "x_partac": 300000}')
    parts[1].write_bytes(data)
    with pytest.raises(ArchiveError, match="900000 bytes, expected at most 300000: it was replaced"):
        join(parts, whole, hashlib.md5(data).hexdigest())


def test_join_that_cannot_go_on_says_what_to_do(tmp_path):
    parts, whole, data = in_parts(tmp_path, 900_000, 3)
    journal(whole).write_text('{"other_partaa": 5}')
    with pytest.raises(
        ArchiveError, match=r"names the parts \['other_partaa'\], expected \['x_partaa', 'x_partab', 'x_partac'\]"
    ):
        join(parts, whole, hashlib.md5(data).hexdigest())
    journal(whole).write_text('{"x_partaa": 300000, "x_partab": 300000, "x_partac": 300000}')
    parts[0].unlink()
    with pytest.raises(
        ArchiveError, match="x.zip.partial is gone in the middle of joining: delete .* and download the parts again"
    ):
        join(parts, whole, hashlib.md5(data).hexdigest())


def test_conversion_without_ffmpeg_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArchiveError, match="ffmpeg is needed to read m4a and is not installed"):
        convert([(tmp_path / "a.m4a", tmp_path / "a.wav")])


def test_joining_needs_no_second_copy(tmp_path):
    parts, whole, data = in_parts(tmp_path, 32 << 20, 4)
    peaks, sync = [], os.fsync

    def measured(fd):
        sync(fd)
        peaks.append(used(tmp_path))

    module.os.fsync = measured
    try:
        join(parts, whole, hashlib.md5(data).hexdigest())
    finally:
        module.os.fsync = sync
    assert len(peaks) > 20 and max(peaks) < 1.06 * len(data)


def make_zip(path, members, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicate names
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as file:
            for name, content in members:
                file.writestr(name, content)
    return path


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def overlapping(path):
    """Two entries of the directory for the same bytes, as in the bombs of Fifield (WOOT 2019)."""
    make_zip(path, [("a.wav", b"a" * 1000), ("b.wav", b"a" * 1000)])
    with zipfile.ZipFile(path) as file:
        first = file.getinfo("a.wav").header_offset
        second = file.getinfo("b.wav").header_offset
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    assert int.from_bytes(data[entry + 42 : entry + 46], "little") == second and first == 0
    data[entry + 42 : entry + 46] = (5).to_bytes(4, "little")
    path.write_bytes(data)


def encrypted(path):
    make_zip(path, [("a.wav", b"a")])
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


def cut(path):
    make_zip(path, [("a.wav", random.Random(0).randbytes(5000))])
    path.write_bytes(path.read_bytes()[:-100])


HOSTILE = {
    "traversal": (lambda p: make_zip(p, [("wav/ok.wav", b"1"), ("../../evil.wav", b"1")]), "leaves its folder"),
    "inner traversal": (lambda p: make_zip(p, [("wav/../../evil.wav", b"1")]), "leaves its folder"),
    "absolute": (lambda p: make_zip(p, [("/evil.wav", b"1")]), "leaves its folder"),
    "drive": (lambda p: make_zip(p, [("C:evil.wav", b"1")]), "leaves its folder"),
    "backslash": (lambda p: make_zip(p, [("..\\evil.wav", b"1")]), "leaves its folder"),
    "symlink": (lambda p: make_zip(p, [(link("wav"), "/etc"), ("wav/evil.wav", b"1")]), "is a link or a device"),
    "duplicate": (lambda p: make_zip(p, [("a.wav", b"1"), ("a.wav", b"2")]), "stands there twice"),
    "duplicate but for case": (lambda p: make_zip(p, [("a.wav", b"1"), ("A.wav", b"2")]), "stands there twice"),
    "control characters": (lambda p: make_zip(p, [("a\n.wav", b"1")]), "does not print"),
    "bomb": (lambda p: make_zip(p, [("a.wav", bytes(5_000_000))]), "100 times its size"),
    "overlap": (overlapping, "overlaps another member"),
    "encrypted": (encrypted, "is encrypted"),
    "truncated": (cut, "not a whole zip archive"),
    "no zip at all": (lambda p: p.write_bytes(b"<html>log in</html>"), "not a whole zip archive"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive_is_refused_and_writes_nothing(tmp_path, case):
    make, text = HOSTILE[case]
    archive, out = tmp_path / "x.zip", tmp_path / "in" / "out"
    out.mkdir(parents=True)
    make(archive)
    with pytest.raises(ArchiveError) as error:
        extract(archive, out, lambda name: name)
    assert text in str(error.value) and str(archive) in str(error.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive] and list(out.iterdir()) == []


def test_member_larger_than_any_recording_is_refused(tmp_path):
    make_zip(tmp_path / "x.zip", [("a.wav", b"1")])
    data = bytearray((tmp_path / "x.zip").read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (3 << 30).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(ArchiveError, match="has 3221225472 bytes, more than any recording"):
        check_members(tmp_path / "x.zip")


@pytest.mark.parametrize("lie", ["content", "length"])
def test_damaged_member_is_named_and_leaves_no_half_file(tmp_path, lie):
    content = random.Random(0).randbytes(5000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a.wav", content)
    data = bytearray((tmp_path / "x.zip").read_bytes())
    if lie == "content":
        data[1000] ^= 1
    else:
        entry = data.index(b"PK\x01\x02")
        data[entry + 24 : entry + 28] = (4000).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(ArchiveError, match="member 'a.wav' is damaged"):
        extract(tmp_path / "x.zip", tmp_path / "out", lambda name: name)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_extraction_goes_on_and_clears_what_a_killed_run_left(tmp_path):
    members = [(f"wav/id1/s/{i}.wav", random.Random(i).randbytes(100 + i)) for i in range(40)]
    make_zip(tmp_path / "x.zip", [("wav/", b""), *members])
    folder = tmp_path / "out" / "wav" / "id1" / "s"
    folder.mkdir(parents=True)
    (folder / "3.wav").write_bytes(members[3][1])
    (folder / "4.wav").write_bytes(b"cut")
    (folder / ".5.wav.abc.tmp").write_bytes(b"half")
    before = (folder / "3.wav").stat().st_mtime_ns
    assert extract(tmp_path / "x.zip", tmp_path / "out", lambda name: name) == 40
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        n.split("/")[-1]: data for n, data in members
    }
    assert (folder / "3.wav").stat().st_mtime_ns == before


def aac(path, seconds=0.7, rate=16000, channels=1, seed=0):
    noise = np.random.default_rng(seed).normal(0, 0.1, (round(seconds * rate), channels))
    wave = io.BytesIO()
    soundfile.write(wave, noise, rate, format="WAV")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["ffmpeg", "-v", "error", "-i", "pipe:0", "-c:a", "aac", str(path)]
    subprocess.run(command, input=wave.getvalue(), check=True)
    return path


def by_ffmpeg(path):
    command = f"ffmpeg -v error -i {path} -ac 1 -ar 16000 -f s16le -c:a pcm_s16le -"
    return subprocess.run(command.split(), capture_output=True, check=True).stdout


@needs_ffmpeg
def test_converted_audio_equals_ffmpegs_own_one_file_at_a_time(tmp_path):
    sources = [aac(tmp_path / f"{i}.m4a", 0.3 + 0.1 * i, seed=i) for i in range(4)]
    sources.append(aac(tmp_path / "stereo.m4a", rate=44100, channels=2))
    pairs = [(source, tmp_path / "wav" / f"{source.stem}.wav") for source in sources]
    assert convert(pairs, workers=1) == []
    for source, target in pairs:
        assert target.read_bytes()[44:] == by_ffmpeg(source)
        info = soundfile.info(target)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")


@needs_ffmpeg
def test_bad_file_is_named_and_the_others_are_converted(tmp_path):
    good = [aac(tmp_path / f"{i}.m4a", seed=i) for i in range(3)]
    bad = tmp_path / "bad.m4a"
    bad.write_bytes(good[0].read_bytes()[:2000])
    kept = tmp_path / "wav" / "0.wav"
    kept.parent.mkdir()
    kept.write_bytes(b"already there")
    (kept.parent / ".1.wav.abc.tmp").write_bytes(b"half")
    pairs = [(path, tmp_path / "wav" / f"{path.stem}.wav") for path in [*good, bad]]
    [problem] = convert(pairs, workers=2)
    assert problem.startswith(f"{bad}: ") and len(problem) > len(str(bad)) + 5
    assert sorted(path.name for path in kept.parent.iterdir()) == ["0.wav", "1.wav", "2.wav"]
    assert kept.read_bytes() == b"already there"


HOSTILE_NAMES = {
    "one file by two names": (["a.wav", "./a.wav"], "member './a.wav' stands there twice"),
    "one file by doubled slashes": (["x/a.wav", "x//a.wav"], "stands there twice"),
    "a file below a file": (["x/a", "x/a/b.wav"], "lies below the file 'x/a'"),
    "1,500 folders": (["d/" * 1500 + "a.wav"], "has a name longer than file systems take"),
    "a name of 300 bytes": (["x/" + "y" * 300], "has a name longer than file systems take"),
}


@pytest.mark.parametrize("case", HOSTILE_NAMES)
def test_names_that_collide_or_fit_no_file_system_are_refused(tmp_path, case):
    names, message = HOSTILE_NAMES[case]
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        warnings.simplefilter("ignore")
        for name in names:
            file.writestr(name, b"audio")
    with pytest.raises(ArchiveError, match=f"a.zip: .*{message}"):
        extract(tmp_path / "a.zip", tmp_path / "out", place=lambda name: name)
    assert not (tmp_path / "out").exists()


def test_members_that_would_come_to_one_place_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("wav/a.wav", b"1")
        file.writestr("b/a.wav", b"2")
    with pytest.raises(
        ArchiveError, match="members 'wav/a.wav' and 'b/a.wav' would be one file; nothing was extracted"
    ):
        extract(tmp_path / "a.zip", tmp_path / "out", place=os.path.basename)


def test_an_empty_name_and_damaged_deflate_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("b", bytes(range(256)) * 40)
    data = (tmp_path / "a.zip").read_bytes()
    at = data.rindex(b"PK\1\2")
    empty = data[: at + 28] + b"\0\0" + data[at + 30 : at + 46] + data[at + 47 :]
    (tmp_path / "empty.zip").write_bytes(empty[:-10] + struct.pack("<I", 46) + empty[-6:])
    with pytest.raises(ArchiveError, match="empty.zip: "):
        check_members(tmp_path / "empty.zip")
    broken = bytearray(data)
    broken[31:60] = b"\xff" * 29
    (tmp_path / "broken.zip").write_bytes(broken)
    with pytest.raises(ArchiveError, match="broken.zip: member 'b' is damaged .*download it again"):
        extract(tmp_path / "broken.zip", tmp_path / "out", place=lambda name: name)


def test_300_random_damages_to_a_zip_end_in_one_sentence_or_the_same_files(tmp_path):
    whole = {f"id{i}/x/{i}.wav": random.Random(i).randbytes(400) + bytes(400) for i in range(5)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in whole.items():
            file.writestr(name, content)
    data, draw = (tmp_path / "a.zip").read_bytes(), random.Random(5)
    for attempt in range(300):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 8))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "b.zip").write_bytes(damaged[: draw.choice((len(data), draw.randrange(len(data))))])
        out = tmp_path / f"out{attempt}"
        with contextlib.suppress(ArchiveError):
            extract(tmp_path / "b.zip", out, place=lambda name: name, workers=1)
        for path in out.rglob("*.wav"):
            assert path.read_bytes() in whole.values()
