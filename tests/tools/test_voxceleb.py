"""VoxCeleb in its real layout, small and made up: parts of a zip of AAC to shards, lists, loose files; the seed's flags; kill -9."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from shards.reader import open_shards
from tests.tools.test_voxceleb_extract import by_ffmpeg
from tools.bench import voxceleb as bench_voxceleb
from tools.voxceleb import __main__ as voxceleb
from tools.voxceleb.extract import ArchiveError
from tools.voxceleb.files import ARCHIVES, check_trials, count_report, with_checksums

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg makes and reads AAC")


def wav(seed):
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(seed).normal(0, 0.1, 4000), 16000, format="WAV", subtype="PCM_16")
    return out.getvalue()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A folder as the host has it: vox2_dev in 8 parts, vox1_dev in 4, both test sets whole; AAC and PCM; and the files."""
    folder, scratch = tmp_path_factory.mktemp("host"), tmp_path_factory.mktemp("aac")
    paths = bench_voxceleb.make_aac(scratch, speakers=3, utterances=4, seconds=0.8)
    aac = {str(path.relative_to(scratch)): path.read_bytes() for path in paths}
    vox1 = {f"id1000{s}/video{s}{u}/0000{u}.wav": wav(10 * s + u) for s in range(4) for u in range(2)}
    sets = {
        "vox2_dev": (aac, 8),
        "vox2_test": ({"id90001/video/00001.m4a": next(iter(aac.values()))}, 1),
        "vox1_dev": ({name: data for name, data in vox1.items() if name < "id10002"}, 4),
        "vox1_test": ({name: data for name, data in vox1.items() if name > "id10002"}, 1),
    }
    lines = [line for name, (files, n) in sets.items() for line in bench_voxceleb.make_parts(folder, name, files, n)]
    (folder / "checksums.txt").write_text("\n".join(lines) + "\n")
    return folder, scratch, vox1


def command(host, save, *words):
    folder = host[0]
    return [
        *words,
        "--save_path",
        str(save),
        "--checksums",
        str(folder / "checksums.txt"),
        "--base-url",
        folder.as_uri(),
    ]


def check_shards(shards, host):
    _, scratch, vox1 = host
    for name, count in [("vox2_dev", 12), ("vox2_test", 1), ("vox1_dev", 4), ("vox1_test", 4)]:
        assert len(open_shards(shards / name)) == count
    data = open_shards(shards / "vox2_dev")
    for path in sorted(scratch.rglob("*.m4a")):
        [row] = data.find([str(path.relative_to(scratch))[:-4]])
        assert data.read_utterance(int(row)).astype("<i2").tobytes() == by_ffmpeg(path)
    data = open_shards([shards / "vox1_dev", shards / "vox1_test"])
    for row in range(len(data)):
        key = "/".join(data.key(row).split("/")[-3:])
        assert data.read_utterance(row).astype("<i2").tobytes() == vox1[key + ".wav"][44:]


def test_all_goes_from_the_parts_to_shards_that_equal_ffmpegs_decoding(host, tmp_path, capsys):
    save = tmp_path / "data"
    assert voxceleb.main(command(host, save, "all", "--workers", "2")) == 0
    check_shards(save / "shards", host)
    out = capsys.readouterr().out
    assert "vox2_dev: 3 speakers, 12 utterances; published 5,994 and 1,092,009: missing 5,991 speakers and" in out
    zips = sorted(archive.zip for archive in ARCHIVES.values())
    assert sorted(path.name for path in save.iterdir() if path.is_file()) == sorted(
        zips + [name + ".md5" for name in zips]
    )
    lines = (save / "lists" / "vox2_dev.txt").read_text().splitlines()
    assert lines[0] == "id00012 vox2_dev_aac.zip::dev/aac/id00012/session0000/00001.m4a" and len(lines) == 12
    for name in zips:
        (save / name).unlink()
    words = command(host, save, "all")
    assert voxceleb.main(words[: words.index("--base-url")]) == 0, "what is packed is not downloaded again"
    assert not any((save / name).exists() for name in zips)


