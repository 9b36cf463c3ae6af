"""Sequential reading: webdataset itself streams the tars bit-exact; counted tars; batches balanced by speaker."""

import io
import os
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
import webdataset

from shards import stream
from shards.format import ShardError
from shards.pack import pack
from shards.reader import open_shards
from tests.shards.test_corpus import packed


def same(found: dict, audio: dict) -> bool:
    return found.keys() == audio.keys() and all(np.array_equal(found[key], audio[key]) for key in audio)


@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_webdataset_itself_streams_every_sample_bit_exact(tmp_path, codec):
    out, audio = packed(tmp_path, codec=codec)
    found, speakers = {}, {}
    for sample in webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False):
        found[sample["__key__"]] = soundfile.read(io.BytesIO(sample[codec]), dtype="int16")[0]
        speakers[sample["__key__"]] = sample["spk"].decode()
    assert same(found, audio)
    assert speakers == {key: key.split("/")[0] for key in audio}


def test_real_speech_goes_through_shards_and_webdataset_bit_exact(tmp_path, shared):
    lines = (shared / "speech" / "train_list.txt").read_text().split("\n")[:200:5]
    entries = [(s, path[:-5], str(shared / "speech" / path)) for s, path in (line.split() for line in lines)]
    pack(entries, tmp_path / "out", shard_bytes=2**20, progress=False)
    found = {}
    for sample in webdataset.WebDataset(sorted(map(str, (tmp_path / "out").glob("*.tar"))), shardshuffle=False):
        found[sample["__key__"]] = soundfile.read(io.BytesIO(sample["wav"]), dtype="int16")[0]
    assert same(found, {key: soundfile.read(path, dtype="int16")[0] for _, key, path in entries})
    utterances = open_shards(tmp_path / "out")
    assert same({utterances.key(row): utterances.read_utterance(row) for row in range(len(utterances))}, found)


def test_gnu_tar_lists_and_extracts_the_tars(tmp_path):
    out, audio = packed(tmp_path)
    names = []
    for tar in sorted(out.glob("*.tar")):
        names += subprocess.run(["tar", "-tf", tar], check=True, capture_output=True, text=True).stdout.split()
        with tarfile.open(tar) as file:
            assert all(member.isreg() and member.mtime == 0 for member in file)
    assert sorted(names) == sorted(f"{key}.{ending}" for key in audio for ending in ("spk", "wav"))


@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_a_stream_gives_every_utterance_of_its_part_once(tmp_path, codec):
    out, audio = packed(tmp_path, codec=codec)
    urls, counts = stream.tars_of(out)
    found = {}
    for i in range(3):
        for speaker, key, samples in stream.utterances(urls, counts, part=(i, 3)):
            assert key not in found and key.startswith(speaker + "/")
            found[key] = samples
    assert same(found, audio)


def test_pipes_and_http_are_streamed(tmp_path):
    out, audio = packed(tmp_path)
    handler = partial(type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *a: None}), directory=str(out))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        # webdataset reads http through curl, which not every machine has.
        read = (
            f"import sys, urllib.request; sys.stdout.buffer.write(urllib.request.urlopen('{base}/'+sys.argv[1]).read())"
        )
        urls = [f'pipe:{sys.executable} -c "{read}" {path.name}' for path in sorted(out.glob("*.tar"))]
        assert same({key: samples for _, key, samples in stream.utterances(urls)}, audio)
        assert stream.tars_of(out, base + "/")[0][0] == f"{base}/train-000000.tar"
    finally:
        server.shutdown()
        server.server_close()


def test_a_tar_that_webdataset_takes_for_whole_is_an_error_here(tmp_path):
    out, audio = packed(tmp_path, shard_bytes=2**20)
    tar = out / "train-000000.tar"
    with tarfile.open(tar) as file:
        second = [member for member in file if member.name.endswith(".spk")][1]
    os.truncate(tar, second.offset)
    urls, counts = stream.tars_of(out)
    assert len(list(webdataset.WebDataset([str(tar)], shardshuffle=False))) == 1
    with pytest.raises(
        ShardError, match=r"train-000000.tar: found 1 utterances, expected 30: the tar is cut or damaged"
    ):
        list(stream.utterances(urls, counts))


def test_a_member_without_its_speaker_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        member = tarfile.TarInfo("id1/a.wav")
        member.size = 4
        file.addfile(member, io.BytesIO(b"RIFF"))
    with pytest.raises(ShardError, match="expected spk and wav or flac: damaged, or not packed by shards.pack"):
        list(stream.utterances([str(tmp_path / "a.tar")]))


def test_batches_have_distinct_speakers_and_no_utterance_twice(tmp_path):
    out, audio = packed(tmp_path)
    urls, counts = stream.tars_of(out)
    batches = list(stream.balanced_batches(stream.utterances(urls, counts), 3, 2, buffer=24, seed=1))
    keys = [key for batch in batches for group in batch for _, key, _ in group]
    assert len(keys) == len(set(keys)) == 6 * len(batches) and len(batches) >= 2
    for batch in batches:
        speakers = [{speaker for speaker, _, _ in group} for group in batch]
        assert all(len(group) == 1 for group in speakers) and len(set.union(*speakers)) == 3
    again = list(stream.balanced_batches(stream.utterances(urls, counts), 3, 2, buffer=24, seed=1))
    assert [key for batch in again for group in batch for _, key, _ in group] == keys


def test_a_buffer_that_holds_too_few_speakers_is_an_error(tmp_path):
    out, _ = packed(tmp_path)
    urls, _ = stream.tars_of(out)
    with pytest.raises(
        ShardError, match="a buffer of 8 utterances holds [0-3] speakers with 2 utterances, 4 are wanted: enlarge"
    ):
        list(stream.balanced_batches(stream.utterances(urls), 4, 2, buffer=8))
    with pytest.raises(ShardError, match="a buffer of 7 utterances cannot hold a batch of 4 x 2; give at least 32"):
        list(stream.balanced_batches(stream.utterances(urls), 4, 2, buffer=7))
