"""Names with spaces, CN-Celeb's lists, other encodings, odd pairs: one parser for every command that reads trials."""

import gzip
import json

import numpy as np
import pytest

from spknet import errors
from spknet.evaluate import __main__ as command
from spknet.evaluate import compare, embed, evaluation, make_trials
from spknet.evaluate.groups import read_metadata
from spknet.evaluate.report import write_scores
from spknet.evaluate.scoring import Embedded
from spknet.evaluate.trials import (
    TrialError,
    names_in,
    read_enrolment,
    read_speakers,
    read_trials,
    read_utterances,
    speakers,
)
from tests.evaluate.test_evaluate import run_dir  # noqa: F401 (a fixture)

SPACED = "1 a/my talk/0.wav a/my talk/1.wav\n0 a/my talk/0.wav b/one.wav\n"


def write(tmp_path, text, name="list.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def pairs(trials):
    return [(trials.models[a], trials.tests[b]) for a, b in zip(trials.left, trials.right)]


EXPECTED = [("a/my talk/0.wav", "a/my talk/1.wav"), ("a/my talk/0.wav", "b/one.wav")]


@pytest.mark.parametrize(
    "text",
    [
        SPACED,
        SPACED.replace("1 a", "1\ta").replace("0 a", "0\ta").replace(".wav a", ".wav\ta").replace(".wav b", ".wav\tb"),
        "a/my talk/0.wav a/my talk/1.wav target\na/my talk/0.wav b/one.wav nontarget\n",
        "a/my talk/0.wav\ta/my talk/1.wav\t1\na/my talk/0.wav\tb/one.wav\t0\n",
    ],
)
def test_names_may_hold_spaces_in_every_labelled_format(tmp_path, text):
    found = read_trials(write(tmp_path, text))
    assert pairs(found) == EXPECTED and found.labels.tolist() == [1, 0]


def test_names_may_hold_spaces_without_labels_and_without_endings(tmp_path):
    blind = "".join(line[2:] + "\n" for line in SPACED.splitlines())
    assert pairs(read_trials(write(tmp_path, blind))) == EXPECTED
    tabs = "1\ta/my talk/0\ta/my talk/1\n0\ta/my talk/0\tb/one\n"
    assert pairs(read_trials(write(tmp_path, tabs)))[0] == ("a/my talk/0", "a/my talk/1")
    with pytest.raises(TrialError, match="too many columns .* where names hold spaces, separate the columns by tabs"):
        read_trials(write(tmp_path, tabs.replace("\t", " ")))
    assert names_in("a.wav b c.WAV d.flac") == ["a.wav", "b c.WAV", "d.flac"]
    assert read_enrolment(write(tmp_path, "m x y.wav z.wav\n")) == {"m": ["x y.wav", "z.wav"]}
    assert read_speakers(write(tmp_path, "my talk/0.wav anna\n")) == {"my talk/0.wav": "anna"}


def test_scores_of_names_with_spaces_are_read_back(tmp_path):
    trials = read_trials(write(tmp_path, SPACED))
    write_scores(tmp_path / "scores.txt", trials, np.array([0.5, -0.25]))
    scores, back = compare.read_scores(tmp_path / "scores.txt")
    assert pairs(back) == EXPECTED and scores.tolist() == [0.5, -0.25] and back.labels.tolist() == [1, 0]


def test_made_trials_of_names_with_spaces_are_evaluated_and_compared(corpus, run_dir, tmp_path):  # noqa: F811
    lines = []
    for line in (corpus / "train_list.txt").read_text().splitlines():
        speaker, name = line.split()
        spaced = name.replace("session", "my session")
        (tmp_path / spaced).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / spaced).write_bytes((corpus / name).read_bytes())
        lines.append(f"{speaker} {spaced}")
    listed = write(tmp_path, "\n".join(lines) + "\n", "all.txt")
    made, out = tmp_path / "made.txt", tmp_path / "out"
    words = ["--list", listed, "--all_speakers", "--targets", 3, "--nontargets", 3, "--out", made]
    assert make_trials.main(list(map(str, words))) == 0
    assert all(" " in name for name in read_trials(made).utterances())
    words = ["--checkpoint", run_dir, "--trials", made, "--root", tmp_path, "--out", out, "--bootstrap", 20]
    words += ["--cohort", listed, "--cohort_root", tmp_path, "--subtract_mean", "--no_pictures"]
    assert command.main([*map(str, words), "--device", "cpu", "--threads", "1"]) == 0
    assert compare.main([str(out), str(out), "--bootstrap", "5"]) == 0


