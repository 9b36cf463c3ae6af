"""Voices under names: a name is text and no path, processes may write at once, damage and another network are named."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from spknet import cli
from spknet.use.enrolments import EnrolmentError, Enrolments, Voice

NAMES = ["Anna", "../../etc/passwd", "/", ".", "a/b", "Zoë 日本 🎤", "x" * 200, "CON", "a\\b", "<b>"]


def one(value: float = 1.0, n: int = 1) -> Voice:
    return Voice(np.full((n, 4), value, np.float32), [{"file": "a.wav", "seconds": 1.0}] * n, "abc")


def test_a_name_is_no_path(tmp_path):
    voices = Enrolments(tmp_path / "voices")
    for i, name in enumerate(NAMES):
        assert voices.add(name, one(i)) == 1
    assert list(voices.all()) == sorted(NAMES)
    assert [int(voices.all()[name].vectors[0, 0]) for name in NAMES] == list(range(len(NAMES)))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 * len(NAMES) + 1 and {path.parent for path in files} == {tmp_path / "voices"}
    for name in ("", "  ", "a\nb", "a\0b", "x" * 201):
        with pytest.raises(EnrolmentError, match="is no name: expected 1 to 200 characters"):
            voices.add(name, one())


def test_a_name_that_is_there_is_added_to_or_replaced_when_asked(tmp_path):
    voices = Enrolments(tmp_path)
    voices.add("Anna", one(1))
    with pytest.raises(EnrolmentError, match="'Anna' is enrolled in .* already; give --add or --replace"):
        voices.add("Anna", one(2))
    assert voices.add("Anna", one(2), "add") == 2
    assert voices.all()["Anna"].vectors[:, 0].tolist() == [1, 2]
    with pytest.raises(EnrolmentError, match="'Anna' was enrolled with another network"):
        voices.add("Anna", Voice(np.ones((1, 4)), [], "def"), "add")
    assert voices.add("Anna", one(3), "replace") == 1
    assert voices.all()["Anna"].vectors[:, 0].tolist() == [3]


def test_many_at_once_lose_nothing(tmp_path):
    def add(i):
        Enrolments(tmp_path / "voices").add(f"name {i % 3}", one(i), "add")
        return sum(len(voice.vectors) for voice in Enrolments(tmp_path / "voices").all().values())

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(add, range(30)))
    found = Enrolments(tmp_path / "voices").all()
    assert sorted(int(v) for voice in found.values() for v in voice.vectors[:, 0]) == list(range(30))
    assert all(1 <= count <= 30 for count in seen)


def test_plain_files_and_damage_is_named(tmp_path):
    voices = Enrolments(tmp_path)
    voices.add("Anna", one(1))
    [about], [vectors] = tmp_path.glob("*.json"), tmp_path.glob("*.npz")
    assert json.loads(about.read_text())["name"] == "Anna"
    assert np.load(vectors, allow_pickle=False)["vectors"].tolist() == [[1, 1, 1, 1]]
    content = vectors.read_bytes()
    for damaged in (content[:-9], b""):
        vectors.write_bytes(damaged)
        with pytest.raises(EnrolmentError, match="its npz do not belong together; enroll 'Anna' anew with --replace"):
            voices.all()
    vectors.unlink()
    with pytest.raises(EnrolmentError, match="no whole enrolment .* anew with --replace"):
        voices.all()
    assert voices.add("Anna", one(2), "replace") == 1 and voices.all()["Anna"].vectors[0, 0] == 2
    with pytest.raises(EnrolmentError, match="no such folder of enrolments; `spknet enroll NAME FILES` makes one"):
        Enrolments(tmp_path / "nowhere").all()


def test_commands_enroll_and_identify(run_dir, wavs, tmp_path, capsys):
    network = ["--checkpoint", str(run_dir), "--device", "cpu"]
    for name, path in zip(("Anna", "Bo", "../Cleo"), wavs[:3]):
        assert cli.main(["enroll", name, path, *network, "--to", str(tmp_path / "voices")]) == 0
    assert "Anna: 1 recording in" in capsys.readouterr().out
    words = ["identify", wavs[1], *network, "--among", str(tmp_path / "voices")]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("Bo (threshold ")
    assert cli.main(["identify", wavs[3], *words[2:], "--json", "--threshold", "1"]) == 1
    assert json.loads(capsys.readouterr().out)["name"] is None
    assert cli.main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["name"] == "Bo" and list(said["scores"])[0] == "Bo" and set(said["scores"]) == {"Anna", "Bo", "../Cleo"}
    assert said["scores"]["Bo"]["score"] == pytest.approx(1)
    for path in (tmp_path / "voices").glob("*.json"):
        about = json.loads(path.read_text())
        path.write_text(json.dumps(about | {"weights_sha256": "of another network"}))
    assert cli.main(words) == 2
    assert "'../Cleo' and 2 more were enrolled with another network" in capsys.readouterr().err
