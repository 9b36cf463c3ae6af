"""The one parser of training lists: encodings, line ends, spaces, absolute paths, names, duplicates; and what becomes of names."""

import codecs
import os

import numpy as np
import pytest

from shards.format import MAX_KEY, ShardError
from shards.lists import key_of, key_of_name, read_list
from shards.make_lists import main as make_lists
from shards.pack import main, pack
from shards.reader import open_files, open_shards
from spknet.evaluate.utterances import Sources
from tests.shards.test_corpus import noise, write_wav

TEXT = "id1 id1/a/0.wav\nid2 id2/my talk/caf\u00e9 1.wav\n"
WANTED = [("id1", "id1/a/0"), ("id2", "id2/my talk/caf\u00e9 1")]
ENCODED = {
    "UTF-8": TEXT.encode(),
    "UTF-8 with a byte order mark": codecs.BOM_UTF8 + TEXT.encode(),
    "UTF-16 LE": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "UTF-16 BE": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "UTF-32": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "CR LF": TEXT.replace("\n", "\r\n").encode(),
    "CR": TEXT.replace("\n", "\r").encode(),
    "no end of the last line": TEXT.strip().encode(),
    "tabs and blanks": TEXT.replace("id1 ", "id1\t ").replace("\n", "  \n\n").encode(),
}
WRONG = {
    "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "holds zero bytes: UTF-16 without a byte order mark"),
    "cut UTF-16": (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le")[:-1], "begins as UTF-16 but is not"),
    "gzip": (b"\x1f\x8b\x08rest", "is compressed"),
    "latin-1": (b"id1 id1/caf\xe9.wav\n", "line 1: .* is not UTF-8; rename the file"),
    "one word": (b"id1 id1/a.wav\nid1\n", "line 2: found 'id1', expected `speaker path`"),
    "empty": (b"\n\n", "the list is empty"),
    "the same line twice": (
        b"id1 id1/a.wav\n\nid1 id1/b.wav\nid1 id1/a.wav\n",
        r"'id1/a' stands 2 times .*lines 1, 4\).*take one out",
    ),
    "two files of one key": (
        b"id1 id1/a.b.wav\nid1 id1/a_b.wav\n",
        r"'id1/a_b' stands 2 times .*lines 1, 2\).*rename one",
    ),
}


def keys(path, root="/data"):
    return [(speaker, key) for speaker, key, _ in read_list(path, root)]


@pytest.mark.parametrize("case", ENCODED)
def test_lists_are_read_in_every_usual_encoding_and_with_every_line_end(tmp_path, case):
    (tmp_path / "list.txt").write_bytes(ENCODED[case])
    assert keys(tmp_path / "list.txt") == WANTED


@pytest.mark.parametrize("case", WRONG)
def test_lists_that_cannot_be_read_say_why_with_line_numbers(tmp_path, case):
    data, message = WRONG[case]
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(ShardError, match=message):
        pack(read_list(tmp_path / "list.txt", tmp_path), tmp_path / "out", progress=False)
    with pytest.raises(ShardError, match=message):
        open_files(tmp_path / "list.txt", tmp_path)


@pytest.mark.timeout(20)
def test_a_list_that_is_a_folder_or_a_pipe_is_one_sentence(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nowhere"):
        assert main(["--list", str(path), "--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and str(path) in said and "Traceback" not in said
    with pytest.raises(ShardError, match="is a folder, expected a file"):
        open_files(tmp_path, tmp_path)


def test_absolute_paths_below_the_root_are_the_same_as_relative_ones(tmp_path):
    (tmp_path / "list.txt").write_text(f"id1 {tmp_path}/id1/a/0.wav\nid1 id1/a/1.wav\n")
    found = list(read_list(tmp_path / "list.txt", tmp_path))
    assert found == [("id1", f"id1/a/{i}", f"{tmp_path}/id1/a/{i}.wav") for i in range(2)]
    assert keys(tmp_path / "list.txt", "/")[0] == ("id1", "id1/a/0")
    with pytest.raises(
        ShardError, match="line 1: path .* is not below the root folder /srv; give `/` or a folder above"
    ):
        keys(tmp_path / "list.txt", "/srv")


def test_dots_in_names_are_mapped_and_long_keys_shortened_uniquely():
    assert key_of("s1", "v/12.5.wav") == "s1/v/12_5"
    assert key_of("s.3", "s.3/v.1/talk no. 1.wav") == "s.3/v.1/talk no_ 1"
    long = [key_of("id1", f"id1/{'folder/' * 20}{i}.wav") for i in range(2)]
    assert long[0] != long[1] and all(len(key) == MAX_KEY and key.startswith("id1/folder/") for key in long)
    wide = key_of("id1", "id1/" + "\u7b2c" * 60 + ".wav")
    assert len(wide.encode()) <= MAX_KEY and key_of_name("id1/" + "\u7b2c" * 60 + ".wav") == wide


def corpus(folder, *names):
    rng = np.random.default_rng(0)
    audio = {name: noise(rng, 1000) for name in names}
    for name, samples in audio.items():
        write_wav(folder / name, samples)
    return audio


def packed_from_pattern(folder, pattern, capsys):
    words = ["--root", str(folder), "--pattern", pattern, "--out", str(folder / "list.txt")]
    assert make_lists(words) == 0
    out = str(folder / "out")
    assert main(["--list", str(folder / "list.txt"), "--root", str(folder), "--out", out, "--workers", "1"]) == 0
    return open_shards(out), capsys.readouterr().out


def test_names_with_dots_are_packed_and_found_by_their_path_in_evaluation(tmp_path, capsys):
    audio = corpus(tmp_path, "s1/v/12.5.wav", "s1/v/talk no. 1.wav", "s2/v/a.b.wav", "s.3/v/0.wav")
    utterances, said = packed_from_pattern(tmp_path, "{speaker}/*/*.wav", capsys)
    assert len(utterances) == 4 and "3 keys are not their paths: dots became _" in said
    sources = Sources(shards=str(tmp_path / "out"))
    places = sources.locate(list(audio))
    assert places.missing() == []
    for i, samples in enumerate(audio.values()):
        assert np.array_equal(sources.read(places, i), samples)


def test_what_a_mac_keeps_beside_files_is_left_out_with_a_count(tmp_path, capsys):
    corpus(tmp_path, "s1/v/0.wav", "s2/v/0.wav")
    for speaker in ("s1", "s2"):
        (tmp_path / speaker / "v" / "._0.wav").write_bytes(bytes.fromhex("0005160700020000") + bytes(90))
        (tmp_path / speaker / ".DS_Store").write_bytes(b"Bud1")
    utterances, said = packed_from_pattern(tmp_path, "{speaker}/*/*.wav", capsys)
    assert len(utterances) == 2 and "left out: 2 files that a Mac keeps beside others" in said
    (tmp_path / "all.txt").write_text("s1 s1/v/0.wav\ns1 s1/v/._0.wav\n")
    words = [
        "--list",
        str(tmp_path / "all.txt"),
        "--root",
        str(tmp_path),
        "--out",
        str(tmp_path / "b"),
        "--workers",
        "1",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "1 utterances written" in said and "1 files that a Mac keeps beside others (._NAME) left out" in said
    assert "1 files that a Mac keeps" in open_files(tmp_path / "all.txt", tmp_path).remarks[0]


def test_links_are_followed_and_circles_and_dangling_ones_counted(tmp_path, capsys):
    corpus(tmp_path, *(f"elsewhere/s{i}/v/0.wav" for i in range(3)), "links/s9/v/0.wav")
    for i in range(3):
        (tmp_path / f"links/s{i}").symlink_to(tmp_path / f"elsewhere/s{i}")
    (tmp_path / "links/s9/up").symlink_to(tmp_path / "links")
    (tmp_path / "links/s9/v/1.wav").symlink_to("gone")
    utterances, said = packed_from_pattern(tmp_path / "links", "{speaker}/**.wav", capsys)
    assert list(utterances.speakers) == ["s0", "s1", "s2", "s9"]
    assert "left out: 1 links to a folder around them, as s9/up" in said and "1 links to nothing, as s9/v/1.wav" in said


def test_alternatives_in_a_pattern_and_files_that_are_no_audio(tmp_path, capsys):
    for name in ("s1/a.wav", "s1/b.mp3", "s2/c.m4a", "s2/d.ogg", "s2/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    words = ["--root", str(tmp_path), "--out", str(tmp_path / "list.txt"), "--pattern"]
    assert make_lists([*words, "{speaker}/*.{wav,mp3,m4a}"]) == 0
    assert (tmp_path / "list.txt").read_text() == "s1 s1/a.wav\ns1 s1/b.mp3\ns2 s2/c.m4a\n"
    (tmp_path / "list.txt").unlink()
    capsys.readouterr()
    assert make_lists([*words, "{speaker}/*"]) == 0
    assert "notes" not in (tmp_path / "list.txt").read_text()
    assert "left out: 1 files without an audio file's ending, as s2/notes.txt" in capsys.readouterr().out


def test_common_voice_with_its_long_ids_and_unpaired_quotes(tmp_path, capsys):
    ids = [f"{i:x}" * 128 for i in range(3)]
    corpus(tmp_path, *(f"clips/common_voice_en_{17000000 + i}.wav" for i in range(6)))
    rows = ["client_id\tpath\tsentence\tup_votes"]
    rows += [f'{ids[i % 3]}\tcommon_voice_en_{17000000 + i}.wav\t"An unpaired quote\t2' for i in range(6)]
    (tmp_path / "validated.tsv").write_text("\ufeff" + "\n".join(rows) + "\n")
    words = [
        "--root",
        str(tmp_path / "clips"),
        "--csv",
        str(tmp_path / "validated.tsv"),
        "--out",
        str(tmp_path / "list.txt"),
    ]
    assert make_lists([*words, "--speaker-column", "client_id", "--path-column", "path"]) == 0
    mapped = dict(line.split("\t") for line in (tmp_path / "list.txt.speakers.tsv").read_text().splitlines())
    assert sorted(mapped.values()) == ids and "3 speakers have shorter names" in capsys.readouterr().out
    pack(read_list(tmp_path / "list.txt", tmp_path / "clips"), tmp_path / "out", progress=False)
    utterances = open_shards(tmp_path / "out")
    assert sorted(utterances.speakers) == sorted(mapped) and len(utterances) == 6


def test_kaldi_ids_are_kept_and_kaldi_trials_become_trials_by_path(tmp_path, capsys):
    corpus(tmp_path, "wav/a b.wav", "wav/c.wav")
    (tmp_path / "wav.scp").write_text(f"u1 {tmp_path}/wav/a b.wav\nu2 {tmp_path}/wav/c.wav\n")
    (tmp_path / "utt2spk").write_text("u1 A\nu2 B\n")
    (tmp_path / "trials").write_text("u1 u2 nontarget\nu2 u2 target\n")
    words = ["--root", str(tmp_path), "--out", str(tmp_path / "list.txt")]
    words += ["--wav-scp", str(tmp_path / "wav.scp"), "--utt2spk", str(tmp_path / "utt2spk")]
    more = ["--trials", str(tmp_path / "trials"), "--trials-out", str(tmp_path / "test_list.txt")]
    assert make_lists([*words, *more]) == 0
    assert (tmp_path / "test_list.txt").read_text() == "0 wav/a b.wav wav/c.wav\n1 wav/c.wav wav/c.wav\n"
    assert (tmp_path / "list.txt.ids.tsv").read_text() == "u1\twav/a b.wav\nu2\twav/c.wav\n"
    for text, message in (("u1 u2\n", "line 1: found"), ("u1 u9 target\n", "line 1: utterance u9 is not in --wav-scp")):
        (tmp_path / "trials").write_text(text)
        assert make_lists([*words, *more]) == 2 and message in capsys.readouterr().err
    (tmp_path / "wav.scp").write_text("u1 wav/c.wav\nu1 wav/c.wav\n")
    assert make_lists(words) == 2 and "line 2: utterance u1 stands in line 1 already" in capsys.readouterr().err


def test_lists_overwrite_no_input_and_name_a_wrong_root(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("speaker,path\nA,a.wav\n")
    words = ["--root", str(tmp_path), "--csv", str(tmp_path / "t.csv"), "--out"]
    assert make_lists([*words, str(tmp_path / "t.csv")]) == 2
    assert "is the --csv itself" in capsys.readouterr().err
    assert make_lists(["--root", str(tmp_path / "no"), *words[2:], str(tmp_path / "o")]) == 2
    assert "is no folder; expected the folder of the corpus" in capsys.readouterr().err


def test_speakers_with_spaces_get_names_that_a_list_can_hold(tmp_path, capsys):
    corpus(tmp_path, "Ann Lee/0.wav", "Ann_Lee/0.wav")
    utterances, said = packed_from_pattern(tmp_path, "{speaker}/*.wav", capsys)
    assert len(utterances.speakers) == 2 and "1 speakers have shorter names" in said
