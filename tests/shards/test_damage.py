"""Damage: each kind has an error that says what was found and what to do; nothing damaged is passed on as another's audio."""

import hashlib
import json
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest

from shards import format, index, parts
from shards.format import ShardError
from shards.reader import open_shards
from shards.verify import main, verify
from tests.shards.test_corpus import packed

LENGTH = 1200


def read_everything(out: Path) -> None:
    utterances = open_shards(out)
    rows = np.arange(len(utterances))
    utterances.read_batch(rows, np.zeros(len(rows), np.int64), np.empty((len(rows), LENGTH), np.int16))
    for row in rows.tolist():
        utterances.read_utterance(row)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def edit_json(out: Path, change, sign: bool = True) -> None:
    path = out / "index" / "index.json"
    meta = json.loads(path.read_text())
    change(meta)
    meta["checksum"] = "0" * 64 if sign else meta["checksum"]
    text = json.dumps(meta)
    if sign:
        text = text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1)
    path.write_text(text)


def first_payload(out: Path) -> tuple[Path, int]:
    """A tar and the offset of the PCM of its second utterance."""
    opened = index.open_index(out)
    shard = int(opened.rows["shard"][0])
    offsets = np.sort(opened.rows["offset"][opened.rows["shard"] == shard])
    return out / index.tar_name(shard), int(offsets[1])


def missing_tar(out):
    (out / "train-000001.tar").unlink()


def cut_at_a_member(out):
    tar, offset = first_payload(out)
    os.truncate(tar, offset - 44 - 512 - 1024)


def cut_inside(out):
    tar, offset = first_payload(out)
    os.truncate(tar, offset + 700)


def header_bit(out):
    flip(out / "train-000001.tar", 8 * 3)


def payload_bit(out):
    tar, offset = first_payload(out)
    flip(tar, 8 * (offset + 100))


def swapped_tars(out):
    os.rename(out / "train-000000.tar", out / "x")
    os.rename(out / "train-000001.tar", out / "train-000000.tar")
    os.rename(out / "x", out / "train-000001.tar")


def stale_index(out):
    other, _ = packed(out.parent / "second", seed=5)
    for path in other.glob("*.tar"):
        (out / path.name).write_bytes(path.read_bytes())


def truncated_npy(out):
    path = out / "index" / "utterances.npy"
    os.truncate(path, path.stat().st_size - 32)


def pickle_in_npy(out):
    path = out / "index" / "keys.npy"
    np.save(path, np.array([{"a": 1}] * 30, dtype=object), allow_pickle=True)
    size = path.stat().st_size
    edit_json(out, lambda meta: meta["files"]["keys.npy"].update(filesize=size))


def damaged_row(out):
    flip(out / "index" / "utterances.npy", 8 * (128 + 32 * 7 + 2) + 5 + 8 * 64)


def damaged_key(out):
    path = out / "index" / "keys.npy"
    flip(path, 8 * (path.stat().st_size - 1))


def edited(**values):
    return lambda out: edit_json(out, lambda meta: meta.update(values))


