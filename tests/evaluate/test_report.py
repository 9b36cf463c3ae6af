"""Reports as JSON, text and HTML, comparisons with paired intervals, pictures that survive odd data."""

import io
import json
import re

import matplotlib.image
import numpy as np
import pytest

from spknet import errors
from spknet.evaluate import compare, metrics, report
from spknet.evaluate import plots as pictures
from spknet.evaluate.evaluation import figures
from spknet.evaluate.report import write_scores
from spknet.evaluate.trials import TrialError, read_trials, speakers


def make_list(tmp_path, speakers=12, each=4, name="list.txt"):
    """All pairs of a few utterances of each speaker."""
    names = [f"id{s:02d}/v{u}/0.wav" for s in range(speakers) for u in range(each)]
    lines = [f"{int(a[:4] == b[:4])} {a} {b}" for i, a in enumerate(names) for b in names[i + 1 :]]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    return read_trials(tmp_path / name)


def make_report(folder, trials, scores, order=None, system="cosine"):
    """A report's folder as spknet.evaluate leaves it, with the trials in another order where asked."""
    folder.mkdir(parents=True)
    write_scores(folder / "scores.txt", trials, scores)
    if order is not None:
        lines = (folder / "scores.txt").read_text().splitlines()
        (folder / "scores.txt").write_text("\n".join(lines[i] for i in order) + "\n")
    found = figures(scores, trials, replicates=50)
    entry = {
        "name": trials.name,
        "path": trials.path,
        "role": "test",
        "trials": len(trials),
        "scores": {system: "scores.txt"},
    }
    content = {"version": report.VERSION, "step": 3, "lists": [entry | {"speakers": 12, "systems": {system: found}}]}
    report.write_json(folder / "report.json", content)
    return content


def draw(trials, shift, seed):
    return np.random.default_rng(seed).standard_normal(len(trials)) + shift * trials.labels


def test_labels_that_contradict_the_names_get_no_interval(tmp_path):
    (tmp_path / "list.txt").write_text("1 a/0 b/0\n0 a/0 b/1\n1 a/0 a/1\n")
    trials = read_trials(tmp_path / "list.txt")
    found = figures(np.array([1.0, 0.0, 2.0]), trials)
    assert found["interval"] is None
    assert found["no_interval"] == "1 labels contradict the speakers in the names; give --utt2spk"
    known = {"a/0": "anna", "b/0": "anna", "a/1": "anna", "b/1": "bob"}
    assert figures(np.array([1.0, 0.0, 2.0]), trials, speakers(trials, known))["interval"] is not None
    assert len(speakers(trials, known).names) == 2


def test_the_report_is_plain_json_even_with_infinite_thresholds(tmp_path):
    report.write_json(tmp_path / "r.json", {"a": np.float32(0.5), "b": [np.int64(3), float("inf")], "c": {"d": None}})
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": 0.5, "b": [3, "inf"], "c": {"d": None}}


def test_the_page_needs_nothing_else_and_escapes_names(tmp_path):
    trials = make_list(tmp_path)
    scores = draw(trials, 2.0, 0)
    content = make_report(tmp_path / "a", trials, scores)
    content["path"] = "runs/<a>"
    entry = content["lists"][0]
    entry["groups"] = {"gender": [{"group": "f & m", "trials": 3, "targets": 0, "eer": None, "far": 0.5, "frr": None}]}
    row = {"rate": 0.01, "chosen_on": "oracle", "nontargets_needed": 3000, "nontargets_chosen_on": 20, "nontargets": 20}
    entry["thresholds"] = [row | {"threshold": None, "far": None, "frr": None, "claimed": False}]
    report.write_html(tmp_path / "r.html", content, {"det": pictures.det({"list": (scores, trials.labels)})})
    page = (tmp_path / "r.html").read_text()
    assert re.findall(r'src="([^"]{22})', page) == ["data:image/png;base64,"] and "http" not in page
    assert "runs/&lt;a&gt;" in page and "f &amp; m" in page and "<a>" not in page
    eer = content["lists"][0]["systems"]["cosine"]["eer"]
    assert f"<td>{eer:.2f}</td>" in page
    assert "no: 20 non-targets to choose on, 3,000 needed" in page and "oracle" in page


