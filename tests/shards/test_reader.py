"""Reading: crops equal the samples that went in, whatever the order, the process, the number of tars and data sets."""

import gc
import multiprocessing
import os
import pickle
import threading

import numpy as np
import pytest
import soundfile

from shards import lists, pack, reader
from shards.format import ShardError
from shards.reader import open_files, open_shards
from tests.shards.test_corpus import entries_of, make_corpus, noise, packed, write_wav


def crops(utterances, audio, n: int, length: int, seed: int = 0):
    """n random rows and starts, and what the crops must be; utterances shorter than the crop are repeated."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(utterances), n)
    starts, expected = np.empty(n, np.int64), np.empty((n, length), np.int16)
    for i, row in enumerate(rows.tolist()):
        samples = audio[utterances.key(row)]
        starts[i] = (
            rng.integers(0, max(len(samples) - length, 0) + 1) if len(samples) >= length else rng.integers(0, 10000)
        )
        expected[i] = [samples[(starts[i] + j) % len(samples)] for j in range(length)]
    return rows, starts, expected


@pytest.mark.parametrize("codec", ["wav", "flac"])
@pytest.mark.parametrize("length", [700, 4000, 20000])
def test_crops_are_the_samples_that_went_in(tmp_path, codec, length):
    out, audio = packed(tmp_path, codec=codec)
    utterances = open_shards(out)
    rows, starts, expected = crops(utterances, audio, 60, length)
    batch = np.zeros((60, length), np.int16)
    utterances.read_batch(rows, starts, batch)
    assert np.array_equal(batch, expected)


def test_loose_wav_and_flac_files_give_the_same_crops_as_shards(tmp_path):
    out, audio = packed(tmp_path)
    lines = []
    for i, key in enumerate(audio):
        ending = "flac" if i % 2 else "wav"
        if i % 2:
            soundfile.write(tmp_path / "wav" / f"{key}.flac", audio[key], 16000)
        lines.append(f"{key.split('/')[0]} {key}.{ending}\n")
    (tmp_path / "mixed.txt").write_text("\n".join(lines))
    loose, shards = open_files(tmp_path / "mixed.txt", tmp_path / "wav"), open_shards(out)
    assert list(loose.speakers) == list(shards.speakers) and np.array_equal(loose.labels, shards.labels)
    assert np.array_equal(loose.samples, shards.samples) and np.array_equal(loose.speaker_rows, shards.speaker_rows)
    assert loose.find(["nobody/x", shards.key(3)]).tolist() == [-1, 3]
    for length in (700, 5000):
        rows, starts, expected = crops(shards, audio, 60, length)
        batch = np.zeros((60, length), np.int16)
        pickle.loads(pickle.dumps(loose)).read_batch(rows, starts, batch)
        assert np.array_equal(batch, expected)
    assert np.array_equal(loose.read_utterance(5), audio[loose.key(5)])


def test_speakers_own_neighbouring_rows_and_labels_count_from_zero(tmp_path):
    out, audio = packed(tmp_path)
    utterances = open_shards(out)
    assert list(utterances.speakers) == sorted({key.split("/")[0] for key in audio})
    assert utterances.labels.tolist() == list(range(6)) and utterances.labels.dtype == np.uint32
    for s, speaker in enumerate(utterances.speakers):
        rows = range(int(utterances.speaker_rows[s]), int(utterances.speaker_rows[s + 1]))
        assert {utterances.key(row) for row in rows} == {key for key in audio if key.startswith(speaker + "/")}
    assert [len(audio[utterances.key(row)]) for row in range(len(utterances))] == utterances.samples.tolist()


def test_find_gives_rows_and_minus_one(tmp_path):
    out, audio = packed(tmp_path)
    utterances = open_shards(out)
    keys = sorted(audio)
    assert utterances.find([keys[5], "nobody/x", keys[0], "x" * 200, "", keys[-1] + "0"]).tolist() == [
        5,
        -1,
        0,
        -1,
        -1,
        -1,
    ]


def test_crops_out_of_bounds_and_wrong_batches_are_refused(tmp_path):
    out, _ = packed(tmp_path)
    utterances = open_shards(out)
    samples = int(utterances.samples[2])
    batch = np.zeros((1, 1000), np.int16)
    with pytest.raises(ValueError, match=f"row 2 has {samples} samples; no crop of 1000 from {samples - 999}"):
        utterances.read_batch([2], [samples - 999], batch)
    with pytest.raises(ValueError, match="no crop of 1000 from -1"):
        utterances.read_batch([2], [-1], batch)
    with pytest.raises(IndexError, match="there are 30"):
        utterances.read_batch([30], [0], batch)
    with pytest.raises(ValueError, match=r"expected contiguous int16 \(1, samples\)"):
        utterances.read_batch([2], [0], batch.astype(np.float32))


def _read_in_child(utterances, rows, starts, shape, queue):
    batch = np.zeros(shape, np.int16)
    utterances.read_batch(rows, starts, batch)
    queue.put(batch.tobytes())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_forked_and_spawned_processes_read_the_same_crops(tmp_path, method):
    out, audio = packed(tmp_path)
    utterances = open_shards(out)
    rows, starts, expected = crops(utterances, audio, 40, 800)
    utterances.read_batch(rows, starts, np.zeros((40, 800), np.int16))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [
        context.Process(target=_read_in_child, args=(utterances, rows, starts, (40, 800), queue)) for _ in range(2)
    ]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert results == [expected.tobytes()] * 2


def test_threads_share_a_reader(tmp_path):
    out, audio = packed(tmp_path, shard_bytes=1)
    utterances = open_shards(out)
    wrong = []

    def read(seed: int) -> None:
        for i in range(20):
            rows, starts, expected = crops(utterances, audio, 20, 800, seed * 100 + i)
            batch = np.zeros((20, 800), np.int16)
            utterances.read_batch(rows, starts, batch)
            wrong.append(not np.array_equal(batch, expected))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 80 and not any(wrong)


def open_tars(folder) -> int:
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sum(link.startswith(str(folder)) and link.endswith(".tar") for link in links)


def test_at_most_256_tars_are_open_in_a_process(tmp_path):
    rng = np.random.default_rng(0)
    audio = {f"s{i:03d}/a/0": noise(rng, 400) for i in range(270)}
    for key, samples in audio.items():
        write_wav(tmp_path / "wav" / f"{key}.wav", samples)
    pack.pack(entries_of(tmp_path / "wav", audio), tmp_path / "out", shard_bytes=1, progress=False)
    utterances = open_shards(tmp_path / "out")
    gc.collect()
    batch = np.zeros((540, 300), np.int16)
    rows = rng.permutation(np.repeat(np.arange(270), 2))
    utterances.read_batch(rows, np.full(540, 50), batch)
    assert open_tars(tmp_path) == 256
    assert np.array_equal(batch, [audio[utterances.key(row)][50:350] for row in rows.tolist()])
    del utterances
    assert open_tars(tmp_path) == 0


def check_every_way_in(both, audio):
    rows, starts, expected = crops(both, audio, 80, 900)
    batch = np.zeros((80, 900), np.int16)
    both.read_batch(rows, starts, batch)
    assert np.array_equal(batch, expected)
    assert [both.key(row) for row in both.find(list(audio)).tolist()] == list(audio)


def test_several_data_sets_keep_their_speakers_apart(tmp_path):
    first, a = packed(tmp_path / "1", "vox1")
    b = make_corpus(tmp_path / "2" / "wav", seed=7, speakers=8, prefix="id")
    moved = {key.replace("session", "other"): samples for key, samples in b.items()}
    entries = [(key.split("/")[0], key, str(tmp_path / "2" / "wav" / f"{old}.wav")) for key, old in zip(moved, b)]
    pack.pack(entries, tmp_path / "2" / "vox2", shard_bytes=60000, codec="flac", progress=False)
    both = open_shards([first, tmp_path / "2" / "vox2"])
    assert len(both) == len(a) + len(b)
    assert list(both.speakers) == [f"vox1/id{s:03d}" for s in range(6)] + [f"vox2/id{s:03d}" for s in range(8)]
    assert both.labels.tolist() == list(range(14)) and both.speaker_rows[-1] == len(both)
    check_every_way_in(both, a | moved)


def test_united_speakers_own_the_rows_of_all_data_sets(tmp_path):
    first, a = packed(tmp_path / "1", "vox1")
    b = make_corpus(tmp_path / "2" / "wav", seed=7, speakers=8, prefix="id")
    moved = {key.replace("session", "other"): samples for key, samples in b.items()}
    entries = [(key.split("/")[0], key, str(tmp_path / "2" / "wav" / f"{old}.wav")) for key, old in zip(moved, b)]
    pack.pack(entries, tmp_path / "2" / "vox2", shard_bytes=60000, progress=False)
    both = open_shards([first, tmp_path / "2" / "vox2"], unite_speakers=True)
    assert list(both.speakers) == [f"id{s:03d}" for s in range(8)] and both.labels.tolist() == list(range(8))
    for s, speaker in enumerate(both.speakers):
        rows = range(int(both.speaker_rows[s]), int(both.speaker_rows[s + 1]))
        assert sorted(both.key(row) for row in rows) == sorted(k for k in a | moved if k.startswith(speaker + "/"))
        assert [len((a | moved)[both.key(row)]) for row in rows] == [int(both.samples[row]) for row in rows]
    check_every_way_in(both, a | moved)


def test_data_sets_that_do_not_go_together_are_refused(tmp_path):
    first, audio = packed(tmp_path / "1", "vox")
    second, _ = packed(tmp_path / "2", "vox")
    with pytest.raises(ShardError, match=r"the same folder name \(vox, vox\); rename one, or unite speakers"):
        open_shards([first, second])
    write_wav(tmp_path / "x.wav", noise(np.random.default_rng(0), 900), rate=8000)
    pack.pack([("x", "x/x", str(tmp_path / "x.wav"))], tmp_path / "slow", sample_rate=8000, progress=False)
    with pytest.raises(ShardError, match="slow has 8000 Hz, .*vox has 16000 Hz"):
        open_shards([first, tmp_path / "slow"])
    with pytest.raises(ShardError, match="no data set given"):
        open_shards([])
    both = open_shards([first, second], unite_speakers=True)
    with pytest.raises(ShardError, match="stands in several of the data sets"):
        both.find([min(audio)])


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    out, audio = packed(tmp_path)
    entries = entries_of(tmp_path / "wav", audio)
    pack.pack(entries, tmp_path / "other", seed=4, shard_bytes=30000, progress=False)
    assert open_shards(tmp_path / "other").fingerprint == open_shards(out).fingerprint
    pack.pack(entries[1:], tmp_path / "less", progress=False)
    assert open_shards(tmp_path / "less").fingerprint != open_shards(out).fingerprint


def test_a_data_set_that_changed_is_noticed_by_a_later_worker(tmp_path):
    out, audio = packed(tmp_path)
    stored = pickle.dumps(open_shards(out))
    new = make_corpus(tmp_path / "new", prefix="zz")
    pack.pack(entries_of(tmp_path / "new", new), out, append=True, progress=False)
    with pytest.raises(ShardError, match="the data set has changed since the run began"):
        pickle.loads(stored)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.unlink(), "line 3: .* is not there; correct the list or the root folder"),
        (lambda path: os.truncate(path, 1000), "line 3: .*wav: cut: its header promises"),
        (lambda path: path.write_text("text"), "line 3: .*wav: not readable as audio"),
        (
            lambda path: write_wav(path, np.zeros(900), rate=8000),
            "line 3: .*wav: 8000 Hz, expected 16000 Hz; convert it",
        ),
        (lambda path: write_wav(path, np.zeros(900), channels=2), "line 3: .*wav: 2 channels, expected mono"),
        (lambda path: write_wav(path, np.zeros(0)), r"line 3: .*wav: no audio in it \(0 samples\)"),
    ],
)
def test_bad_loose_files_are_errors_that_name_their_line(tmp_path, make, message):
    audio = make_corpus(tmp_path)
    lines = (tmp_path / "list.txt").read_text().splitlines()
    (tmp_path / "list.txt").write_text("\n".join([lines[4], "", *lines[:4]]))
    make(tmp_path / f"{lines[0].split()[1]}")
    assert lines[0].split()[1][:-4] in audio
    with pytest.raises(ShardError, match=message):
        open_files(tmp_path / "list.txt", tmp_path)


def test_a_loose_file_that_is_cut_later_is_an_error(tmp_path):
    make_corpus(tmp_path)
    loose = open_files(tmp_path / "list.txt", tmp_path)
    path = tmp_path / f"{loose.key(0)}.wav"
    os.truncate(path, 200)
    with pytest.raises(ShardError, match="wav: cut: its header promises"):
        loose.read_utterance(0)


def test_names_are_decoded_when_asked_for():
    names = reader.Names(np.array([b"a", "ü".encode()]))
    assert (len(names), names[1], names[-2], list(names), names[:1]) == (2, "ü", "a", ["a", "ü"], ["a"])


def test_lists_give_keys_whatever_folder_lies_before_the_speaker(tmp_path):
    (tmp_path / "list.txt").write_text("id1 dev/wav/id1/x/1.wav\nid2 y/2.flac\r\n")
    found = [(speaker, key) for speaker, key, _ in lists.read_list(tmp_path / "list.txt", tmp_path)]
    assert found == [("id1", "id1/x/1"), ("id2", "id2/y/2")]
