"""Lists in every format, what is wrong with a bad one, and lists made from a data set."""

import gzip
from collections import Counter

import numpy as np
import pytest

from spknet import errors
from spknet.evaluate import embeddings as kept
from spknet.evaluate import make_trials as trial_maker
from spknet.evaluate.scoring import Embedded
from spknet.evaluate.trials import TrialError, read_enrolment, read_speakers, read_trials, speaker_of


def write(tmp_path, text, name="list.txt"):
    path = tmp_path / name
    path.write_text(text)
    return path


def pairs(found):
    return [(found.models[a], found.tests[b]) for a, b in zip(found.left, found.right)]


def test_the_three_formats_say_the_same(tmp_path):
    voxceleb = read_trials(write(tmp_path, "1 a/0.wav a/1.wav\n\n0 a/0.wav b/1.wav\n"))
    kaldi = read_trials(write(tmp_path, "a/0.wav a/1.wav target\na/0.wav b/1.wav nontarget\n", "kaldi"))
    blind = read_trials(write(tmp_path, "a/0.wav a/1.wav\na/0.wav b/1.wav\n", "blind.txt"))
    assert pairs(voxceleb) == pairs(kaldi) == pairs(blind) == [("a/0.wav", "a/1.wav"), ("a/0.wav", "b/1.wav")]
    assert voxceleb.labels.tolist() == kaldi.labels.tolist() == [1, 0] and blind.labels is None
    assert voxceleb.lines.tolist() == [1, 3]  # the empty line counts
    assert voxceleb.utterances() == ["a/0.wav", "a/1.wav", "b/1.wav"]
    assert (voxceleb.name, kaldi.name) == ("list", "kaldi")


def test_gz_lists_are_read_and_a_cut_one_is_named(tmp_path):
    path = tmp_path / "veri.txt.gz"
    whole = gzip.compress(b"1 a/0 a/1\n0 a/0 b/1\n")
    path.write_bytes(whole)
    assert len(read_trials(path)) == 2 and read_trials(path).name == "veri"
    path.write_bytes(whole[:-9])
    with pytest.raises(TrialError, match="veri.txt.gz: cannot read this list"):
        read_trials(path)
    with pytest.raises(TrialError, match="nowhere.txt: cannot read this list"):
        read_trials(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    "text, said",
    [
        ("1 a b\n2 a b\n", "line 2: bad label '2'; expected 0 or 1"),
        ("a b target\na b impostor\n", "line 2: bad label 'impostor'; expected target or nontarget"),
        ("yes a b\n", "line 1: bad label: neither 'yes' nor 'b' is one"),
        ("1 a b\n\n0 a\n", "line 3: a column is missing: 2 found, 3 on the lines before"),
        ("1 a\n", r"line 1: a column is missing \(2 found\)"),
        ("a target\n", r"line 1: a column is missing \(2 found\)"),
        ("a\n", r"line 1: a column is missing \(1 found\)"),
        ("1 a b c\n", r"line 1: too many columns \(4 found\)"),
        ("a b\n1 a b\n", "line 2: too many columns: 3 found, 2 on the lines before"),
        ("", "line 1: the list is empty; expected `0|1 utterance utterance`".replace("|", r"\|")),
        ("1 a b\n1 a c\n", "lines 1 to 2: all 2 trials are targets; error rates need at least one non-target"),
        ("0 a b\n", "lines 1 to 1: all 1 trials are non-targets; error rates need at least one target"),
    ],
)
def test_a_bad_list_is_refused_with_its_line(tmp_path, text, said):
    with pytest.raises(TrialError, match=rf"list\.txt, {said}"):
        read_trials(write(tmp_path, text))


def test_models_of_several_utterances(tmp_path):
    models = read_enrolment(write(tmp_path, "m1 a/0 a/1\nm2 b/0\nm1 a/2\n", "enrol"))
    found = read_trials(write(tmp_path, "m1 a/9 target\nm2 a/9 nontarget\nc/0 a/9 nontarget\n"), models)
    assert found.utterances_of("m1") == ["a/0", "a/1", "a/2"] and found.utterances_of("c/0") == ["c/0"]
    assert found.utterances() == ["a/0", "a/1", "a/2", "a/9", "b/0", "c/0"]
    assert found.first_line_of({"b/0", "c/0"}) == (2, "b/0")
    with pytest.raises(TrialError, match="enrol, line 2: a column is missing: model 'm2' has no utterance"):
        read_enrolment(write(tmp_path, "m1 a/0\nm2\n", "enrol"))
    with pytest.raises(TrialError, match="the list is empty"):
        read_enrolment(write(tmp_path, "\n", "enrol"))