@pytest.mark.parametrize(
    "damage, message",
    [
        (missing_tar, r"train-000001.tar is missing; index.json lists it with \d+ bytes; copy or pack it again"),
        (cut_at_a_member, r"found \d+ bytes, index.json says \d+: cut, swapped, or the index is stale; copy or pack"),
        (cut_inside, r"found \d+ bytes, index.json says \d+: cut, swapped, or the index is stale"),
        (header_bit, "its first header is not the one in index.json: damaged, or another tar of the same size"),
        (payload_bit, r"utterance id.*: crc32 [0-9a-f]{8}, expected [0-9a-f]{8}: the audio is damaged; pack it again"),
        (swapped_tars, r"found \d+ bytes, index.json says \d+: cut, swapped, or the index is stale"),
        (stale_index, r"(found \d+ bytes, index.json says \d+: cut, swapped|its first header is not the one)"),
        (truncated_npy, r"utterances.npy: found \d+ bytes, index.json says \d+: cut or replaced; make the index again"),
        (pickle_in_npy, r"keys.npy: found a pickle \(type \|O\), which is never loaded, expected \|S\d+ of 30"),
        (damaged_row, "utterances.npy is damaged or of another data set; make the index again with"),
        (lambda out: (out / "index" / "index.json").unlink(), "is not a packed data set, or is not packed to the end"),
        (lambda out: (out / "index" / "labels.npy").unlink(), "labels.npy is missing; make the index again"),
        (
            lambda out: flip(out / "index" / "speakers.npy", 8 * 130),
            "speakers.npy: its sha256 is not the one in index.json",
        ),
        (
            lambda out: edit_json(out, lambda meta: meta.update(sample_rate=8000), sign=False),
            "index.json: its checksum is wrong: edited or damaged; make the index again",
        ),
        (
            edited(utterances=10**30),
            r"utterances is 1000000000000000000000000000000, expected a number from 1 to 1099511627776",
        ),
        (edited(utterances=-1), "utterances is -1, expected a number"),
        (edited(utterances=29), "utterances is 29, but the tars have 30"),
        (edited(speakers=True), "speakers is True, expected a number"),
        (edited(speakers=7), r"speakers.npy: found \|S5 of \(6,\), expected \|S5 of 7"),
        (edited(key_bytes=2**39), "key_bytes is 549755813888, expected a number from 1 to 95"),
        (edited(key_bytes=90), r"keys.npy: found \|S\d+ of \(30,\), expected \|S90 of 30"),
        (edited(version=2), "version 2, this program reads version 1"),
        (edited(codec="mp3"), "codec 'mp3', expected wav or flac"),
        (edited(shardlist=[]), r"shardlist is not a list of \d"),
        (
            edited(shardlist=[{"url": "../../etc/passwd"}], tars=1),
            "entry 0 of shardlist must have url train-000000.tar",
        ),
        (edited(files={}), "files must give filesize and sha256 of utterances.npy"),
        (edited(fingerprint="x"), "must be 64 hexadecimal digits"),
        (edited(format="wids"), "expected an object with format 'spknet-shards'"),
        (lambda out: (out / "index" / "index.json").write_text("{" * 100000), "index.json: not JSON"),
        (lambda out: (out / "index" / "index.json").write_bytes(b"\xff\xfe"), "index.json: not JSON"),
    ],
)
def test_damage_has_an_error_that_says_what_and_what_to_do(tmp_path, damage, message):
    out, _ = packed(tmp_path)
    read_everything(out)
    damage(out)
    with pytest.raises(ShardError, match=message):
        read_everything(out)
    assert verify(out).damages


def test_an_index_json_without_its_shardlist_is_refused_where_it_is_needed(tmp_path):
    out, _ = packed(tmp_path)
    edit_json(out, lambda meta: meta.pop("shardlist"))
    assert len(open_shards(out)) == 30
    with pytest.raises(ShardError, match="index.json: it has no shardlist; make the index again"):
        index.read_meta(out)
    assert verify(out).damages


def test_a_damaged_row_or_key_that_no_probe_touches_is_noticed_when_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "PROBES", 1)  # as in a data set of millions: only row 0
    out, audio = packed(tmp_path)
    damaged_key(out)
    damaged_row(out)
    utterances = open_shards(out)
    with pytest.raises(ShardError, match=r"key 29, .* is damaged; make the index again"):
        utterances.key(29)
    assert utterances.find([max(audio)]).tolist() == [-1]
    with pytest.raises(ShardError, match=r"utterances.npy: row \d+ is damaged; make the index again with"):
        read_everything(out)


def test_a_tar_that_is_cut_after_it_was_opened_is_an_error(tmp_path):
    out, audio = packed(tmp_path)
    utterances = open_shards(out)
    rows, zeros, batch = np.arange(30), np.zeros(30, np.int64), np.empty((30, LENGTH), np.int16)
    utterances.read_batch(rows, zeros, batch)
    os.truncate(out / "train-000000.tar", 3000)
    with pytest.raises(ShardError, match=r"utterance id.*: found \d+ bytes, expected 2400: the tar has been cut since"):
        utterances.read_batch(rows, zeros, batch)


def test_a_damaged_flac_crop_is_an_error(tmp_path):
    out, _ = packed(tmp_path, codec="flac")
    utterances = open_shards(out)
    row = index.open_index(out).rows[4]
    flip(out / index.tar_name(int(row["shard"])), 8 * (int(row["offset"]) + 300))
    with pytest.raises(ShardError, match="utterance id.*: crc32 .* the audio is damaged"):
        utterances.read_batch([4], [10], np.empty((1, 500), np.int16))


def test_damaged_parts_are_named_by_merge(tmp_path):
    out, _ = packed(tmp_path)
    part = out / "parts" / "000001.npz"
    os.truncate(part, 300)
    with pytest.raises(ShardError, match="000001.npz is damaged .* delete it and run the same pack again"):
        parts.merge(out)
    os.truncate(out / "parts" / "plan-000.npz", 30)
    with pytest.raises(ShardError, match="plan-000.npz is damaged .* delete it and run the same pack again"):
        parts.merge(out)


