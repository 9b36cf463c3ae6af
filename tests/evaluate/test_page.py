"""What a reader of a report sees: the verdict first, then a group a list; odd names; lists without labels; a run to compare."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from spknet import config, errors
from spknet.checkpoints import file as checkpoint
from spknet.checkpoints.network import load_network
from spknet.config import ConfigError
from spknet.evaluate import __main__ as command
from spknet.evaluate import compare, evaluation, lists, make_trials, plots, report
from spknet.evaluate.lists import trained_speakers
from spknet.evaluate.scoring import Embedded
from spknet.evaluate.systems import System
from spknet.evaluate.trials import TrialError, read_trials
from tests.evaluate.test_evaluate import network, run_dir, settings  # noqa: F401 (a fixture)
from tests.ranks import run_ranks


def evaluated(tmp_path, text, name="list.txt", seed=0):
    """A report on a list, from embeddings near a direction of each speaker."""
    (tmp_path / name).write_text(text)
    names = read_trials(tmp_path / name).utterances()
    rng = np.random.default_rng(seed)
    centres = {}
    rows = [centres.setdefault(n.split("/")[0], rng.standard_normal(8)) + 0.5 * rng.standard_normal(8) for n in names]
    embedded = Embedded(np.array(rows)[:, None], {n: i for i, n in enumerate(names)}, np.full(len(names), 16000))
    return evaluation.evaluate(embedded, str(tmp_path / name), asked=evaluation.Asked(bootstrap=20))


def all_pairs(speakers, label=True):
    names = [f"{s}/{u}" for s in speakers for u in range(4)]
    return "".join(
        f"{int(a.split('/')[0] == b.split('/')[0]) if label else ''} {a} {b}\n".lstrip()
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    )


def test_the_page_begins_with_the_verdict_and_the_det(run_dir, corpus, tmp_path):  # noqa: F811
    words = ["--checkpoint", run_dir, "--trials", corpus / "test_list.txt", "--root", corpus, "--out", tmp_path / "out"]
    assert command.main([*map(str, words), "--bootstrap", "20", "--device", "cpu", "--threads", "1"]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    verdict = report.verdict(content)
    assert re.fullmatch(
        r"EER \d+\.\d\d % \(95 %: [\d.]+ to [\d.]+\) on test_list: 144 trials of 12 speakers, scored by cosine; .*",
        verdict,
    )
    places = [page.index(part) for part in (f"{verdict}.", 'alt="det"', "<table>", "<details>")]
    assert places == sorted(places)
    assert page.index('alt="histogram-test_list"') > page.index("<h2>test_list (test)</h2>")
    for fact in ("date", "command", "revision", "training_data", "checkpoint_sha256", "epoch"):
        assert f"<dt>{fact}</dt>" in page
    assert "<dd>0.50</dd>" in page and "spknet evaluate --checkpoint" in page and "{&#39;" not in page
    assert "12 speakers" in content["training_data"] and "white-space: nowrap" in page
    assert "date" not in content and "command" not in content  # equal inputs, equal report.json


def test_a_list_without_labels_shows_its_scores(tmp_path):
    found = evaluated(tmp_path, all_pairs("abc", label=False))
    content, scores = found.content(), found.lists[0].scores["cosine"]
    assert content["lists"][0]["summary"]["median"] == pytest.approx(np.median(scores))
    said = f"{scores.min():.3f} to {scores.max():.3f}"
    assert said in report.verdict(content) and said in report.text(content)
    found.write(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert said in page and 'alt="histogram-list"' in page and not (tmp_path / "out" / "det.png").exists()


def test_names_that_matplotlib_or_html_would_read_are_shown_as_they_are(tmp_path):
    speakers = ["$x_1$", r"$\frac{", "_under", "<b>", "日本", "a" * 90]
    found = evaluated(tmp_path, all_pairs(speakers), name="$\\alpha$ & <i>.txt")
    found.write(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3  # det, histogram, map
    assert "$\\alpha$ &amp; &lt;i&gt;" in (tmp_path / "out" / "report.html").read_text()
    assert plots._plain("$a$") == r"\$a\$" and plots._plain("_a") == " _a" and len(plots._plain("a" * 90)) == 51


def test_systems_with_one_curve_share_it():
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 2
    scores = rng.standard_normal(100) + labels
    curves = plots._distinct(
        {"cosine": (scores, labels), "calibrated": (2 * scores - 1, labels), "other": (-scores, labels)}
    )
    assert [name for name, _ in curves] == ["cosine = calibrated", "other"]


def test_compare_takes_a_run_and_uses_its_newest_evaluation(tmp_path, capsys):
    found = evaluated(tmp_path, all_pairs("abcd"))
    for step in (10, 9):
        found.write(tmp_path / f"run/eval/step-{step:08d}", pictures=False)
    shutil.copytree(tmp_path / "run/eval/step-00000009", tmp_path / "hand-made")
    assert compare.read_report(tmp_path / "run")[0] == tmp_path / "run/eval/step-00000010"
    assert compare.main([str(tmp_path / "run"), str(tmp_path / "hand-made"), "--bootstrap", "5"]) == 0
    assert "+0.00 to +0.00" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert errors.run(compare.main, [str(tmp_path / "empty"), str(tmp_path / "run")]) == 2
    assert "give a folder that spknet evaluate wrote, or a run with an evaluation" in capsys.readouterr().err


def test_speakers_kept_out_are_those_in_the_checkpoint_whatever_the_file_says_now(tmp_path):
    (tmp_path / "dev").write_text("a\n")
    c = config.from_dict({"data": {"dev_speakers": str(tmp_path / "dev")}})
    meta = {"speakers": ["a", "b", "c"], "dev_speakers": ["b"]}
    assert trained_speakers(c, meta) == ["a", "c"]
    assert trained_speakers(c, {"speakers": ["a", "b", "c"]}) == ["b", "c"]  # an older checkpoint
    assert trained_speakers(c, {}) is None


def test_trials_of_a_run_that_kept_nobody_out_say_what_to_do(corpus, tmp_path, capsys):
    speakers = [f"id{s:05d}" for s in range(12)]
    state = {"step": 1, "epoch": 0.0, "config": config.to_dict(settings()), "model": network().state_dict()}
    checkpoint.save(tmp_path / "run", state | {"speakers": speakers, "dev_speakers": []}, keep=0)
    words = [
        "--list",
        str(corpus / "train_list.txt"),
        "--run",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "dev.txt"),
    ]
    assert errors.run(make_trials.main, words) == 2
    said = capsys.readouterr().err
    assert "was trained on all but 0 of these 12 speakers" in said and "--data.dev_speakers N" in said
    checkpoint.save(tmp_path / "run", state | {"step": 2, "speakers": speakers, "dev_speakers": speakers[:3]}, keep=0)
    assert errors.run(make_trials.main, words) == 0
    assert {name.split("/")[0] for name in read_trials(tmp_path / "dev.txt").utterances()} == set(speakers[:3])


def test_a_flat_corpus_needs_no_same_session(tmp_path, capsys):
    (tmp_path / "flat.txt").write_text("".join(f"{s} {s}/{u}.wav\n" for s in "abc" for u in range(3)))
    words = ["--list", str(tmp_path / "flat.txt"), "--all_speakers", "--out", str(tmp_path / "made.txt")]
    assert make_trials.main(words) == 0
    assert "names tell no sessions" in capsys.readouterr().out
    assert read_trials(tmp_path / "made.txt").labels.sum() == 9  # 3 pairs of each speaker


def test_proto_keeps_its_lengths_unless_told_otherwise():
    def normalized(**groups):
        return evaluation.system_of(config.from_dict(groups)).normalize

    distance = {"score": "mean_distance"}
    assert normalized() and normalized(eval=distance) and normalized(loss={"name": "proto"})
    assert not normalized(loss={"name": "proto"}, eval=distance)
    assert normalized(loss={"name": "proto"}, eval=distance | {"normalize_embeddings": "always"})
    assert not normalized(eval={"normalize_embeddings": "never"})
    with pytest.raises(ConfigError):
        normalized(eval={"normalize_embeddings": "sometimes"})


def _only_the_first_reads(rank, _world_size, words):
    if rank:
        for module, name in ((lists, "read_trials"), (lists.Sources, "measure")):
            setattr(module, name, lambda *_: pytest.fail("another rank than the first reads lists or headers"))
    found = evaluation.evaluate_network(network(), settings(eval=words["eval"]), out_dir=words["out"])
    return sorted(found)


def test_lists_and_headers_are_read_on_the_first_rank_alone(corpus, tmp_path):
    options = {"trials": str(corpus / "test_list.txt"), "root": str(corpus)}
    first, second = run_ranks(2, _only_the_first_reads, {"eval": options, "out": str(tmp_path / "out")})
    assert "eer" in first and second == []


def test_a_cohort_may_be_named_by_its_run(run_dir, corpus, tmp_path):  # noqa: F811
    model, out = network().double(), {}  # an untrained network's cosines differ in their last float32 digits only
    opened = lists.open_lists(str(corpus / "test_list.txt"), root=str(corpus))
    asked = evaluation.Asked(bootstrap=0, breakdown=False)
    for name, cohort in (("path", str(run_dir)), ("array", None)):
        if cohort is None:
            cohort = evaluation_cohort(run_dir, model)
        out[name] = (
            evaluation.evaluate(model, opened, System(top=4, cohort=cohort), asked=asked).lists[0].scores["AS-norm"]
        )
    np.testing.assert_allclose(out["path"], out["array"], rtol=1e-6)


def evaluation_cohort(run, model):
    """The same means by hand: at most ten utterances of each of the eight speakers that the run was trained on."""
    _, c, meta = load_network(run)
    places, of = lists.Cohort.of_run(c, meta).places(16000)
    sources = lists.Sources(None, c.data.train_root)
    waves = [np.resize(sources.read(places, i), max(8000, places.samples[i])) / 32768 for i in range(len(of))]
    with torch.no_grad():
        rows = np.concatenate([model.eval()(torch.from_numpy(wave)[None]) for wave in waves])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.stack([rows[of == s].mean(axis=0) for s in range(8)])


def test_what_cannot_be_read_is_one_sentence(run_dir, corpus, tmp_path, capsys):  # noqa: F811
    base = ["--trials", corpus / "test_list.txt", "--root", corpus, "--out", tmp_path / "out", "--device", "cpu"]
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "embeddings.npy").write_bytes(b"garbage")
    (kept / "embeddings.json").write_text("{}")
    (kept / "embeddings.txt").write_text("")
    (tmp_path / "nul").write_bytes(b"1 a\0b c\n0 a b\n")
    for words, said in (
        (["--checkpoint", tmp_path / "none", *base], "no such checkpoint"),
        (["--embeddings", kept, *base], "cannot be read"),
        (["--checkpoint", run_dir, *base, "--utt2spk", tmp_path / "none"], "cannot read this list"),
        (["--checkpoint", run_dir, *base, "--enrolment", tmp_path], "is a folder, expected a file"),
        (["--checkpoint", run_dir, *base, "--metadata", tmp_path / "none", "--by", "x"], "no such file or folder"),
        (["--checkpoint", run_dir, *base, "--cohort", tmp_path / "none", "--subtract_mean"], "cannot read this list"),
        (["--checkpoint", run_dir, "--trials", tmp_path / "nul", *base[2:]], "zero bytes"),
        (["--checkpoint", run_dir, "--trials", tmp_path, *base[2:]], "is a folder, expected a file"),
    ):
        assert errors.run(command.main, [*map(str, words)]) == 2, words
        shown = capsys.readouterr().err
        assert said in shown and "Traceback" not in shown and len(shown.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(TrialError, match="give --trials LIST --root FOLDER"):
        evaluation.evaluate(network(), None)