def test_speakers_come_from_names_or_a_list(tmp_path):
    known = read_speakers(write(tmp_path, "x17 anna\nx18 bob\n", "utt2spk"))
    assert [speaker_of(name, known) for name in ("x17", "id1/v/0.wav", "id2-v-0")] == ["anna", "id1", "id2"]
    with pytest.raises(TrialError, match="utt2spk, line 1: 1 columns; expected `utterance speaker`"):
        read_speakers(write(tmp_path, "x17\n", "utt2spk"))


@pytest.fixture
def data(tmp_path):
    """A list of 8 speakers, 4 sessions of 3 utterances each; the last speaker has one session."""
    lines = [f"id{s} id{s}/v{v}/{u}.wav" for s in range(8) for v in range(1 if s == 7 else 4) for u in range(3)]
    return write(tmp_path, "\n".join(lines) + "\n", "all.txt")


def run(data, *words):
    out = data.parent / "made.txt"
    return errors.run(trial_maker.main, ["--list", str(data), "--out", str(out), *words]), out


def test_made_trials_cross_sessions_keep_limits_and_repeat_nothing(data, capsys):
    status, out = run(data, "--all_speakers", "--targets", "20", "--nontargets", "15")
    assert status == 0 and "1 speakers have no pair from two sessions" in capsys.readouterr().out
    found = read_trials(out)
    assert len({frozenset(pair) for pair in pairs(found)}) == len(found)
    targets, others = Counter(), Counter()
    for (a, b), label in zip(pairs(found), found.labels):
        (s, v, _), (t, w, _) = a.split("/"), b.split("/")
        assert (s == t) == bool(label)
        assert not label or v != w
        (targets if label else others)[s] += 1
    assert targets == {f"id{s}": 20 for s in range(7)}  # of 54 pairs across 4 sessions of 3
    assert others == {f"id{s}": 15 for s in range(8)}
    first = out.read_text()
    assert run(data, "--all_speakers", "--targets", "20", "--nontargets", "15")[1].read_text() == first
    assert run(data, "--all_speakers", "--targets", "20", "--seed", "1")[1].read_text() != first


def test_made_trials_use_only_allowed_speakers(data, capsys):
    (data.parent / "some").write_text("id1\nid4 with more words\n")
    run(data, "--speakers", str(data.parent / "some"))
    assert {speaker_of(name) for name in read_trials(data.parent / "made.txt").utterances()} == {"id1", "id4"}
    run(data, "--exclude", str(data.parent / "some"))
    assert {speaker_of(n) for n in read_trials(data.parent / "made.txt").utterances()} == {
        f"id{s}" for s in (0, 2, 3, 5, 6, 7)
    }
    assert run(data)[0] == 2
    assert "which speakers may be used? Never those a network was trained on" in capsys.readouterr().err


def test_training_speakers_are_recognised_with_and_without_their_data_set():
    one, several = ["id1", "id2", "id3"], ["a/id1", "a/id2", "b/id3"]
    assert trial_maker.without(one, ["id1"]) == ["id2", "id3"]
    assert trial_maker.without(several, ["a/id1"]) == ["a/id2", "b/id3"]
    assert trial_maker.without(one, ["a/id1", "b/id3"]) == ["id2"]
    assert trial_maker.without(several, ["id1", "id3"]) == ["a/id2"]
    assert trial_maker.without(several, ["b/id1"]) == several  # another person: the sets are told apart


def test_same_gender_impostors(data, capsys):
    csv = write(data.parent, "speaker,gender\n" + "".join(f"id{s},{'fm'[s % 2]}\n" for s in range(6)), "meta.csv")
    assert run(data, "--all_speakers", "--impostors", "same-gender", "--metadata", str(csv))[0] == 0
    found = read_trials(data.parent / "made.txt")
    for (a, b), label in zip(pairs(found), found.labels):
        assert int(a[2]) % 2 == int(b[2]) % 2
        assert label or (int(a[2]) < 6 and int(b[2]) < 6)  # without a known gender nobody is an impostor
    assert run(data, "--all_speakers", "--impostors", "same-gender")[0] == 2
    assert "needs --metadata CSV" in capsys.readouterr().err


