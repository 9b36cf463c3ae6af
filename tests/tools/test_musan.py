"""MUSAN and RIRS_NOISES, small and made up in their real layout, from a host to shards."""

import hashlib
import io
import tarfile
import zipfile

import numpy as np
import pytest
import soundfile

from shards.reader import open_shards
from tools import musan

NOISES = ["noise/free-sound/noise-free-sound-0000", "music/fma/music-fma-0000", "speech/librivox/speech-librivox-0000"]
RIRS = ["smallroom/Room001/Room001-00001", "mediumroom/Room001/Room001-00001", "largeroom/Room001/Room001-00001"]


def wav(seed, samples=1500, rate=16000):
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(seed).normal(0, 0.1, samples), rate, format="WAV", subtype="PCM_16")
    return out.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as file:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def write_sums(folder):
    archives = [path for path in sorted(folder.iterdir()) if path.suffix in (".gz", ".zip")]
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in archives]
    (folder / "sums.txt").write_text("".join(lines))


@pytest.fixture
def host(tmp_path):
    folder = tmp_path / "host"
    folder.mkdir()
    members = [(f"musan/{name}.wav", wav(i)) for i, name in enumerate(NOISES)]
    write_tar(
        folder / "musan.tar.gz", [("musan/README", b"text"), ("musan/noise/free-sound/LICENSE", b"text"), *members]
    )
    with zipfile.ZipFile(folder / "rirs_noises.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for i, name in enumerate(RIRS):
            file.writestr(f"RIRS_NOISES/simulated_rirs/{name}.wav", wav(10 + i))
        file.writestr("RIRS_NOISES/pointsource_noises/noise-free-sound-0000.wav", wav(20))
        file.writestr("RIRS_NOISES/real_rirs_isotropic_noises/rir_list", b"text")
    write_sums(folder)
    return folder


def run(host, save, *words):
    sums, address = str(host / "sums.txt"), host.as_uri()
    return musan.main([*words, "--save_path", str(save), "--checksums", sums, "--base-url", address, "--workers", "1"])


def audio(data):
    found = {}
    for row in range(len(data)):
        found[data.key(row)] = data.read_utterance(row).astype("<i2").tobytes()
    return found


def test_archives_become_shards_with_categories_as_speakers(host, tmp_path):
    save = tmp_path / "data"
    assert run(host, save, "all") == 0
    noise, rirs = open_shards(save / "shards" / "musan"), open_shards(save / "shards" / "rirs")
    assert audio(noise) == {name: wav(i)[44:] for i, name in enumerate(NOISES)}
    assert list(noise.speakers) == ["music", "noise", "speech"]
    assert audio(rirs) == {f"rir/{name}": wav(10 + i)[44:] for i, name in enumerate(RIRS[:2])}
    assert list(rirs.speakers) == ["rir"]
    assert not (save / "musan.tar").exists(), "what was unpacked for reading is gone again"
    (save / "musan.tar.gz").unlink()
    (save / "rirs_noises.zip").unlink()
    assert run(host, save, "all") == 0, "what is packed is not downloaded again"
    assert not (save / "musan.tar.gz").exists()


def test_other_rooms_and_one_set_can_be_chosen(host, tmp_path):
    assert run(host, tmp_path / "data", "all", "--sets", "rirs", "--rooms", "largeroom") == 0
    assert list(audio(open_shards(tmp_path / "data" / "shards" / "rirs"))) == [f"rir/{RIRS[2]}"]
    assert not (tmp_path / "data" / "shards" / "musan").exists()


def link(name):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc"
    return info


HOSTILE = {
    "traversal": ([("musan/noise/a/../../../../evil.wav", b"1")], "leaves its folder"),
    "absolute": ([("/evil.wav", b"1")], "leaves its folder"),
    "link": ([(link("musan/noise"), b"")], "is a link or a device"),
    "duplicate": ([("musan/noise/a/b.wav", b"1"), ("musan/noise/a/b.wav", b"1")], "stands there twice"),
    "nothing of use": ([("musan/README", b"1")], "no recordings in it that are wanted"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tar_is_refused_and_writes_nothing(host, tmp_path, capsys, case):
    members, text = HOSTILE[case]
    write_tar(host / "musan.tar.gz", members)
    write_sums(host)
    assert run(host, tmp_path / "data", "all", "--sets", "musan") == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "data" / "shards" / "musan" / "index").exists()
    assert not [path for path in tmp_path.rglob("evil*")]


def test_cut_archive_and_bomb_leave_nothing_half_unpacked(host, tmp_path, capsys, monkeypatch):
    archive = host / "musan.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-200])
    write_sums(host)
    assert run(host, tmp_path / "a", "all", "--sets", "musan") == 2
    assert "cannot be unpacked" in capsys.readouterr().err
    write_tar(archive, [("musan/noise/a/b.wav", bytes(3 << 20))])
    write_sums(host)
    monkeypatch.setattr(musan, "LARGEST_TAR", 1 << 20)
    assert run(host, tmp_path / "b", "all", "--sets", "musan") == 2
    assert "it is not MUSAN; nothing was kept" in capsys.readouterr().err
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert sorted(path.name for path in folder.iterdir()) == ["musan.tar.gz", "musan.tar.gz.md5"]


def test_missing_archive_and_unknown_set_are_named(host, tmp_path, capsys):
    assert run(host, tmp_path / "data", "pack") == 2
    assert "musan.tar.gz is not there: run `download` first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(host, tmp_path / "data", "pack", "--sets", "musan,dns")
    assert "--sets dns: expected musan, rirs or both" in capsys.readouterr().err


def test_recording_at_another_rate_is_refused_unless_converted(host, tmp_path, capsys):
    write_tar(host / "musan.tar.gz", [("musan/noise/a/b.wav", wav(0, 3000, 8000))])
    write_sums(host)
    assert run(host, tmp_path / "data", "all", "--sets", "musan") == 2
    assert "8000 Hz, expected 16000 Hz" in capsys.readouterr().err
    again = ("pack", "--sets", "musan", "--convert", "--shards", str(tmp_path / "converted"))
    assert run(host, tmp_path / "data", *again) == 0
    data = open_shards(tmp_path / "converted" / "musan")
    assert data.key(0) == "noise/a/b" and data.samples[0] == 6000


def test_test_noise_is_split_by_recording_and_rooms_stay_whole(host, tmp_path):
    names = [f"{kind}/a/{kind}-{i:04d}" for kind in ("noise", "music", "speech") for i in range(12)]
    write_tar(host / "musan.tar.gz", [(f"musan/{name}.wav", wav(i, 400)) for i, name in enumerate(names)])
    with zipfile.ZipFile(host / "rirs_noises.zip", "w") as file:
        for i in range(40):
            file.writestr(
                f"RIRS_NOISES/simulated_rirs/smallroom/Room{i // 4:03d}/Room{i // 4:03d}-{i:05d}.wav", wav(i, 400)
            )
    write_sums(host)
    assert run(host, tmp_path / "a", "all", "--test-share", "0.3") == 0
    parts = {name: set(audio(open_shards(tmp_path / "a" / "shards" / name))) for name in musan_parts()}
    assert parts["musan"] | parts["musan_test"] == set(names) and not parts["musan"] & parts["musan_test"]
    assert 4 <= len(parts["musan_test"]) <= 18
    rooms = [{key.split("/")[2] for key in parts[name]} for name in ("rirs", "rirs_test")]
    assert not rooms[0] & rooms[1] and len(rooms[0] | rooms[1]) == 10 and len(rooms[1]) >= 1
    # The split belongs to the names: what is left out elsewhere changes nothing for the others.
    assert {name for name in names if musan.for_test(name, 0.3)} == parts["musan_test"]
    assert parts["musan_test"] >= {name for name in names if musan.for_test(name, 0.1)}


def musan_parts():
    return ["musan", "musan_test", "rirs", "rirs_test"]