def test_an_unlabelled_list_stands_in_the_table_without_figures():
    rows = report.rows({"lists": [{"name": "blind", "role": "test", "trials": 1234}]})
    assert rows[1][0] == "blind (test)" and "1,234" in rows[1] and len(rows[1]) == len(rows[0])


def test_text_tables_leave_empty_columns_out():
    assert report.text_table([["a", "b", "c"], ["1", "", "22"], ["333", "", ""]]) == "a    c\n1    22\n333"


def test_comparing_a_report_with_its_shuffled_self_finds_nothing(tmp_path, capsys):
    trials = make_list(tmp_path)
    scores = draw(trials, 1.5, 0)
    make_report(tmp_path / "runs/a/eval", trials, scores)
    make_report(tmp_path / "runs/b/eval", trials, scores, order=np.random.default_rng(0).permutation(len(trials)))
    words = [str(tmp_path / "runs/a/eval"), str(tmp_path / "runs/b/eval/report.json"), "--bootstrap", "40"]
    assert compare.main([*words, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "a/eval: cosine" in shown and "+0.00 to +0.00" in shown
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert rows[1]["difference_interval"]["eer"] == [0.0, 0.0] and (tmp_path / "out" / "det-list.png").exists()


def test_a_run_stands_for_its_newest_evaluation(tmp_path):
    trials = make_list(tmp_path)
    make_report(tmp_path / "run/evaluation", trials, draw(trials, 1.5, 0))  # as `spknet evaluate --out` leaves it
    assert compare.read_report(tmp_path / "run")[0] == tmp_path / "run/evaluation"
    for step in (20, 100):
        make_report(tmp_path / f"run/eval/step-{step:08d}", trials, draw(trials, 1.5, 0))
    assert compare.read_report(tmp_path / "run")[0] == tmp_path / "run/eval/step-00000100"
    with pytest.raises(TrialError, match="cannot read this report"):
        compare.read_report(tmp_path)


def test_a_better_system_shows_and_the_difference_is_that_of_the_figures(tmp_path):
    trials = make_list(tmp_path)
    worse, better = draw(trials, 1.0, 0), draw(trials, 3.0, 0)
    make_report(tmp_path / "a", trials, worse)
    make_report(tmp_path / "b", trials, better)
    base, other = compare.compare(compare.systems([tmp_path / "a", tmp_path / "b"], every=False), 100)
    r = [metrics.eer(metrics.rates(s, trials.labels)) for s in (worse, better)]
    assert other["difference"]["eer"] == pytest.approx(r[1] - r[0], abs=1e-6)
    low, high = other["difference_interval"]["eer"]
    assert low < other["difference"]["eer"] < high < 0
    # Paired: equal systems differ less from each other than their own intervals are wide.
    same = draw(trials, 1.0, 0) + 0.1 * draw(trials, 0.0, 5)
    make_report(tmp_path / "c", trials, same)
    _, near = compare.compare(compare.systems([tmp_path / "a", tmp_path / "c"], every=False), 100)
    width = np.diff(near["difference_interval"]["eer"])[0]
    assert width < 0.5 * np.diff(base["interval"]["eer"])[0]
    assert "*" in compare.table([base, other])[2][7] and "*" not in compare.table([base, near])[2][7]


def test_labels_that_contradict_the_names_are_not_compared(tmp_path, capsys):
    trials = make_list(tmp_path)
    trials.labels[:] = 1 - trials.labels
    make_report(tmp_path / "a", trials, draw(trials, 1, 0))
    assert errors.run(compare.main, [str(tmp_path / "a"), str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert f"{len(trials)} labels contradict the speakers in the names" in said and "--utt2spk" in said


def test_different_lists_and_broken_reports_are_refused(tmp_path, capsys):
    trials = make_list(tmp_path)
    make_report(tmp_path / "a", trials, draw(trials, 1, 0))
    make_report(tmp_path / "b", trials, draw(trials, 1, 0))
    scores = tmp_path / "b" / "scores.txt"
    lines = scores.read_text().splitlines()
    for text, said in (
        (lines[:1] + lines[2:], "line 2: the trial id00/v0/0.wav id00/v2/0.wav is not in"),
        ([*lines, lines[0]], f"has {len(lines) + 1} trials"),
        ([lines[0], "0.5 a b"], "line 2: expected `score left right target|nontarget`"),
    ):
        scores.write_text("\n".join(text) + "\n")
        assert errors.run(compare.main, [str(tmp_path / "a"), str(tmp_path / "b")]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "b" / "report.json").write_text('{"version": 99}')
    assert errors.run(compare.main, [str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "expected a report of version" in capsys.readouterr().err
    with pytest.raises(TrialError, match="cannot read this report"):
        compare.read_report(tmp_path / "nowhere")


def size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    assert pixels.std() > 0.02  # something is drawn
    return pixels.shape[:2]


@pytest.mark.parametrize("case", ["usual", "perfect", "equal", "one target"])
def test_pictures_of_odd_lists(case):
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2 if case != "one target" else (np.arange(200) == 7).astype(int)
    scores = {"perfect": labels * 10.0, "equal": np.zeros(200)}.get(case, rng.standard_normal(200) + labels)
    assert min(size(pictures.det({"a": (scores, labels), "b": (-scores, labels)}, "both"))) > 300
    assert min(size(pictures.histogram(scores, labels))) > 300
    assert min(size(pictures.reliability(scores, labels))) > 300


def test_a_thinned_det_curve_keeps_its_ends_and_stays_on_the_points():
    rng = np.random.default_rng(0)
    labels = np.arange(200_000) % 2
    r = metrics.rates(rng.standard_normal(200_000) + 2 * labels, labels)
    corners = pictures._corners(r)
    assert len(corners) <= pictures.POINTS and (np.diff(corners) > 0).all()
    assert (r.misses[corners[0]], r.false_alarms[corners[-1]]) == (0, 0)
    jump = np.abs(np.diff(pictures._probit(r.fnr[corners], r.targets)))
    assert jump[5:-5].max() < 0.2


@pytest.mark.parametrize("utterances, speakers", [(40, 5), (6, 3), (2, 2), (1, 1)])
def test_speaker_map_of_many_and_of_few_utterances(utterances, speakers):
    rows = np.random.default_rng(0).standard_normal((utterances, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert min(size(pictures.speaker_map(rows, [f"id{i % speakers}" for i in range(utterances)]))) > 300


def test_the_mean_of_several_seeds_has_the_mean_of_their_figures_and_an_interval_of_their_paired_replicates(tmp_path):
    trials = make_list(tmp_path)
    seeds = {name: draw(trials, 1.5, seed) for seed, name in enumerate("abc")}
    for name, scores in seeds.items():
        make_report(tmp_path / name, trials, scores)
    *rows, mean = compare.compare(compare.systems([tmp_path / name for name in seeds], every=False), 100, mean=True)
    assert mean["system"] == "mean of 3" and "difference" not in mean
    assert mean["figures"]["eer"] == pytest.approx(sum(row["figures"]["eer"] for row in rows) / 3)
    low, high = mean["interval"]["eer"]
    assert low < mean["figures"]["eer"] < high
    # The three differ by chance of their own, which a mean takes away; the drawn speakers, which it does not, are few.
    assert high - low < max(np.diff(row["interval"]["eer"])[0] for row in rows)
    # Of a system and itself the mean is that system.
    one, _, same = compare.compare(compare.systems([tmp_path / "a"] * 2, every=False), 100, mean=True)
    assert same["figures"] == one["figures"] and same["interval"] == one["interval"]
