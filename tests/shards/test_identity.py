"""Tars and index belong together; what is no file never blocks; caches are believed only while nobody wrote to them."""

import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from shards import cache, index, stage
from shards.cache import Cache
from shards.errors import UserError
from shards.format import BLOCK, ShardError, sha256_file
from shards.loose import open_files
from shards.pack import pack
from shards.reader import open_shards
from shards.verify import main as verify_main
from shards.verify import verify
from tests.shards.test_corpus import RATE, entries_of, make_corpus, noise, packed, write_wav

OLD = Path(__file__).resolve().parents[1] / "reference" / "shards_v1"


def twins(folder: Path, codec: str = "wav") -> tuple[Path, Path]:
    """Two data sets of equal keys and lengths, with other audio."""
    for name, seed in (("a", 1), ("b", 2)):
        rng = np.random.default_rng(seed)
        audio = {f"id{s}/x/{u}": noise(rng, 1500) for s in range(4) for u in range(3)}
        for key, samples in audio.items():
            write_wav(folder / name / "wav" / f"{key}.wav", samples)
        entries = entries_of(folder / name / "wav", audio)
        pack(entries, folder / name / "out", shard_bytes=12000, progress=False, codec=codec)
    return folder / "a/out", folder / "b/out"


def crops(out: Path) -> np.ndarray:
    utterances = open_shards(out)
    batch = np.empty((len(utterances), 1000), np.int16)
    utterances.read_batch(np.arange(len(utterances)), np.zeros(len(utterances), np.int64), batch)
    return batch


def test_a_tar_of_another_data_set_of_equal_shape_is_noticed_at_the_first_touch(tmp_path):
    a, b = twins(tmp_path)
    tar = "train-000001.tar"
    assert (a / tar).stat().st_size == (b / tar).stat().st_size
    shutil.copy(b / tar, a / tar)
    with pytest.raises(ShardError, match="train-000001.tar: its last block is not that of the tar in index.json"):
        crops(a)


def test_an_index_of_another_data_set_of_equal_shape_is_noticed_at_the_first_touch(tmp_path):
    a, b = twins(tmp_path)
    shutil.rmtree(a / "index")
    shutil.copytree(b / "index", a / "index")
    with pytest.raises(ShardError, match="its last block is not that of the tar in index.json"):
        crops(a)


@pytest.mark.parametrize("name", ["utterances.npy", "identities.npy"])
def test_one_file_of_an_exchanged_index_is_noticed_when_it_is_opened(tmp_path, name):
    a, b = twins(tmp_path)
    shutil.copy(b / "index" / name, a / "index" / name)
    with pytest.raises(ShardError, match=f"{name}.*of another data set"):
        crops(a)


def test_the_last_block_of_a_tar_is_the_sum_of_all_before_it(tmp_path):
    out, _ = packed(tmp_path)
    for tar in out.glob("*.tar"):
        data = tar.read_bytes()
        (tmp_path / "body").write_bytes(data[:-BLOCK])
        expected = b"spknet-shards identity\n" + sha256_file(tmp_path / "body").encode() + b"\n"
        assert data[-BLOCK:] == expected.ljust(BLOCK, b"\0") and data[-3 * BLOCK : -BLOCK] == bytes(2 * BLOCK)


def test_a_data_set_of_the_format_before_identities_is_read_verified_and_added_to(tmp_path):
    out = tmp_path / "old"
    shutil.copytree(OLD, out)
    assert not (out / "index" / "identities.npy").exists() and not verify(out).damages
    expected = {
        f"id{s}/a/{u}": (np.arange(150) * (1 + s) * (3 + u) - 100).astype(np.int16) for s in range(2) for u in range(2)
    }
    utterances = open_shards(out)
    for key, samples in expected.items():
        assert np.array_equal(utterances.read_utterance(int(utterances.find([key])[0])), samples)
    write_wav(tmp_path / "wav/id9/a/0.wav", noise(np.random.default_rng(3), 400))
    pack([("id9", "id9/a/0", str(tmp_path / "wav/id9/a/0.wav"))], out, append=True, progress=False)
    assert not verify(out).damages
    more = open_shards(out)
    assert len(more) == 5 and more._indexes[0].identity(0) is None and more._indexes[0].identity(2) is not None
    for key, samples in expected.items():
        assert np.array_equal(more.read_utterance(int(more.find([key])[0])), samples)