def test_steps_one_by_one_through_loose_files_give_the_same_audio(host, tmp_path):
    save = tmp_path / "data"
    assert voxceleb.main(command(host, save, "download")) == 0
    assert len(list(save.glob("vox2_dev_aac_part*.md5"))) == 8
    assert voxceleb.main(command(host, save, "extract")) == 0
    assert len(list(save.glob("*.zip.extracted"))) == len(list(save.glob("*.zip*"))) == 4
    assert (save / "voxceleb1/test/wav/id10002/video20/00000.wav").read_bytes() == host[2]["id10002/video20/00000.wav"]
    assert voxceleb.main(command(host, save, "download")) == 0, "what was extracted is not downloaded again"
    assert not list(save.glob("*.zip")) and not list(save.glob("*_part*"))
    assert voxceleb.main(command(host, save, "convert")) == 0
    first = save / "voxceleb2/dev/wav/id00012/session0000/00001.wav"
    assert first.read_bytes()[44:] == by_ffmpeg(host[1] / "id00012/session0000/00001.m4a")
    assert voxceleb.main(command(host, save, "lists")) == 0
    line = (save / "lists" / "vox2_dev.txt").read_text().splitlines()[0]
    assert line == "id00012 voxceleb2/dev/wav/id00012/session0000/00001.wav"
    assert voxceleb.main(command(host, save, "pack", "--workers", "1")) == 0
    check_shards(save / "shards", host)


def test_dataprep_flags_work_as_they_are_and_make_the_trainers_folders(host, tmp_path, monkeypatch):
    monkeypatch.setenv("VOXCELEB_URL", host[0].as_uri())
    save, sums = str(tmp_path / "data"), ["--checksums", str(host[0] / "checksums.txt")]
    assert voxceleb.main(["--save_path", save, "--download", "--user", "me", "--password", "pw", *sums]) == 0
    assert voxceleb.main(["--save_path", save, "--extract", *sums]) == 0
    assert voxceleb.main(["--save_path", save, "--convert", *sums]) == 0
    data = tmp_path / "data"
    assert (data / "voxceleb1/id10000/video00/00000.wav").exists() and (
        data / "voxceleb1/id10003/video31/00001.wav"
    ).exists()
    assert (
        len(list((data / "voxceleb2").glob("id*/*/*.wav"))) == len(list((data / "voxceleb2").glob("id*/*/*.m4a"))) == 13
    )
    assert (data / "vox2_dev_aac.zip").exists(), "dataprep.py kept the archives"


def test_newer_dataprep_flags_take_a_key_and_concatenate(host, tmp_path):
    address = host[0].as_uri() + "/{file}?key={key}"
    options = ["--save_path", str(tmp_path), "--checksums", str(host[0] / "checksums.txt"), "--base-url", address]
    assert voxceleb.main([*options, "--download", "--key", "k"]) == 0
    assert voxceleb.main([*options, "--concatenate"]) == 0
    assert (tmp_path / "vox2_dev_aac.zip").exists() and not list(tmp_path.glob("*_part*"))


def test_official_lists_are_checked_line_by_line(host, tmp_path, capsys):
    save = tmp_path / "data"
    assert voxceleb.main(command(host, save, "download")) == 0
    good, trials = tmp_path / "train_list.txt", tmp_path / "veri_test.txt"
    good.write_text("id00012 id00012/session0000/00001.wav\nid10000 id10000/video00/00000.wav\n")
    trials.write_text(
        "1 id10002/video20/00000.wav id10002/video21/00001.wav\n0 id10002/video20/00000.wav id10003/video31/00001.wav\n"
    )
    assert voxceleb.main(command(host, save, "lists", "--train-list", str(good), "--test-list", str(trials))) == 0
    out = capsys.readouterr().out
    assert "train_list.txt: 2 speakers, 2 utterances, all there" in out
    assert "veri_test.txt: 2 trials, 1 targets, 3 files: not one of the published lists" in out
    resolved = (save / "lists" / "train_list.txt").read_text().splitlines()
    assert resolved[0] == "id00012 vox2_dev_aac.zip::dev/aac/id00012/session0000/00001.m4a"
    for option, content, text in [
        (
            "--train-list",
            "id00012 id00012/a/00001.wav\nid1 id1/b/2.wav\n",
            "2 files are not there, first id00012/a/00001.wav, id1/b/2.wav",
        ),
        (
            "--train-list",
            "id00012 id00013/a/00001.wav\n",
            "line 1: speaker id00012 has the path id00013/a/00001.wav of another",
        ),
        ("--train-list", "id00012\n", "line 1: found 'id00012', expected `speaker path`"),
        ("--test-list", "2 a/b/c.wav a/b/d.wav\n", "line 1: label '2', expected 0 or 1"),
        ("--test-list", "1 a/b/c.wav a/b/d.wav\n", "2 files are not there"),
    ]:
        bad = tmp_path / "bad.txt"
        bad.write_text(content)
        assert voxceleb.main(command(host, save, "lists", option, str(bad))) == 2
        assert text in capsys.readouterr().err


