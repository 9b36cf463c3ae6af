"""A network evaluated on lists: the same bytes on any number of ranks, every mistake named before anything is embedded."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from shards.format import ShardError
from spknet import config, errors, rng
from spknet.checkpoints import file as checkpoint
from spknet.config import ConfigError
from spknet.errors import UserError
from spknet.evaluate import __main__ as command
from spknet.evaluate import embed
from spknet.evaluate import evaluation as evaluate
from spknet.evaluate.trials import TrialError
from spknet.evaluate.utterances import Crops, Sources
from spknet.models import build_model
from tests.ranks import run_ranks


def settings(**groups):
    small = {"name": "ResNetSE34L", "width": 0.25, "embedding_size": 16}
    return config.from_dict({"model": small} | groups)


def network(of=None):
    model = build_model((of or settings()).model)
    rng.initialize(model, 3)
    return model


@pytest.fixture
def lists(corpus, tmp_path):
    """Words of config.eval for the corpus: a test list, a development list with other pairs, loose files."""
    lines = (corpus / "test_list.txt").read_text().splitlines()
    (tmp_path / "tests.txt").write_text("\n".join(lines[:60]) + "\n")
    (tmp_path / "dev.txt").write_text("\n".join(lines[60:]) + "\n")
    return {"trials": str(tmp_path / "tests.txt"), "dev_trials": str(tmp_path / "dev.txt"), "root": str(corpus)}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, corpus):
    """A run folder with one checkpoint; its config names the corpus as training data."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    c = settings(data={"train_list": str(corpus / "train_list.txt"), "train_root": str(corpus), "dev_speakers": 4})
    speakers = sorted({line.split()[0] for line in (corpus / "train_list.txt").read_text().splitlines()})
    state = {
        "step": 5,
        "epoch": 0.5,
        "config": config.to_dict(c),
        "model": network(c).state_dict(),
        "speakers": speakers,
    }
    checkpoint.save(folder, state, keep=0)
    return folder


def _evaluate(_rank, world_size, eval_options, out):
    found = evaluate.evaluate_network(network(), settings(eval=eval_options), out_dir=out, step=7)
    return found, torch.get_num_threads()


CROPS = {"crop_seconds": 0.5, "crops": 3, "score": "mean_distance"}


@pytest.mark.parametrize("crops", [{}, pytest.param(CROPS, marks=pytest.mark.slow)])
def test_1_2_and_4_ranks_write_the_same_scores_byte_for_byte(lists, tmp_path, crops):
    results = {}
    for ranks in (1, 2, 4):
        out = tmp_path / str(ranks)
        found = run_ranks(ranks, _evaluate, lists | crops | {"batch_seconds": 3.0}, str(out), join=ranks > 1)
        assert all(rest == ({}, 1) for rest in found[1:])
        results[ranks] = found[0][0], {p.name: p.read_bytes() for p in out.iterdir()}
    assert results[1] == results[2] == results[4]
    figures, files = results[1]
    assert set(files) == {"scores.txt", "scores-dev.txt", "report.json", "det.png"}
    assert figures["eer"] == figures["lists"]["tests"]["eer"] and figures["dev_eer"] == figures["lists"]["dev"]["eer"]
    assert figures["trials"] == 60 and json.loads(files["report.json"])["step"] == 7


def test_fewer_utterances_than_ranks(corpus, tmp_path):
    lines = [
        "1 id00000/session0/00000.wav id00000/session1/00001.wav",
        "0 id00000/session0/00000.wav id00001/session1/00001.wav",
    ]
    (tmp_path / "few.txt").write_text("\n".join(lines) + "\n")
    options = {"trials": str(tmp_path / "few.txt"), "root": str(corpus)}
    for ranks in (1, 4):
        run_ranks(ranks, _evaluate, options, str(tmp_path / str(ranks)), join=ranks > 1)
    assert (tmp_path / "1" / "scores.txt").read_bytes() == (tmp_path / "4" / "scores.txt").read_bytes()


