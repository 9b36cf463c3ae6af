"""Packing: the same bytes whatever the workers, tasks and kills; what is refused, and in which words."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from shards import index, lists, parts, plan
from shards.archive import LOCATION, read_source
from shards.format import ShardError
from shards.pack import main, pack, parse_task
from shards.reader import open_shards
from tests.shards.test_corpus import entries_of, make_corpus, noise, packed, write_wav

REPOSITORY = Path(__file__).resolve().parents[2]


def sums(out: Path) -> bytes:
    return (out / "SHA256SUMS").read_bytes()


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def command(root: Path, out: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "shards.pack", "--list", root / "list.txt", "--root", root, "--out", out]
    return [str(word) for word in [*words, "--shard-bytes", "60000", *more]]


def test_packs_are_bit_identical_for_any_workers_and_tasks(tmp_path, capsys):
    make_corpus(tmp_path / "wav")
    root = str(tmp_path / "wav")
    shared = ["--list", f"{root}/list.txt", "--root", root, "--shard-bytes", "60000"]
    assert main([*shared, "--out", str(tmp_path / "a"), "--workers", "1"]) == 0
    assert main([*shared, "--out", str(tmp_path / "b"), "--workers", "3"]) == 0
    for task in ("1/3", "0/3", "2/3"):
        assert main(["--out", str(tmp_path / "c"), "--merge"]) == 2
        assert main([*shared, "--out", str(tmp_path / "c"), "--workers", "1", "--task", task]) == 0
    assert "tars are not packed yet" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "c"), "--merge"]) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def test_sha256sum_itself_checks_a_pack(tmp_path):
    out, _ = packed(tmp_path)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(files(out)) - {"SHA256SUMS"}


def test_packing_again_writes_nothing_and_another_list_is_refused(tmp_path):
    out, audio = packed(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    entries = entries_of(tmp_path / "wav", audio)
    assert pack(entries, out, shard_bytes=60000, progress=False) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(
        ShardError, match=r"was begun with another list \(30 utterances, now 29\); give what it was begun with"
    ):
        pack(entries[1:], out, shard_bytes=60000, progress=False)
    with pytest.raises(ShardError, match=r"was begun with the seed 0 \(now 1\)"):
        pack(entries, out, shard_bytes=60000, seed=1, progress=False)


def test_a_speaker_lies_in_one_tar_and_the_speakers_are_shuffled(tmp_path):
    out, _ = packed(tmp_path)
    opened = index.open_index(out)
    tars = [set(opened.rows["shard"][a:b]) for a, b in zip(opened.speaker_rows[:-1], opened.speaker_rows[1:])]
    assert all(len(tar) == 1 for tar in tars)
    assert [min(tar) for tar in tars] != sorted(min(tar) for tar in tars)


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    make_corpus(folder / "wav", speakers=40, utterances=20)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    subprocess.run(
        command(folder / "wav", folder / "whole", "--workers", "2"), env=environment, check=True, capture_output=True
    )
    duration = time.monotonic() - started
    draw, landed = random.Random(seed), 0
    for attempt in range(10 * kills):
        out = folder / f"killed{landed}"
        process = subprocess.Popen(
            command(folder / "wav", out, "--workers", "2"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(draw.uniform(0.3, 1.0) * duration)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            continue
        subprocess.run(command(folder / "wav", out, "--workers", "2"), env=environment, check=True, capture_output=True)
        assert files(out) == files(folder / "whole"), f"seed {seed}, attempt {attempt}"
        landed += 1
        if landed == kills:
            return
    pytest.fail(f"only {landed} of {kills} kills came before the end")


@pytest.mark.slow
def test_a_pack_killed_at_random_moments_ends_with_the_same_bytes(tmp_path):
    # More kills: SHARDS_KILLS=20 python -m pytest tests/shards/test_pack.py -k killed
    seed = int(os.environ.get("SHARDS_SEED", time.time_ns() % 10**6))
    print("SHARDS_SEED", seed)
    kill_and_resume(tmp_path, int(os.environ.get("SHARDS_KILLS", 3)), seed)


def test_a_torn_part_or_tar_is_packed_again(tmp_path):
    out, audio = packed(tmp_path)
    whole = files(out)
    (out / "index" / "index.json").unlink()
    os.truncate(out / "parts" / "000001.npz", 100)
    os.truncate(out / "train-000002.tar", 512)
    (out / "train-000003.tar").unlink()
    (out / ".train-000000.tar.abc.tmp").write_bytes(b"left by a killed process")
    pack(entries_of(tmp_path / "wav", audio), out, shard_bytes=60000, progress=False)
    assert files(out) == whole


def test_memory_of_the_list_is_flat():
    def peak(n: int) -> int:
        tracemalloc.start()
        plan.make_entries(
            (f"id{i // 50:05d}", f"id{i // 50:05d}/abcdefghijk/{i:05d}", f"/data/wav/{i}.wav") for i in range(n)
        )
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    # 26 bytes of key, 20 of source, 8-byte positions: nothing that grows by an object per utterance.
    assert (peak(16000) - peak(4000)) / 12000 < 250


@pytest.mark.parametrize(
    "line, message",
    [
        (b"id1 ../x.wav", r"line 2: path '\.\./x.wav' leaves the root folder"),
        (b"id1 /etc/x.wav", "line 2: path '/etc/x.wav' is not below the root folder"),
        (b"id1 /dev/zero", "line 2: path '/dev/zero' is not below the root folder"),
        (b"id1 id1/con/x.wav", "line 2: key 'id1/con/x' has the name of a device"),
        (b"id1", "line 2: found 'id1', expected `speaker path`"),
        (b"id1 id1/a\0b.wav", r"line 2: key 'id1/a\\x00b' has a control character"),
        (b"id1 id1/a\x0bb.wav", r"line 2: key 'id1/a\\x0bb' has a control character"),
        (b"id1 id1/\xff.wav", "line 2: .* is not UTF-8"),
        (b"x" * 128 + b" id1/a.wav", "line 2: speaker .* has 128 bytes, too many for a key; `spknet lists`"),
        (b"a/b a/b/c.wav", "line 2: speaker 'a/b': expected a name without '/'"),
    ],
)
def test_names_that_attack_are_refused_with_their_line(tmp_path, line, message):
    (tmp_path / "list.txt").write_bytes(b"id0 id0/a.wav\n" + line + b"\n")
    with pytest.raises(ShardError, match=message):
        pack(lists.read_list(tmp_path / "list.txt", tmp_path), tmp_path / "out", progress=False)
    assert not list(tmp_path.rglob("*.tar"))


def test_a_newline_in_a_name_given_to_the_function_is_refused(tmp_path):
    with pytest.raises(ShardError, match=r"key 'id1/a\\nb' has a control character"):
        pack([("id1", "id1/a\nb", "x.wav")], tmp_path / "out", progress=False)


def test_a_device_behind_a_link_is_refused(tmp_path):
    (tmp_path / "a.wav").symlink_to("/dev/zero")
    with pytest.raises(ShardError, match="a.wav is not a regular file; expected audio"):
        pack([("id1", "id1/a", str(tmp_path / "a.wav"))], tmp_path / "out", progress=False)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(ShardError, match="key 'id1/a' stands 2 times in the list"):
        pack([("id1", "id1/a", "x.wav"), ("id1", "id1/a", "y.wav")], tmp_path / "out", progress=False)


def bad_audio(folder: Path) -> dict[str, str]:
    """name -> the error that its file deserves"""
    rng = np.random.default_rng(3)
    write_wav(folder / "rate.wav", noise(rng, 2000), rate=8000)
    write_wav(folder / "stereo.wav", noise(rng, 4000), channels=2)
    write_wav(folder / "empty.wav", noise(rng, 0))
    write_wav(folder / "cut.wav", noise(rng, 4000))
    os.truncate(folder / "cut.wav", 5000)
    (folder / "text.wav").write_text("this is no audio")
    (folder / "nothing.wav").write_bytes(b"")
    import soundfile

    soundfile.write(folder / "float.wav", noise(rng, 2000) / 32768, 16000, subtype="FLOAT")
    return {
        "rate": "rate.wav: 8000 Hz, expected 16000 Hz; convert it, or pack with --convert",
        "stereo": "stereo.wav: 2 channels, expected mono",
        "empty": r"empty.wav: no audio in it \(0 samples\)",
        "cut": "cut.wav: cut: its header promises 8000 bytes of audio, 4956 are there",
        "text": "text.wav: not readable as audio",
        "nothing": "nothing.wav: not readable as audio",
        "float": "float.wav: FLOAT samples, expected 16 bits",
        "absent": "1 of 1 files of the list are not there, the first: .*absent.wav",
    }


def test_bad_audio_is_an_error_that_names_the_file(tmp_path):
    for name, message in bad_audio(tmp_path).items():
        with pytest.raises(ShardError, match=message):
            pack([("id1", f"id1/{name}", str(tmp_path / f"{name}.wav"))], tmp_path / f"out-{name}", progress=False)
        assert not (tmp_path / f"out-{name}" / "index").exists()


def test_skip_bad_lists_what_was_left_out_and_why(tmp_path):
    audio = make_corpus(tmp_path / "wav")
    entries = entries_of(tmp_path / "wav", audio)
    bad = bad_audio(tmp_path)
    entries += [("id1", f"id1/{name}", str(tmp_path / f"{name}.wav")) for name in bad]
    with pytest.raises(ShardError, match="or leave them out with --skip-bad FILE"):
        pack(entries, tmp_path / "out", shard_bytes=60000, progress=False)
    pack(entries, tmp_path / "out", shard_bytes=60000, skip_bad=tmp_path / "bad.txt", progress=False, workers=2)
    lines = (tmp_path / "bad.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == sorted(f"id1/{name}" for name in bad)
    assert [line for line in lines if "absent.wav: no such file" in line]
    assert index.read_meta(tmp_path / "out")["skipped"] == len(bad)
    utterances = open_shards(tmp_path / "out")
    assert len(utterances) == len(audio) and "id1" not in list(utterances.speakers)


def test_a_damaged_file_may_be_replaced_before_the_pack_goes_on(tmp_path):
    audio = make_corpus(tmp_path / "wav")
    entries = entries_of(tmp_path / "wav", audio)
    path, key = Path(entries[7][2]), entries[7][1]
    os.truncate(path, 1000)
    with pytest.raises(ShardError, match="cut: its header promises"):
        pack(entries, tmp_path / "out", shard_bytes=60000, progress=False)
    kept = {tar: tar.stat().st_mtime_ns for tar in (tmp_path / "out").glob("*.tar")}
    write_wav(path, audio[key])
    pack(entries, tmp_path / "out", shard_bytes=60000, progress=False)
    assert {tar: tar.stat().st_mtime_ns for tar in kept} == kept
    utterances = open_shards(tmp_path / "out")
    assert np.array_equal(utterances.read_utterance(int(utterances.find([key])[0])), audio[key])


def test_a_file_that_goes_away_after_the_list_was_read_is_named(tmp_path):
    audio = make_corpus(tmp_path / "wav")
    entries = entries_of(tmp_path / "wav", audio)
    pack(entries, tmp_path / "out", shard_bytes=60000, progress=False, task=(0, 10**6))
    Path(entries[3][2]).unlink()
    (tmp_path / "out" / "parts" / "000000.npz").unlink()
    with pytest.raises(ShardError, match=r"1 of \d+ files of the list are not there, the first: .*wav"):
        pack(entries, tmp_path / "out", shard_bytes=60000, progress=False)
    with pytest.raises(ShardError, match="00003.wav: not readable .No such file"):
        read_source(entries[3][2], np.array((0, 0, 0, 0, 255), LOCATION)[()])


def test_a_pack_of_nothing_but_bad_audio_is_an_error(tmp_path):
    (tmp_path / "a.wav").write_text("no audio")
    with pytest.raises(ShardError, match="every utterance was left out as bad"):
        pack(
            [("id1", "id1/a", str(tmp_path / "a.wav"))], tmp_path / "out", skip_bad=tmp_path / "bad.txt", progress=False
        )


def test_a_full_disk_is_a_clear_error_and_a_resumable_state(tmp_path):
    audio = make_corpus(tmp_path / "wav", speakers=3, utterances=30)
    out = tmp_path / "out"
    # A limit on the size of a file stands for the full disk: writing fails in the middle of a tar in the same way.
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, resource.RLIM_INFINITY))\n"
    limited += "from shards.pack import main; sys.exit(main(sys.argv[1:]))"
    words = command(tmp_path / "wav", out, "--workers", "1")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", limited, *words[3:]], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert f"no room left in {out}" in result.stderr and "run the same command again" in result.stderr
    assert not list(out.rglob("*.tmp")) and not (out / "index").exists()
    subprocess.run(words, env=environment, check=True, capture_output=True)
    assert len(open_shards(out)) == len(audio)


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system needs root")
def test_a_full_file_system_is_a_clear_error(tmp_path):
    audio = make_corpus(tmp_path / "wav", speakers=8, utterances=30)
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ShardError, match="no room left in .* the finished tars are kept; make room and run"):
            pack(entries_of(tmp_path / "wav", audio), small / "out", shard_bytes=200000, progress=False, workers=2)
        assert list((small / "out").glob("*.tar")) and not (small / "out" / "index" / "index.json").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_appended_utterances_and_speakers_leave_labels_and_tars_as_they_were(tmp_path):
    out, audio = packed(tmp_path)
    old = open_shards(out)
    labels = dict(zip(old.speakers, old.labels.tolist()))
    tars = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    rng = np.random.default_rng(9)
    new = {f"id001/more/{i}": noise(rng, 3000) for i in range(3)} | {f"aa{s}/x/0": noise(rng, 3000) for s in range(3)}
    for key, samples in new.items():
        write_wav(tmp_path / "new" / f"{key}.wav", samples)
    pack(entries_of(tmp_path / "new", new), out, shard_bytes=60000, append=True, progress=False)
    utterances = open_shards(out)
    after = dict(zip(utterances.speakers, utterances.labels.tolist()))
    assert {speaker: after[speaker] for speaker in labels} == labels
    assert sorted(after[f"aa{s}"] for s in range(3)) == [6, 7, 8]
    assert all((out / name).read_bytes() == data for name, data in tars.items())
    for key, samples in (audio | new).items():
        assert np.array_equal(utterances.read_utterance(int(utterances.find([key])[0])), samples)
    row = utterances.find(["id001/more/1"])[0]
    speaker = list(utterances.speakers).index("id001")
    assert utterances.speaker_rows[speaker] <= row < utterances.speaker_rows[speaker + 1]
    appended = files(out)
    assert pack(entries_of(tmp_path / "new", new), out, shard_bytes=60000, append=True, progress=False) == 0
    (out / "index" / "index.json").unlink()
    parts.merge(out)
    assert files(out) == appended


def test_appending_what_does_not_fit_is_refused(tmp_path):
    out, audio = packed(tmp_path)
    entries = entries_of(tmp_path / "wav", audio)
    with pytest.raises(ShardError, match="2 of the keys are in .* already, the first: 'id000"):
        pack(entries[:2], out, append=True, progress=False)
    with pytest.raises(ShardError, match="holds 16000 Hz wav, asked for 8000 Hz wav"):
        pack(entries[:2], out, append=True, sample_rate=8000, progress=False)
    with pytest.raises(ShardError, match="holds no data set to append to"):
        pack(entries, tmp_path / "none", append=True, progress=False)


def test_an_unfinished_append_must_be_finished_before_another(tmp_path):
    out, audio = packed(tmp_path)
    new = make_corpus(tmp_path / "new", speakers=3, seed=4, prefix="zz")
    more = make_corpus(tmp_path / "more", speakers=3, seed=5, prefix="yy")
    pack(entries_of(tmp_path / "new", new), out, shard_bytes=60000, append=True, task=(0, 2), progress=False)
    with pytest.raises(ShardError, match="an --append with another list is unfinished"):
        pack(entries_of(tmp_path / "more", more), out, append=True, progress=False)
    assert len(open_shards(out)) == len(audio)
    pack(entries_of(tmp_path / "new", new), out, shard_bytes=60000, append=True, progress=False)
    assert len(open_shards(out)) == len(audio) + len(new)


@pytest.mark.parametrize("text", ["3/3", "x", "1", "-1/3", "1/2/3"])
def test_a_wrong_task_is_refused(text):
    with pytest.raises(ShardError, match=f"--task {text}: expected i/n with i from 0 to n - 1"):
        parse_task(text)


def test_merging_parts_of_another_plan_is_refused(tmp_path):
    out, audio = packed(tmp_path)
    other = tmp_path / "other"
    pack(entries_of(tmp_path / "wav", audio), other, shard_bytes=60000, seed=3, progress=False)
    (out / "parts" / "000001.npz").write_bytes((other / "parts" / "000001.npz").read_bytes())
    with pytest.raises(ShardError, match="000001.npz belongs to another plan; run the same pack"):
        parts.merge(out)


def test_a_folder_without_parts_cannot_be_merged(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--merge"]) == 2
    assert "is not there; pack something first" in capsys.readouterr().err
    assert main(["--out", str(tmp_path)]) == 2
    assert "--list is missing" in capsys.readouterr().err


def test_an_empty_list_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(ShardError, match="the list is empty; expected lines `speaker path`"):
        pack(lists.read_list(tmp_path / "list.txt", tmp_path), tmp_path / "out", progress=False)


def test_the_soft_limit_on_open_files_is_not_needed_to_pack(tmp_path):
    audio = make_corpus(tmp_path / "wav", speakers=10, utterances=10)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        pack(entries_of(tmp_path / "wav", audio), tmp_path / "out", shard_bytes=60000, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