def test_published_counts_and_lists_are_recognised(tmp_path):
    complete = {f"id{i:05d}": 122 for i in range(39)} | {"id10309": 4874 - 39 * 122}
    assert count_report("vox1_test", ARCHIVES["vox1_test"], complete) == (
        True,
        "vox1_test: 40 speakers, 4,874 utterances, complete",
    )
    fewer = complete | {"id10309": 0}
    assert count_report("vox1_test", ARCHIVES["vox1_test"], fewer)[1].endswith("missing 116 utterances")
    assert "names that are not like id00012: bob" in count_report("vox1_test", ARCHIVES["vox1_test"], {"bob": 1})[1]
    path, sources = tmp_path / "trials.txt", {"id1/a/0": "x"}
    for total, targets, name in [(37720, 18860, "VoxCeleb1-O, original"), (37611, 18802, "VoxCeleb1-O, cleaned")]:
        path.write_text("1 id1/a/0.wav id1/a/0.wav\n" * targets + "0 id1/a/0.wav id1/a/0.wav\n" * (total - targets))
        assert name in check_trials(path, sources)


def test_every_published_archive_has_the_files_of_its_page():
    assert [len(archive.parts) for archive in ARCHIVES.values()] == [4, 0, 8, 0]
    assert ARCHIVES["vox2_dev"].parts["vox2_dev_aac_partah"] == "6b84a81b9af72a9d9eecbb3b1f602e65"
    assert ARCHIVES["vox1_dev"].place("wav/id10001/a/00001.wav") == "voxceleb1/dev/wav/id10001/a/00001.wav"
    assert ARCHIVES["vox2_dev"].flat().place("dev/aac/id00012/a/00001.m4a") == "voxceleb2/id00012/a/00001.m4a"


def test_wrong_words_are_answered_with_what_was_expected(host, tmp_path, capsys):
    save = tmp_path / "data"
    cases = [
        (
            command(host, save, "pack", "--sets", "vox3"),
            "--sets vox3: expected some of vox1_dev,vox1_test,vox2_dev,vox2_test",
        ),
        (command(host, save, "pack"), "has neither vox1_dev_wav.zip nor audio in voxceleb1/dev/wav: run `download`"),
        (command(host, save, "extract"), "lacks vox1_dev_wav_partaa, vox1_dev_wav_partab"),
        (command(host, save, "convert"), "no m4a files below voxceleb2"),
    ]
    for words, text in cases:
        assert voxceleb.main(words) == 2 and text in capsys.readouterr().err
    with pytest.raises(SystemExit):
        voxceleb.main(["--save_path", str(save)])
    assert "give one step of download, join," in capsys.readouterr().err
    (tmp_path / "sums.txt").write_text("nonsense\n")
    with pytest.raises(ArchiveError, match="line 1: found 'nonsense', expected `md5  name`"):
        with_checksums(tmp_path / "sums.txt")


def test_part_damaged_on_the_disk_is_found_before_it_is_used_up(host, tmp_path, capsys):
    save = tmp_path / "data"
    assert voxceleb.main(command(host, save, "download", "--sets", "vox2_dev")) == 0
    part = save / "vox2_dev_aac_partac"
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    os.utime(part, (time.time() + 5, time.time() + 5))
    assert voxceleb.main(command(host, save, "pack", "--sets", "vox2_dev")) == 2
    assert "vox2_dev_aac_partac: md5" in capsys.readouterr().err
    assert len(list(save.glob("vox2_dev_aac_parta?"))) == 8 and not (save / "vox2_dev_aac.zip").exists()