def test_packed_and_loose_audio_score_the_same(corpus, lists, tmp_path):
    packed = {name: value for name, value in lists.items() if name != "root"} | {"shards": str(corpus / "shards")}
    for name, options in (("loose", lists), ("packed", packed)):
        evaluate.evaluate_network(network(), settings(eval=options), out_dir=tmp_path / name)
    assert (tmp_path / "loose" / "scores.txt").read_bytes() == (tmp_path / "packed" / "scores.txt").read_bytes()


def test_scores_equal_embedding_each_utterance_alone(corpus, lists, tmp_path):
    model = network().eval()
    evaluate.evaluate_network(model, settings(eval=lists), out_dir=tmp_path / "out")
    for line in (tmp_path / "out" / "scores.txt").read_text().splitlines()[:12]:
        score, a, b, label = line.split()
        x, y = (soundfile.read(corpus / name, dtype="int16")[0] for name in (a, b))
        with torch.no_grad():
            e, t = (model(torch.from_numpy(np.resize(z, max(len(z), 8000)))[None] / 32768)[0] for z in (x, y))
        assert float(score) == pytest.approx(float(torch.cosine_similarity(e, t, dim=0)), abs=1e-5)
        assert label == ("target" if a.split("/")[0] == b.split("/")[0] else "nontarget")


def test_training_mode_is_left_as_it_was(lists, tmp_path):
    model = network().train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate.evaluate_network(model, settings(eval=lists), out_dir=tmp_path / "out")
    assert model.training and not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_float64_network_is_evaluated_in_float64(lists, tmp_path):
    found = evaluate.evaluate_network(network().double(), settings(eval=lists), out_dir=tmp_path / "a")
    single = evaluate.evaluate_network(network(), settings(eval=lists), out_dir=tmp_path / "b")
    assert found["eer"] == pytest.approx(single["eer"], abs=1.0)
    assert (tmp_path / "a" / "scores.txt").read_bytes() != (tmp_path / "b" / "scores.txt").read_bytes()


def test_order_sides_and_duplicates_of_trials_change_no_figure(lists, tmp_path):
    lines = Path(lists["trials"]).read_text().splitlines()
    (tmp_path / "other.txt").write_text("".join(f"{t} {b} {a}\n" for t, a, b in map(str.split, reversed(lines * 2))))
    options = lists | {"trials": [lists["trials"], str(tmp_path / "other.txt")], "dev_trials": None}
    names = evaluate.check(settings(eval=options)).places.names
    assert len(names) == len(set(names))  # both lists name the same utterances; each is embedded once
    found = evaluate.evaluate_network(network(), settings(eval=options), out_dir=tmp_path / "out")["lists"]
    assert (found["other"]["trials"], found["tests"]["trials"]) == (120, 60)
    for name in ("eer", "min_dcf_p01", "min_dcf_p05", "min_cllr", "eer_low", "eer_high"):
        assert found["other"][name] == pytest.approx(found["tests"][name], abs=1e-9)


def test_an_unlabelled_list_is_scored_only(lists, tmp_path):
    (tmp_path / "blind.txt").write_text(
        "".join(line[2:] + "\n" for line in Path(lists["trials"]).read_text().splitlines())
    )
    options = {"trials": str(tmp_path / "blind.txt"), "root": lists["root"]}
    assert evaluate.evaluate_network(network(), settings(eval=options), out_dir=tmp_path / "out") == {
        "lists": {"blind": {}}
    }
    assert len((tmp_path / "out" / "scores.txt").read_text().splitlines()[0].split()) == 3


def test_unknown_files_are_named_with_their_line_before_training(lists, tmp_path):
    text = Path(lists["dev_trials"]).read_text().splitlines()
    text[4] = "0 id00001/session0/00000.wav id00001/nowhere/00009.wav"
    (tmp_path / "dev.txt").write_text("\n".join(text) + "\n")
    with pytest.raises(
        TrialError, match=r"dev.txt, line 5: id00001/nowhere/00009.wav not found in .*\(1 utterances of this"
    ):
        evaluate.check(settings(eval=lists))
    with pytest.raises(TrialError, match="not found in any folder, as none was given; give --root or --shards"):
        evaluate.check(settings(eval=lists | {"root": None}))
    assert evaluate.check(settings()) is None


