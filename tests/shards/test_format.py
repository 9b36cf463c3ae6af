"""Bytes and names: headers against the standard library's readers, the rules for keys, atomic writes."""

import binascii
import io
import os
import tarfile
import wave

import numpy as np
import pytest

from shards import format
from shards.format import ShardError

KEY = "id1/" + "ü" * 45 + "a"  # 95 bytes


def test_tar_header_is_what_tarfile_writes():
    for name, size in (("id1/a/0.wav", 12345), (KEY + ".flac", 0), ("id1/" + "b" * 91 + ".flac", 7 * 2**30)):
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = size, 0, 0o644
        ours = format.tar_header(name, size)
        read = tarfile.TarInfo.frombuf(ours, "utf-8", "strict")
        assert (read.name, read.size, read.mode, read.mtime, read.uid, read.isreg()) == (name, size, 0o644, 0, 0, True)
        theirs = info.tobuf(tarfile.USTAR_FORMAT)
        assert len(ours) == len(theirs) == 512
        assert ours[:148] == theirs[:148]  # name, mode, uid, gid, size, mtime
        assert ours[156:265] == theirs[156:265]  # type, link, magic, version


def test_wav_header_is_read_back_by_the_standard_library():
    pcm = np.arange(-500, 500, dtype="<i2").tobytes()
    with wave.open(io.BytesIO(format.wav_header(1000, 8000) + pcm)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth(), file.getnframes()) == (8000, 1, 2, 1000)
        assert file.readframes(1000) == pcm


def test_row_checks_are_the_standard_crc_and_find_every_flipped_bit():
    rng = np.random.default_rng(1)
    rows = np.frombuffer(rng.bytes(32 * 50), format.ROW).copy()
    expected = [binascii.crc_hqx(row.tobytes()[:30], 0) for row in rows]
    assert format.row_checks(rows).tolist() == expected
    for bit in range(240):
        damaged = bytearray(rows[:1].tobytes())
        damaged[bit // 8] ^= 1 << bit % 8
        assert format.row_checks(np.frombuffer(bytes(damaged), format.ROW))[0] != expected[0]


@pytest.mark.parametrize(
    "speaker, key, message",
    [
        ("id1", "id1/../x", "empty part, '.' or '..'"),
        ("..", "../x", "empty part, '.' or '..'"),
        ("id1", "/id1/x", "does not begin with its speaker"),
        ("id1", "id1//x", "empty part"),
        ("id1", "id1/NUL/x", "name of a device"),
        ("com1", "com1/x", "name of a device"),
        ("id1", "id1/a\nb", "control character"),
        ("id1", "id1/a\0b", "control character"),
        ("id1", "id1/a\udc80", "not UTF-8"),
        ("id1", "id1/" + "x" * 300, "304 bytes, at most 95"),
        ("id1", "id1/a.b", "dot in its last part"),
        ("id1", "id2/a", "does not begin with its speaker"),
        ("id1", "id1/a\\b", "backslash"),
        ("__x__", "__x__/a", "webdataset skips"),
    ],
)
def test_hostile_keys_are_refused(speaker, key, message):
    with pytest.raises(ShardError, match=message):
        format.check_key(speaker, key)


def test_a_speaker_with_a_slash_is_refused():
    with pytest.raises(ShardError, match="expected a name without '/'"):
        format.check_speaker("a/b")


def test_a_key_of_95_bytes_is_allowed():
    assert len(format.check_key("id1", KEY)) == 95


def test_an_interrupted_atomic_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), format.atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    with format.atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_an_exclusive_atomic_write_keeps_the_file_that_is_there(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError), format.atomic_write(path, exclusive=True) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_npy_files_of_this_package_and_of_numpy_are_read_alike(tmp_path):
    array = np.arange(7, dtype="<u4")
    format.write_npy(tmp_path / "ours.npy", array)
    np.save(tmp_path / "theirs.npy", array)
    assert np.array_equal(np.load(tmp_path / "ours.npy", allow_pickle=False), array)
    for name in ("ours.npy", "theirs.npy"):
        assert np.array_equal(format.open_npy(tmp_path / name, "<u4", 7), array)
    with pytest.raises(ShardError, match=r"found <u4 of \(7,\), expected uint32 of 8"):
        format.open_npy(tmp_path / "ours.npy", "<u4", 8)