def test_impostors_of_many_speakers_are_all_the_others_without_a_list_for_each():
    speakers = [f"id{s}" for s in range(7)]
    gender = {s: "fm"[i % 2] for i, s in enumerate(speakers[:5])} | {"id5": ""}
    others = trial_maker.same_value(speakers, gender)
    assert {s: list(of) for s, of in others.items()} == {
        "id0": ["id2", "id4"], "id1": ["id3"], "id2": ["id0", "id4"], "id3": ["id1"], "id4": ["id0", "id2"],
        "id5": [], "id6": [],
    }  # fmt: skip
    many = trial_maker.same_value([str(s) for s in range(200_000)], dict.fromkeys(map(str, range(200_000)), "any"))
    assert all(len(of) == 199_999 for of in many.values())  # 320 GB as lists
    assert (many["77"][76], many["77"][77], many["199999"][199_998]) == ("76", "78", "199998")


def test_the_nearest_of_many_speakers_are_those_of_the_whole_matrix():
    generator = np.random.default_rng(3)
    means = generator.integers(-2, 3, (150, 4)).astype(np.float32)  # many equal cosines: the first speakers win
    likeness = means @ means.T
    np.fill_diagonal(likeness, -np.inf)
    expected = np.argsort(-likeness, axis=1, kind="stable")[:, :10]
    assert np.array_equal(np.stack(list(trial_maker._most_alike(means))), expected)


def test_hard_impostors_are_the_nearest_speakers(data):
    names = [line.split()[1] for line in data.read_text().splitlines()]
    angle = np.array([0.3 * int(name[2]) for name in names])
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)[:, None].astype(np.float32)
    e = Embedded(rows, {name: i for i, name in enumerate(names)}, np.full(len(names), 16000))
    of = {f"id{s}": [name for name in names if name.startswith(f"id{s}/")] for s in range(8)}
    assert [trial_maker.nearest(of, e)[f"id{s}"][0] for s in (0, 7)] == ["id1", "id6"]
    assert set(trial_maker.nearest(of, e)["id3"][:2]) == {"id2", "id4"}
    kept.keep(data.parent / "kept", e, {})
    assert run(data, "--all_speakers", "--impostors", "hard", "--embeddings", str(data.parent / "kept"))[0] == 0
    with pytest.raises(TrialError, match="there is none of id9/v0/0.wav"):
        trial_maker.nearest(of | {"id9": ["id9/v0/0.wav"]}, e)


def test_a_data_set_without_two_sessions_makes_no_list(tmp_path, capsys):
    data = write(tmp_path, "a a/v/0\na a/v/1\nb b/v/0\n", "all.txt")
    assert run(data, "--all_speakers")[0] == 2
    assert "0 targets and" in capsys.readouterr().err
    assert run(data, "--all_speakers", "--same_session")[0] == 0


def test_kept_embeddings_come_back_and_a_torn_folder_is_named(tmp_path):
    rows = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    e = Embedded(rows, {"b": 1, "a": 0, "c": 2}, np.array([5, 6, 7]))
    kept.keep(tmp_path / "kept", e, {"step": 3}, cohort=rows[0])
    back, cohort, facts = kept.load(tmp_path / "kept")
    np.testing.assert_array_equal(back.embeddings, rows)
    assert back.rows == e.rows and back.samples.tolist() == [5, 6, 7] and facts == {"step": 3}
    np.testing.assert_array_equal(cohort, rows[0])
    (tmp_path / "kept" / "embeddings.txt").write_text("a 5\n")
    with pytest.raises(TrialError, match="3 embeddings, but embeddings.txt has 1 lines"):
        kept.load(tmp_path / "kept")
    with pytest.raises(TrialError, match="holds no embeddings.npy"):
        kept.load(tmp_path)
    kept.keep(tmp_path / "kept", e, {"step": 4})  # another network's, without a cohort: the old one does not stay
    assert kept.load(tmp_path / "kept")[1] is None