def test_unreadable_audio_and_impossible_crops_are_refused_before_training(corpus, lists, tmp_path):
    name = "id00000/session0/00000.wav"
    for damage, said in (
        (lambda p: soundfile.write(p, np.zeros(800), 8000), "8000 Hz"),
        (lambda p: p.write_bytes(b"RIFF"), "00000.wav"),
    ):
        root = tmp_path / said
        shutil.copytree(corpus, root, ignore=shutil.ignore_patterns("shards"))
        damage(root / name)
        with pytest.raises(ShardError, match=said):
            evaluate.check(settings(eval=lists | {"root": str(root)}))
    with pytest.raises(ConfigError, match="several crops want eval.crop_seconds above 0"):
        evaluate.check(settings(eval=lists | {"crops": 10}))
    with pytest.raises(TrialError, match="two lists are called 'tests'"):
        evaluate.check(settings(eval=lists | {"trials": [lists["trials"]] * 2}))


def test_utterances_are_looked_for_in_several_roots_and_with_other_endings(corpus, tmp_path):
    audio, rate = soundfile.read(corpus / "id00000/session0/00000.wav", dtype="int16")
    for root, name in (("one", "a/v/0.flac"), ("two", "b/v/0.wav")):
        (tmp_path / root / name).parent.mkdir(parents=True)
        soundfile.write(tmp_path / root / name, audio, rate, subtype="PCM_16")
    sources = Sources(roots=[str(tmp_path / "one"), str(tmp_path / "two")])
    places = sources.measure(sources.locate(["a/v/0.wav", "b/v/0.wav", "b/v/0", "c/v/0.wav"][:3]))
    assert places.samples.tolist() == [len(audio)] * 3
    np.testing.assert_array_equal(sources.read(places, 0), audio)
    assert sources.locate(["c/v/0.wav"]).missing() == ["c/v/0.wav"]


def _damaged(rank, world_size, options, out):
    prepared = evaluate.check(settings(eval=options)) if rank == 0 else None
    torch.distributed.barrier()
    if rank == 0:
        path = prepared.places.where[3]
        soundfile.write(path, np.zeros(777), 16000, subtype="PCM_16")
    torch.distributed.barrier()
    with pytest.raises(UserError, match="777 samples read"):
        evaluate.evaluate_network(network(), settings(eval=options), out_dir=out, trials=prepared)


def test_a_file_that_changed_on_the_way_stops_every_rank(corpus, lists, tmp_path):
    shutil.copytree(corpus, tmp_path / "copy", ignore=shutil.ignore_patterns("shards"))
    run_ranks(2, _damaged, lists | {"root": str(tmp_path / "copy")}, str(tmp_path / "out"))


def test_crops_start_where_voxceleb_trainers_do():
    # Ten crops of 300 frames: 48,240 samples, starts linspace(0, length - crop, 10) truncated.
    crops, audio = Crops(160 * 300 + 240, 10), np.arange(80001, dtype=np.int32)
    assert crops.cut(audio)[:, 0].tolist() == [int(i * (80001 - 48240) / 9) for i in range(10)]
    assert crops.cut(audio).shape == (10, 48240)
    short = np.arange(1, 48241, dtype=np.int32)  # as long as the crop: repeated until one sample longer
    assert crops.cut(short)[:, 0].tolist() == [1] * 9 + [2] and crops.cut(short)[9, -1] == 1
    tiled = Crops(10, 1).cut(np.array([1, 2, 3, 4]))[0]
    assert tiled.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    assert Crops(10, 1, "zeros").cut(np.array([1, 2, 3, 4]))[0].tolist() == [0, 0, 0, 1, 2, 3, 4, 0, 0, 0]
    assert Crops(10, 2, "zeros").cut(np.array([1, 2, 3]))[:, 4].tolist() == [1, 2]  # 4 zeros on both sides
    assert Crops().cut(np.array([1, 2, 3])).shape == (1, 8000)


