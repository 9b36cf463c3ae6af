"""The node-local cache: whole checked tars under names made of their content, one copier each, a limit, never a torn file."""

import fcntl
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from shards import cache as cache_module
from shards import index
from shards.cache import Cache
from shards.format import ShardError
from shards.reader import open_shards
from shards.stage import main, stage
from tests.shards.test_corpus import packed


def tars(folder):
    return sorted(path.name for path in folder.glob("*.tar"))


def read_all(utterances, audio):
    for row in range(len(utterances)):
        assert np.array_equal(utterances.read_utterance(row), audio[utterances.key(row)])


def wait_for(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_staged_tars_are_whole_and_are_read_instead_of_the_source(tmp_path, capsys):
    out, audio = packed(tmp_path)
    assert main([str(out), str(tmp_path / "cache")]) == 0
    entries = index.read_meta(out)["shardlist"]
    assert f"{len(entries)} of {len(entries)} tars" in capsys.readouterr().out
    assert tars(tmp_path / "cache") == sorted(f"{e['sha256'][:16]}-{e['url']}" for e in entries)
    for path in out.glob("*.tar"):
        path.unlink()
    read_all(open_shards(out, cache_dir=tmp_path / "cache"), audio)
    with pytest.raises(ShardError, match="is missing; index.json lists it"):
        read_all(open_shards(out), audio)


def test_a_run_fills_the_cache_while_it_reads_the_source(tmp_path):
    out, audio = packed(tmp_path)
    utterances = pickle.loads(pickle.dumps(open_shards(out, cache_dir=tmp_path / "cache")))
    read_all(utterances, audio)
    wait_for(lambda: len(tars(tmp_path / "cache")) == len(tars(out)))
    read_all(utterances, audio)
    assert sorted((tmp_path / "cache" / name).read_bytes() for name in tars(tmp_path / "cache")) == sorted(
        (out / name).read_bytes() for name in tars(out)
    )


def test_open_sources_are_given_up_for_their_copies(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.tars.RECHECK_SECONDS", 0.0)
    out, audio = packed(tmp_path)
    utterances = open_shards(out, cache_dir=tmp_path / "cache")
    read_all(utterances, audio)
    wait_for(lambda: len(tars(tmp_path / "cache")) == len(tars(out)))

    def opened() -> set[str]:
        read_all(utterances, audio)
        return {os.readlink(f"/proc/self/fd/{fd}") for fd in utterances._tars._fds.values()}

    # The last copy is in its place a moment before this process knows it.
    wait_for(lambda: opened() == {str(tmp_path / "cache" / name) for name in tars(tmp_path / "cache")})


def test_a_torn_copy_is_never_taken_for_whole(tmp_path):
    out, audio = packed(tmp_path)
    node = Cache(tmp_path / "cache", copy=False)
    entry = index.read_meta(out)["shardlist"][0]
    torn = node.path(entry).with_name(node.path(entry).name + ".part")
    torn.write_bytes((out / entry["url"]).read_bytes()[:5000])  # as a killed copier leaves it
    assert node.tar(out / entry["url"], entry) == out / entry["url"]
    assert node.copy(out / entry["url"], entry)
    assert node.path(entry).read_bytes() == (out / entry["url"]).read_bytes() and not torn.exists()
    os.truncate(node.path(entry), 5000)
    assert node.tar(out / entry["url"], entry) == out / entry["url"]


def test_while_one_process_copies_the_others_read_the_source(tmp_path):
    out, _ = packed(tmp_path)
    node = Cache(tmp_path / "cache", copy=False)
    entry = index.read_meta(out)["shardlist"][0]
    part = node.path(entry).with_name(node.path(entry).name + ".part")
    with open(part, "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert node.copy(out / entry["url"], entry) is False
        assert node.tar(out / entry["url"], entry) == out / entry["url"]
    assert node.copy(out / entry["url"], entry) is True


def test_processes_that_stage_at_once_end_with_one_whole_copy_each(tmp_path):
    out, _ = packed(tmp_path)
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        results = pool.starmap(stage, [(out, tmp_path / "cache")] * 4)
    assert results == [(len(tars(out)), len(tars(out)))] * 4
    assert not list((tmp_path / "cache").glob("*.part"))
    for entry in index.read_meta(out)["shardlist"]:
        copy = tmp_path / "cache" / f"{entry['sha256'][:16]}-{entry['url']}"
        assert copy.read_bytes() == (out / entry["url"]).read_bytes()


def test_the_size_limit_holds_and_the_rest_is_read_from_the_source(tmp_path, capsys):
    out, audio = packed(tmp_path)
    limit = 150000
    assert main([str(out), str(tmp_path / "cache"), "--limit-gib", str(limit / 2**30)]) == 0
    assert "do not fit and will be read from" in capsys.readouterr().out
    used = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert 0 < len(tars(tmp_path / "cache")) < len(tars(out)) and used <= limit
    read_all(open_shards(out, cache_dir=tmp_path / "cache", cache_gib=limit / 2**30), audio)


def test_damaged_and_missing_sources_are_not_staged(tmp_path, capsys):
    out, _ = packed(tmp_path)
    tar = out / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError, match="train-000001.tar: its size or sha256 is not the one in index.json: damaged"):
        stage(out, tmp_path / "cache")
    assert not [name for name in tars(tmp_path / "cache") if "000001" in name]
    tar.unlink()
    assert main([str(out), str(tmp_path / "cache")]) == 2
    assert "train-000001.tar is missing; copy or pack it again" in capsys.readouterr().err


def test_a_damaged_index_is_not_copied(tmp_path):
    out, _ = packed(tmp_path)
    path = out / "index" / "utterances.npy"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="utterances.npy: its sha256 is not the one in index.json: damaged"):
        open_shards(out, cache_dir=tmp_path / "cache")
    path.unlink()
    with pytest.raises(ShardError, match="utterances.npy is missing"):
        open_shards(out, cache_dir=tmp_path / "cache")


def test_network_file_systems_are_told_by_the_longest_mount_above_a_path(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/a / ext4 rw 0 0\nserver:/x /home nfs4 rw 0 0\n/dev/b /home/local xfs rw 0 0\n@tcp:/l /l lustre rw 0 0\n"
    )
    paths = {"/home/a": True, "/home/local/b": False, "/homes": False, "/l": True, "/lustre": False, "/": False}
    assert {path: cache_module.is_network(Path(path), mounts) for path in paths} == paths
    assert cache_module.is_network(tmp_path) is False