TOUCHED = [
    "train-000000.tar",
    "index/index.json",
    "index/utterances.npy",
    "index/labels.npy",
    "index/identities.npy",
    "SHA256SUMS",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "dangling link"])
@pytest.mark.parametrize("name", [*TOUCHED, "parts/000000.npz", "parts/plan-000.npz"])
def test_a_pipe_device_or_folder_in_place_of_a_file_is_damage_and_blocks_nobody(tmp_path, name, kind, capsys):
    out, _ = packed(tmp_path)
    (out / name).unlink()
    make = {"fifo": os.mkfifo, "folder": os.mkdir}.get(kind)
    if make:
        make(out / name)
    else:
        (out / name).symlink_to("/dev/zero" if kind == "device" else "nowhere")
    report = verify(out)
    assert report.damages and verify_main([str(out)]) == 1
    assert "Traceback" not in capsys.readouterr().err
    if not name.startswith(("parts", "SHA")):
        with pytest.raises((UserError, OSError)):
            crops(out)
    if name.startswith("parts"):
        with pytest.raises((UserError, OSError)):
            pack(entries_of(tmp_path / "wav", make_corpus(tmp_path / "wav")), out, shard_bytes=60001, progress=False)


def damaged_copy(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with open(path, "r+b") as file:  # in place: the same inode and size
        file.write(data)


def test_a_damaged_copy_of_equal_size_is_not_believed_and_is_made_again(tmp_path):
    out, _ = packed(tmp_path)
    stage.stage(out, tmp_path / "cache")
    copy = min((tmp_path / "cache").glob("*.tar"))
    [entry] = [
        e
        for e in index.read_meta(out)["shardlist"]
        if copy.name.endswith(e["url"]) and copy.name.startswith(e["sha256"][:16])
    ]
    damaged_copy(copy)
    node = Cache(tmp_path / "cache", copy=False)
    assert node.tar(out / entry["url"], entry) == out / entry["url"]
    stage.stage(out, tmp_path / "cache")
    assert sha256_file(copy) == entry["sha256"] and node.tar(out / entry["url"], entry) == copy


def test_a_copy_that_was_only_touched_is_checked_and_kept(tmp_path):
    out, _ = packed(tmp_path)
    stage.stage(out, tmp_path / "cache")
    copy = min((tmp_path / "cache").glob("*.tar"))
    inode = copy.stat().st_ino
    os.utime(copy)
    (tmp_path / "cache" / f"{copy.name}.ok").unlink()
    stage.stage(out, tmp_path / "cache")
    assert copy.stat().st_ino == inode and (tmp_path / "cache" / f"{copy.name}.ok").exists()


@pytest.mark.parametrize("name", ["labels.npy", "utterances.npy", "identities.npy"])
def test_a_damaged_copy_of_an_index_file_is_made_again(tmp_path, name):
    out, _ = packed(tmp_path)
    open_shards(out, cache_dir=tmp_path / "cache")
    [copy] = (tmp_path / "cache").rglob(name)
    damaged_copy(copy)
    open_shards(out, cache_dir=tmp_path / "cache")
    assert copy.read_bytes() == (out / "index" / name).read_bytes()


def test_the_size_of_a_cache_is_counted_while_files_come_and_go(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "gone").write_bytes(b"1")
    node, real = Cache(tmp_path, copy=False), os.stat

    def stat(path, **options):
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert node.used() == 5


def test_a_foreign_or_open_folder_among_the_temporary_ones_is_not_used(tmp_path, monkeypatch):
    out, _ = packed(tmp_path)
    monkeypatch.setattr(cache, "is_network", lambda path: True)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"spknet-{os.getuid()}"
    open_shards(out)
    assert folder.stat().st_mode & 0o777 == 0o700
    os.chmod(folder, 0o777)
    with pytest.raises(ShardError, match="not a folder of this user that others cannot write to; .*--data.cache_dir"):
        open_shards(out)
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)
    with pytest.raises(ShardError, match="not a folder of this user"):
        open_shards(out)
    folder.unlink()
    real = os.lstat

    def lstat(path, **options):
        status = real(path, **options)
        return os.stat_result((*status[:4], 12345, *status[5:])) if str(path) == str(folder) else status

    monkeypatch.setattr(os, "lstat", lstat)
    with pytest.raises(ShardError, match="not a folder of this user"):
        open_shards(out)