def test_batches_hold_equal_lengths_within_the_limit_and_go_out_whole():
    samples = np.array([16000, 20000, 16000, 16000, 100, 200, 90000])
    batches = [b.tolist() for b in embed.plan(samples, Crops(), 32000)]
    assert sorted(map(sorted, batches)) == [[0, 2], [1], [3], [4, 5], [6]]  # the short ones are repeated to one length
    assert [len(b) for b in embed.plan(samples, Crops(8000, 2), 40000)] == [2, 2, 2, 1]
    assert embed.deal([5, 9, 1, 1, 4], 2) == [[1, 2], [0, 4, 3]]  # 9 + 1 and 5 + 4 + 1
    assert embed.deal([1], 3) == [[0], [], []]


def run(*words):
    return errors.run(command.main, [*map(str, words), "--device", "cpu", "--threads", "1"])


def test_the_command_reports_everything_that_is_asked_for(run_dir, corpus, lists, tmp_path, capsys):
    (tmp_path / "meta.csv").write_text("speaker,gender\n" + "".join(f"id{s:05d},{'fm'[s % 2]}\n" for s in range(12)))
    words = [
        "--checkpoint",
        run_dir,
        "--trials",
        lists["trials"],
        "--dev_trials",
        lists["dev_trials"],
        "--root",
        corpus,
    ]
    words += [
        "--untrained",
        "--subtract_mean",
        "--as_norm",
        5,
        "--cohort_utterances",
        2,
        "--calibrate",
        "--quality",
        "duration",
    ]
    words += ["--metadata", tmp_path / "meta.csv", "--by", "gender", "--bootstrap", 50, "--keep_embeddings"]
    assert run(*words, "--out", tmp_path / "out", "--tensorboard", tmp_path / "board") == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    systems = ["untrained", "cosine", "mean-subtracted", "AS-norm", "calibrated"]
    assert [list(entry["systems"]) for entry in report["lists"]] == [systems, systems]
    assert all(name in shown for name in systems) and report["step"] == 5 and report["model"]["width"] == 0.25
    # The network is untrained: its initial weights under seed 0 are other ones, not none.
    first = report["lists"][0]
    assert first["systems"]["untrained"]["eer"] != first["systems"]["cosine"]["eer"]
    assert {"cllr", "act_dcf_p01", "min_cllr"} <= set(first["systems"]["calibrated"])
    assert {g["group"] for g in first["groups"]["gender"]} == {"f", "f / m", "m"}
    assert [row["threshold"] for row in first["thresholds"]] == [None] * 3  # far too few development trials
    kept = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "report.html",
        "map.png",
        "det-tests.png",
        "histogram-dev.png",
        "reliability-tests.png",
        "cohort.npy",
    } <= kept
    assert any(p.name.startswith("events") for p in (tmp_path / "board").iterdir())
    assert np.load(tmp_path / "out" / "cohort.npy").shape == (8, 16)  # 12 speakers, 4 kept out of training

    again = ["--embeddings", tmp_path / "out", *words[2:6], "--subtract_mean", "--as_norm", 5, "--calibrate"]
    assert run(*again, "--quality", "duration", "--out", tmp_path / "again", "--no_pictures") == 0
    assert (tmp_path / "again" / "scores.txt").read_bytes() == (tmp_path / "out" / "scores.txt").read_bytes()
    assert not (tmp_path / "again" / "report.html").exists()


def _command(_rank, world_size, words):
    if world_size == 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    return errors.run(command.main, words)


def test_the_command_under_torchrun_writes_the_same_scores(run_dir, corpus, lists, tmp_path):
    words = [
        "--checkpoint",
        str(run_dir),
        "--eval.trials",
        lists["trials"],
        "--eval.root",
        str(corpus),
        "--as_norm",
        "6",
    ]
    words += ["--no_pictures", "--bootstrap", "0", "--device", "cpu", "--untrained", "--cohort_utterances", "1"]
    for ranks in (1, 2):
        assert run_ranks(ranks, _command, [*words, "--out", str(tmp_path / str(ranks))], join=False) == [0] * ranks
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "12")
    assert one == two and {"scores.txt", "scores-cosine.txt", "scores-untrained.txt"} <= set(one)