def test_full_disk_shows_before_extraction_and_before_packing(host, tmp_path, capsys, monkeypatch):
    save = tmp_path / "data"
    assert voxceleb.main(command(host, save, "download", "--sets", "vox2_dev")) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert voxceleb.main(command(host, save, "pack", "--sets", "vox2_dev")) == 2
    assert "GB are free: make room, choose another --shards, or --codec flac" in capsys.readouterr().err
    assert voxceleb.main(command(host, save, "extract", "--sets", "vox2_dev")) == 2
    assert "unpacking vox2_dev_aac.zip needs 0.00 GB in" in capsys.readouterr().err
    assert (save / "vox2_dev_aac.zip").exists() and not (save / "voxceleb2").exists()


def test_one_bad_file_in_the_zip_is_named_and_can_be_left_out(host, tmp_path, capsys):
    files = {str(path.relative_to(host[1])): path.read_bytes() for path in sorted(host[1].rglob("*.m4a"))}
    bad = list(files)[5]
    files[bad] = files[bad][:1000]
    lines = bench_voxceleb.make_parts(tmp_path, "vox2_dev", files, parts=2)
    (tmp_path / "sums.txt").write_text("\n".join(lines) + "\n")
    words = ["pack", "--save_path", str(tmp_path), "--checksums", str(tmp_path / "sums.txt"), "--workers", "1"]
    assert voxceleb.main(words) == 2
    assert f"vox2_dev_aac.zip::dev/aac/{bad}: cut or damaged" in capsys.readouterr().err
    assert voxceleb.main([*words, "--skip-bad", str(tmp_path / "bad")]) == 0
    assert len(open_shards(tmp_path / "shards" / "vox2_dev")) == 11
    assert bad.removesuffix(".m4a") in (tmp_path / "bad.vox2_dev").read_text()


def test_hostile_archive_is_not_packed_either(tmp_path, capsys):
    made = tmp_path / "vox1_test_wav.zip"
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("wav/id1/a/0.wav", wav(0))
        file.writestr("wav/../../../evil.wav", wav(0))
    (tmp_path / "sums.txt").write_text(f"{hashlib.md5(made.read_bytes()).hexdigest()}  {made.name}\n")
    assert voxceleb.main(["pack", "--save_path", str(tmp_path), "--checksums", str(tmp_path / "sums.txt")]) == 2
    assert "member 'wav/../../../evil.wav' leaves its folder" in capsys.readouterr().err
    assert not (tmp_path / "shards" / "vox1_test" / "index").exists()


@pytest.mark.slow
def test_all_killed_again_and_again_ends_with_the_same_shards(host, tmp_path):
    words = [sys.executable, "-m", "tools.voxceleb", *command(host, tmp_path / "data", "all", "--workers", "2")]
    words += ["--shard-bytes", "100000"]
    pause, kills = 0.15, 0
    while True:
        process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, errors = process.communicate(timeout=pause)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            pause, kills = 1.6 * pause, kills + 1
    assert process.returncode == 0, errors.decode()
    assert kills > 1
    check_shards(tmp_path / "data" / "shards", host)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.name.endswith((".partial", ".joining"))]


@pytest.mark.slow
def test_peak_of_extra_disk_stays_below_a_tenth_of_the_archive(tmp_path, host):
    folder = tmp_path / "data"
    folder.mkdir()
    files = {}
    for path in host[1].rglob("*.m4a"):  # each 30 times as large, by a box that players skip
        data = path.read_bytes()
        box = (29 * len(data)).to_bytes(4, "big") + b"free"
        files[str(path.relative_to(host[1]))] = data + box.ljust(29 * len(data), b"\0")
    lines = bench_voxceleb.make_parts(folder, "vox2_dev", files, parts=8)
    (folder / "checksums.txt").write_text("\n".join(lines) + "\n")
    before = bench_voxceleb.used(folder)
    with bench_voxceleb.DiskWatch(folder) as watch:
        bench_voxceleb.our_way(folder, workers=2)
    extra = watch.peak - before - bench_voxceleb.used(folder / "shards")
    assert extra < 0.1 * before, (extra, before)