CN_CELEB = (
    "id00800-enroll test/id00800-singing-01-001.wav 1\nid00800-enroll test/id00999-speech-01-002.wav 0\n"
    "id00999-enroll test/id00999-speech-01-002.wav 1\nid00999-enroll test/id00800-singing-01-001.wav 0\n"
)


def test_cn_celebs_lists_have_labels_models_and_speakers(tmp_path):
    models = read_enrolment(
        write(tmp_path, "id00800-enroll enroll/id00800-enroll.wav\nid00999-enroll enroll/id00999-enroll.wav\n", "enrol")
    )
    trials = read_trials(write(tmp_path, CN_CELEB, "trials.lst"), models)
    assert trials.labels.tolist() == [1, 0, 1, 0] and trials.utterances_of("id00800-enroll") == [
        "enroll/id00800-enroll.wav"
    ]
    who = speakers(trials)  # from the file names, since the folders contradict the labels
    assert (who.contradicting, who.names) == (0, ["id00800", "id00999"])
    # Where names tell nothing: a list by model and utterance.
    odd = read_trials(write(tmp_path, "m1 x 1\nm1 y 0\nm2 y 1\n", "odd"), {"m1": ["p"], "m2": ["q"]})
    assert speakers(odd).contradicting
    known = read_speakers(write(tmp_path, "m1 anna\nm2 bob\nx anna\ny bob\n", "utt2spk"))
    assert speakers(odd, known).contradicting == 0


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.encode("utf-32"),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.rstrip("\n").encode(),
    ],
    ids=["mark", "utf-16", "utf-16-be", "utf-32", "cr", "crlf", "no last end"],
)
def test_marks_encodings_and_line_ends_change_nothing(tmp_path, encode):
    plain = read_trials(write(tmp_path, SPACED))
    other = read_trials(write(tmp_path, encode(SPACED), "other.txt"))
    assert pairs(other) == pairs(plain) and other.lines.tolist() == [1, 2]
    for name in ("packed.txt.gz", "packed.txt"):
        packed = write(tmp_path, gzip.compress(encode(SPACED)), name)
        assert pairs(read_trials(packed)) == pairs(plain)


@pytest.mark.parametrize(
    "data, said",
    [
        (SPACED.encode("utf-16-le"), "zero bytes; convert it with iconv -f UTF-16"),
        ("1 é b\n".encode("latin-1"), "not UTF-8 .* convert it with iconv"),
        (b"\x1f\x8b garbage", "cannot read this list"),
        (gzip.compress(b"1 a b\n0 a c\n")[:-9], "cannot read this list"),
    ],
)
def test_texts_in_other_encodings_are_refused_with_a_remedy(tmp_path, data, said):
    with pytest.raises(TrialError, match=said):
        read_trials(write(tmp_path, data))


@pytest.mark.parametrize(
    "text, said",
    [
        ("a a/0.wav\n\ufeffa a/1.wav\n", "line 2: key '.ufeffa/0' has a control character"),
        ("a\u00a0a/0.wav\n", "line 1: found .* expected `speaker path`"),
        ("a a/0.wav\na a/1.wav\na a/0.wav\n", "lines 1 and 3: a/0.wav stands there twice"),
        ("a/0.wav a\n", "line 1: speaker 'a/0.wav': expected a name without '/'"),
        ("a a/0.wav\n" + "x" * 10**6, "line 2: found"),
    ],
)
def test_trials_and_cohorts_read_training_lists_as_packing_does(tmp_path, text, said):
    with pytest.raises(TrialError, match=f"list.txt, {said}"):
        read_utterances(write(tmp_path, text))


def test_rows_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(TrialError, match="line 3: x is of bob, on an earlier line of anna"):
        read_speakers(write(tmp_path, "x anna\nx anna\nx bob\n"))
    with pytest.raises(TrialError, match="'x' has two rows that differ"):
        read_metadata(write(tmp_path, "speaker,gender\nx,f\nx,f\nx,m\n"))


def test_a_folder_in_place_of_a_list_is_named(tmp_path):
    for read in (read_trials, read_enrolment, read_speakers):
        with pytest.raises(TrialError, match="cannot read this list: is a folder, expected a file"):
            read(tmp_path)