def test_verify_names_the_affected_utterances_and_speakers(tmp_path, capsys):
    out, audio = packed(tmp_path)
    assert main([str(out)]) == 0
    assert re.search(r"all \d+ files are whole \(30 utterances of 6 speakers\)", capsys.readouterr().out)
    opened = index.open_index(out)
    row = opened.rows[11]
    key = opened.keys[11].decode()
    flip(out / index.tar_name(int(row["shard"])), 8 * (int(row["offset"]) + 50))
    (out / index.tar_name((int(row["shard"]) + 1) % len(opened.tars))).unlink()
    gone = opened.keys[opened.rows["shard"] == (int(row["shard"]) + 1) % len(opened.tars)]
    assert main([str(out), "--list", str(tmp_path / "affected.txt")]) == 1
    printed = capsys.readouterr().out
    assert f"{key}: its audio is damaged (crc32)" in printed
    assert "2 damaged of" in printed and f"affected: {len(gone) + 1} utterances of" in printed
    listed = {line.split("\t")[0] for line in (tmp_path / "affected.txt").read_text().splitlines()}
    assert listed == {key, *(name.decode() for name in gone)}


def test_verify_finds_a_pack_whose_sums_are_right_and_whose_index_is_wrong(tmp_path):
    out, _ = packed(tmp_path)
    opened = index.open_index(out)
    rows, keys = np.array(opened.rows), np.array(opened.keys)
    rows["crc32"][3] ^= 1
    settings = type("S", (), {"sample_rate": 16000, "codec": "wav"})()
    sums = [tuple(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines() if "parts/" in line]
    tars, identities = np.array(opened.tars), np.array(opened.identities)
    index.write_index(out, index.Contents(rows, keys, tars, identities, settings, 0, list(sums)))
    report = verify(out)
    assert report.affected() == {keys[3].decode(): "its audio is damaged (crc32)"}


def damage_at_random(path: Path, draw: random.Random) -> str:
    size = path.stat().st_size
    if draw.random() < 0.2:
        length = draw.randrange(size)
        os.truncate(path, length)
        return f"cut to {length}"
    bit = draw.randrange(8 * size)
    flip(path, bit)
    return f"bit {bit}"


def check_reader(out: Path, audio: dict[str, np.ndarray]) -> None:
    """Every answer of the reader is an error, or what belongs to the key; a damaged crop differs from it in one bit at most."""
    try:
        utterances = open_shards(out)
    except ShardError:
        return
    for row in range(len(utterances)):
        batch = np.zeros((1, LENGTH), np.int16)
        try:
            key = utterances.key(row)
            utterances.read_batch([row], [100], batch)
        except ShardError:
            continue
        assert np.count_nonzero(batch[0] != audio[key][100 : 100 + LENGTH]) <= 1, key
    for key, samples in audio.items():
        try:
            row = int(utterances.find([key])[0])
            found = utterances.read_utterance(row) if row >= 0 else samples
        except ShardError:
            continue
        assert np.array_equal(found, samples), key


def random_damage(folder: Path, times: int, seed: int) -> None:
    out, audio = packed(folder)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    draw = random.Random(seed)
    for i in range(times):
        path = draw.choice(files)
        whole = path.read_bytes()
        what = damage_at_random(path, draw)
        assert verify(out).damages, f"seed {seed}, {i}: {path.name}, {what}: not found"
        check_reader(out, audio)
        path.write_bytes(whole)
    assert not verify(out).damages


def test_fifty_random_flips_and_cuts_are_found_and_never_give_anothers_audio(tmp_path):
    random_damage(tmp_path, 50, seed=1)


@pytest.mark.slow
def test_a_thousand_random_flips_and_cuts_are_found_and_never_give_anothers_audio(tmp_path):
    seed = int(os.environ.get("SHARDS_SEED", time.time_ns() % 10**6))
    print("SHARDS_SEED", seed)
    random_damage(tmp_path, 1000, seed)


def test_npy_headers_that_parse_to_nonsense_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    for header in (b"{'descr': '<u4'", b"[" * 3000, b"1 + 1", b"None"):
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        with pytest.raises(ShardError, match="a damaged .npy header, expected uint32 of 3"):
            format.open_npy(path, "<u4", 3)