def test_what_is_wrong_on_the_command_line_is_said_before_extraction(run_dir, corpus, lists, tmp_path, capsys):
    base = ["--checkpoint", run_dir, "--trials", lists["trials"], "--root", corpus, "--out", tmp_path / "out"]
    (tmp_path / "meta.csv").write_text("speaker,gender\nsomebody,f\n")
    crops = tmp_path / "crops"
    kept = ["--checkpoint", run_dir, "--score", "mean_distance", "--keep_embeddings", "--no_pictures", "--bootstrap", 0]
    assert run(*kept, *base[2:6], "--out", crops) == 0
    for words, said in (
        (base + ["--calibrate"], "calibration is learned on development trials with labels; give --dev_trials LIST"),
        (base + ["--as_norm", 300], "AS-norm over the top 300 of a cohort of 8 speakers"),
        (base + ["--as_norm", 3, "--score", "mean_distance"], "work on cosine scores"),
        (base + ["--by", "gender"], "give it as --metadata FILE"),
        (
            base + ["--by", "gender", "--metadata", tmp_path / "meta.csv"],
            "the metadata knows none of this list's speakers",
        ),
        (
            base + ["--by", "height", "--metadata", tmp_path / "meta.csv"],
            "no column 'height' in the metadata; there are gender",
        ),
        (base[:2] + ["--out", tmp_path / "out"], "no list to evaluate: the run names none"),
        (["--checkpoint", tmp_path / "nowhere", *base[2:]], "no such checkpoint"),
        (["--embeddings", tmp_path, *base[2:]], "holds no embeddings.npy"),
        (["--embeddings", crops, *base[2:], "--as_norm", 3], "work on cosine scores"),
    ):
        assert run(*words) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        run("--trials", lists["trials"])
    assert "give --checkpoint RUN_OR_FILE, or --embeddings FOLDER" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--embeddings", tmp_path, "--trials", lists["trials"], "--untrained")
    assert "it needs --checkpoint" in capsys.readouterr().err


def test_other_audio_replaces_the_runs_lists_and_places():
    run_config = settings(eval={"trials": "run.txt", "dev_trials": "dev.txt", "root": "audio", "crops": 10})

    def chosen(*words):
        e = command.with_options(run_config, command.arguments(["--checkpoint", "x", *words])).eval
        return e.trials, e.dev_trials, e.root, e.shards, e.crops

    assert chosen() == ("run.txt", "dev.txt", "audio", None, 10)
    assert chosen("--trials", "a", "b") == (["a", "b"], "dev.txt", "audio", None, 10)
    assert chosen("--trials", "a", "--eval.shards", "s", "--crops", "1") == (["a"], None, None, ["s"], 1)
    assert chosen("--dev_trials", "d", "--root", "r") == (None, "d", ["r"], None, 10)
    assert chosen("--root", "r") == ("run.txt", "dev.txt", ["r"], None, 10)


def test_enrolled_models_are_scored_from_the_command_line(run_dir, corpus, tmp_path):
    (tmp_path / "enrol").write_text(
        "m0 id00000/session0/00000.wav id00000/session1/00001.wav\nm1 id00001/session0/00000.wav\n"
    )
    lines = [
        f"{m} id{s:05d}/session1/00003.wav {'target' if m == f'm{s}' else 'nontarget'}"
        for m in ("m0", "m1")
        for s in (0, 1)
    ]
    (tmp_path / "list").write_text("\n".join(lines) + "\n")
    words = [
        "--checkpoint",
        run_dir,
        "--trials",
        tmp_path / "list",
        "--root",
        corpus,
        "--enrolment",
        tmp_path / "enrol",
    ]
    assert run(*words, "--out", tmp_path / "out", "--bootstrap", 20, "--no_pictures") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["lists"][0]["trials"], report["lists"][0]["speakers"]) == (4, 2)