def test_a_cache_folder_that_cannot_be_is_one_sentence(tmp_path, capsys):
    out, _ = packed(tmp_path)
    (tmp_path / "file").write_text("x")
    assert stage.main([str(out), str(tmp_path / "file")]) == 2
    assert "give another one (--data.cache_dir)" in capsys.readouterr().err


STEREO, FLOATS = "stereo of equal size", "float of equal size"


@pytest.mark.parametrize("change", [STEREO, FLOATS, "shorter", "flac", "gone", "pipe"])
def test_a_loose_file_replaced_under_a_run_is_refused(tmp_path, change):
    import soundfile

    make_corpus(tmp_path)
    loose = open_files(tmp_path / "list.txt", tmp_path)
    path, n = tmp_path / f"{loose.key(0)}.wav", int(loose.samples[0])
    x = np.zeros(n)
    path.unlink()
    if change == STEREO:
        soundfile.write(path, np.zeros((n // 2, 2)), RATE, subtype="PCM_16")
    elif change == FLOATS:
        soundfile.write(path, x[: n // 2], RATE, subtype="FLOAT")
    elif change == "shorter":
        soundfile.write(path, x[:-2], RATE, subtype="PCM_16")
    elif change == "flac":
        soundfile.write(path, x, RATE, format="FLAC")
    elif change == "pipe":
        os.mkfifo(path)
    with pytest.raises(ShardError, match=path.name):
        loose.read_batch(np.array([0]), np.array([0]), np.empty((1, 800), np.int16))


def test_a_loose_file_that_is_only_copied_anew_goes_on(tmp_path):
    audio = make_corpus(tmp_path)
    loose = open_files(tmp_path / "list.txt", tmp_path)
    path = tmp_path / f"{loose.key(0)}.wav"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    assert np.array_equal(loose.read_utterance(0), audio[loose.key(0)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(out: Path, other: Path, draw: random.Random) -> str:
    """One random damage: a bit, a cut, zeros, a file gone, exchanged within the data set or for another's."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and "parts" not in path.parts)
    path, kind = (
        draw.choice(files),
        draw.choice(["bit", "bit", "bit", "cut", "zeros", "tail", "gone", "exchanged", "foreign"]),
    )
    data = bytearray(path.read_bytes())
    if kind == "bit":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    elif kind == "zeros":
        at = draw.randrange(len(data))
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif kind == "tail":
        data += draw.randbytes(draw.randrange(1, 2000))
    elif kind == "exchanged":
        data = bytearray(draw.choice([p for p in files if p.suffix == path.suffix]).read_bytes())
    elif kind == "foreign":
        data = bytearray((other / path.relative_to(out)).read_bytes())
    path.unlink()
    if kind != "gone":
        path.write_bytes(data)
    return f"{kind} of {path.name}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_150_random_damages_are_never_used_silently_beyond_the_limit_of_crops(tmp_path, codec):
    # The limit: a flipped sample inside the PCM of a WAV shard shows when the whole utterance is read, not in a crop.
    out, other = twins(tmp_path, codec)
    utterances = open_shards(out)
    whole = {utterances.key(row): utterances.read_utterance(row) for row in range(len(utterances))}
    seed = int(os.environ.get("SHARDS_SEED", 13))
    draw, started, noticed = random.Random(seed), time.monotonic(), 0
    for attempt in range(150):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        what = f"{codec}, seed {seed}, attempt {attempt}: {damage(copy, other, draw)}"
        changed = contents(copy) != contents(out)
        assert bool(verify(copy).damages) == changed, what
        try:
            opened = open_shards(copy)
        except UserError:
            noticed += 1
            continue
        for row in range(len(opened)):
            crop = np.empty((1, 1000), np.int16)
            try:
                opened.read_batch(np.array([row]), np.array([300]), crop)
                key, read = opened.key(row), True
            except UserError:
                noticed, read = noticed + 1, False
            try:
                samples = opened.read_utterance(row)
            except UserError:
                noticed += 1
                # A crop that was read may differ in WAV shards only, and only where the whole is known to be damaged.
                assert codec == "wav" or not read, what
                continue
            assert np.array_equal(samples, whole[opened.key(row)]), what
            assert not read or np.array_equal(crop[0], whole[key][300:1300]), what
    assert noticed > 60 and time.monotonic() - started < 250