def test_contradicting_duplicates_are_refused_with_their_lines(tmp_path):
    with pytest.raises(TrialError, match=r"lines 2 and 4: b a is a target on one and a non-target on the other"):
        read_trials(write(tmp_path, "1 a c\n0 a b\n\n1 b a\n"))


def test_self_trials_and_duplicates_are_remarked(tmp_path):
    found = read_trials(write(tmp_path, "1 a/0 a/1\n0 a/0 b/0\n1 a/1 a/0\n1 b/0 b/0\n"))
    assert found.remarks == [
        "1 trials of an utterance with itself, which no system gets wrong (first: line 4)",
        "1 trials of a pair that an earlier line has tried, all counted (first: lines 1 and 3)",
    ]
    model = read_trials(
        write(tmp_path, "1 a a\n0 a b\n"), {"a": ["x", "y"]}
    )  # a model that is called like an utterance
    assert model.remarks == []


def test_inverted_labels_are_remarked(tmp_path):
    names = [f"id{s}/{u}" for s in range(4) for u in range(3)]
    lines = [f"{int(a[:3] != b[:3])} {a} {b}" for i, a in enumerate(names) for b in names[i + 1 :]]
    write(tmp_path, "\n".join(lines) + "\n")
    rng = np.random.default_rng(0)
    rows = np.stack([np.eye(4)[int(name[2])] for name in names])[:, None] + 0.1 * rng.standard_normal((12, 1, 4))
    embedded = Embedded(rows, {name: i for i, name in enumerate(names)}, np.full(12, 16000))
    report = evaluation.evaluate(embedded, str(tmp_path / "list.txt"))
    said = " ".join(report.lists[0].remarks)
    assert "EER is above 50 %" in said and "labels inverted" in said
    assert "no intervals: 66 labels contradict the speakers in the names" in said


def test_a_remark_reaches_the_terminal_the_page_and_the_json(run_dir, corpus, tmp_path, capsys):  # noqa: F811
    lines = (corpus / "test_list.txt").read_text().splitlines()
    write(tmp_path, "\n".join([*lines[:40], lines[0]]) + "\n")
    words = ["--checkpoint", run_dir, "--trials", tmp_path / "list.txt", "--root", corpus, "--out", tmp_path / "out"]
    assert command.main([*map(str, words), "--bootstrap", "0", "--device", "cpu", "--threads", "1"]) == 0
    said = "1 trials of a pair that an earlier line has tried, all counted (first: lines 1 and 41)"
    assert f"note: list: {said}" in capsys.readouterr().out
    assert said in json.loads((tmp_path / "out/report.json").read_text())["lists"][0]["remarks"]
    assert said in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    "words",
    [
        "--crop_seconds -1",
        "--crop_seconds nan",
        "--crops 0",
        "--batch_seconds -1",
        "--as_norm -3",
        "--as_norm 1.5",
        "--cohort_utterances 0",
        "--bootstrap -1",
        "--threads -2",
        "--quality speed",
        "--preset best",
    ],
)
def test_senseless_values_are_refused_with_option_and_range(words, capsys):
    with pytest.raises(SystemExit) as left:
        command.main(["--checkpoint", "x", *words.split()])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert words.split()[0] in said and any(word in said for word in ("expected", "invalid"))


@pytest.mark.parametrize("words", ["--targets 0", "--nontargets -1", "--seed -1", "--targets many"])
def test_senseless_values_of_trials_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        make_trials.main(["--list", "x", "--out", "y", *words.split()])
    assert words.split()[0] in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_noticed_before_extraction(run_dir, corpus, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(embed, "plan", lambda *_: pytest.fail("extraction began"))
    (tmp_path / "file").write_text("")
    base = ["--checkpoint", run_dir, "--trials", corpus / "test_list.txt", "--root", corpus, "--device", "cpu"]
    for words, said in (
        (["--out", tmp_path / "file"], "file: "),
        (["--out", tmp_path / "file" / "below"], "a file stands where a folder is expected"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
        (["--out", tmp_path / "out", "--scores", tmp_path], "a folder, where a file is to be written"),
        (["--out", tmp_path / "out", "--scores", tmp_path / "file" / "s.txt"], "file"),
    ):
        assert errors.run(command.main, [*map(str, base), *map(str, words)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("main", [command.main, make_trials.main, compare.main, embed.main])
def test_help_says_what_each_option_means_and_its_default(main, capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0 and "default: " in said and "default: None" not in said
    if main is make_trials.main:
        assert "(default: 0)" in said and "(default: 50)" in said
