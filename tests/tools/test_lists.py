"""Lists from folders, Kaldi tables and CSV files; every wrong line is named."""

import pytest

from shards import lists, make_lists

FILES = ["spk1/s1/a.wav", "spk1/s2/b.wav", "spk2/s1/a.wav", "spk2/s1/notes.txt", "readme.md"]


@pytest.fixture
def root(tmp_path):
    for name in FILES:
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "root"


def run(root, *options):
    out = root.parent / "list.txt"
    out.unlink(missing_ok=True)
    code = make_lists.main(["--root", str(root), "--out", str(out), *map(str, options)])
    return code, out.read_text() if out.exists() else None


def test_pattern_finds_the_speaker_in_each_path(root, capsys):
    wanted = "spk1 spk1/s1/a.wav\nspk1 spk1/s2/b.wav\nspk2 spk2/s1/a.wav\n"
    for pattern in ("{speaker}/{session}/*.wav", "{speaker}/**.wav", "./{speaker}/**/*.wav"):
        assert run(root, "--pattern", pattern) == (0, wanted)
    assert (
        "2 speakers, 3 utterances: 1 to 2 a speaker, median 1.5; 1 speakers with a single one"
        in capsys.readouterr().out
    )
    assert [key for _, key, _ in lists.read_list(root.parent / "list.txt", root)] == [
        "spk1/s1/a",
        "spk1/s2/b",
        "spk2/s1/a",
    ]


def test_speaker_may_be_a_part_of_a_name(tmp_path):
    for name in ("84-121.flac", "84-122.flac", "1272-9.flac"):
        (tmp_path / "root").mkdir(exist_ok=True)
        (tmp_path / "root" / name).write_bytes(b"x")
    assert (
        run(tmp_path / "root", "--pattern", "{speaker}-*.flac")[1]
        == "1272 1272-9.flac\n84 84-121.flac\n84 84-122.flac\n"
    )


def test_kaldi_tables_and_absolute_paths_below_the_root(root):
    (root / "wav.scp").write_text(f"u1 {root}/spk1/s1/a.wav\nu2 spk2/s1/a.wav\n")
    (root / "utt2spk").write_text("u1 A\nu2 B\n")
    assert run(root, "--wav-scp", root / "wav.scp", "--utt2spk", root / "utt2spk") == (
        0,
        "A spk1/s1/a.wav\nB spk2/s1/a.wav\n",
    )


@pytest.mark.parametrize(("name", "comma"), [("t.csv", ","), ("t.tsv", "\t")])
def test_table_with_columns(root, name, comma):
    (root / name).write_text(
        f"id{comma}client_id{comma}file\n1{comma}A{comma}spk1/s1/a.wav\n2{comma}B{comma}spk2/s1/a.wav\n"
    )
    options = ("--csv", root / name, "--speaker-column", "client_id", "--path-column", "file")
    assert run(root, *options) == (0, "A spk1/s1/a.wav\nB spk2/s1/a.wav\n")


WRONG = {
    "no such file": ("speaker,path\nA,gone.wav\n", "gone.wav: no such file (speaker A)"),
    "outside": ("speaker,path\nA,../../a.wav\n", "line 2: ../../a.wav is not below --root"),
    "twice": ("speaker,path\nA,spk1/s1/a.wav\nA,spk1/s1/a.wav\n", "has the same key, 'A/spk1/s1/a'"),
    "bad speaker": ("speaker,path\nA/B,spk1/s1/a.wav\n", "expected a name without '/'"),
    "empty cell": ("speaker,path\n,spk1/s1/a.wav\n", "line 2: speaker or path is empty"),
    "columns": ("who,path\nA,spk1/s1/a.wav\n", "no column speaker; its columns are who, path"),
    "nothing": ("speaker,path\n", "the table is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_line_is_named_and_no_list_is_written(root, capsys, case):
    content, text = WRONG[case]
    (root / "t.csv").write_text(content)
    assert run(root, "--csv", root / "t.csv") == (2, None)
    assert text in capsys.readouterr().err


def test_kaldi_commands_are_not_run_and_unknown_utterances_named(root, capsys):
    (root / "utt2spk").write_text("u1 A\n")
    for line, text in [
        (f"u1 touch {root}/ran |", "a command, expected a file"),
        ("u2 spk1/s1/a.wav", "line 1: utterance u2 is not in"),
        ("u1", "expected two columns"),
    ]:
        (root / "wav.scp").write_text(line + "\n")
        assert run(root, "--wav-scp", root / "wav.scp", "--utt2spk", root / "utt2spk") == (2, None)
        assert text in capsys.readouterr().err
    assert not (root / "ran").exists()


def test_pattern_that_fits_nothing_shows_a_path(root, capsys):
    assert run(root, "--pattern", "{speaker}/*.wav") == (2, None)
    assert "no file fits '{speaker}/*.wav', for instance readme.md does not" in capsys.readouterr().err
    assert run(root, "--pattern", "*/*/*.wav") == (2, None)
    assert "expected {speaker} once" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        make_lists.main(["--root", str(root), "--out", "x"])
