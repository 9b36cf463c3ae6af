"""What a user can get wrong, from the command line on: what the message says, and that nothing is lost."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spknet.train.run_folder import read_state
from tests.ranks import run_ranks, train

ROOT = Path(__file__).resolve().parents[2]


def _status(_rank, world_size, words):
    import os

    from spknet.train.__main__ import main

    if world_size == 1:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    return main(words)


def error_of(words, capfd, world=1):
    assert run_ranks(world, _status, words, join=False) == [2] * world
    return capfd.readouterr().err


def loose(corpus, tmp_path, change):
    """A copy of the corpus as loose files after `change(folder)`, and the words that train on it."""
    folder = tmp_path / "files"
    shutil.copytree(corpus, folder, ignore=shutil.ignore_patterns("shards"))
    change(folder)
    words = f"--data.train_list {folder}/train_list.txt --data.train_root {folder} --data.speakers_per_batch 8"
    return f"{words} --data.workers 0 --data.crop_seconds 0.5 --run_dir {tmp_path}/run --train.max_steps 1".split()


def first_file(folder):
    return folder / "id00000/session0/00000.wav"


BAD_FILES = {
    "a line without a file": (
        lambda f: (f / "train_list.txt").write_text("id00000 id00000/session0/00000.wav\nid00001\n"),
        "train_list.txt, line 2",
    ),
    "missing": (lambda f: first_file(f).unlink(), "id00000/session0/00000.wav"),
    "unreadable": (lambda f: first_file(f).write_bytes(b"RIFF, but not really"), "id00000/session0/00000.wav"),
    "another rate": (lambda f: soundfile.write(first_file(f), np.zeros(8000), 8000), "8000"),
    "stereo": (lambda f: soundfile.write(first_file(f), np.zeros((8000, 2)), 16000), "2 channels"),
    "empty": (lambda f: soundfile.write(first_file(f), np.zeros(0), 16000), "id00000/session0/00000.wav"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_loose_files_are_named_before_training(case, corpus, tmp_path, capfd):
    change, expected = BAD_FILES[case]
    said = error_of(loose(corpus, tmp_path, change), capfd)
    assert "error: " in said and expected in said
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("case", BAD_FILES)
def test_packing_bad_files_names_them_and_leaves_no_data_set(case, corpus, tmp_path):
    change, expected = BAD_FILES[case]
    words = loose(corpus, tmp_path, change)
    command = [
        sys.executable,
        "-m",
        "shards.pack",
        "--list",
        words[1],
        "--root",
        words[3],
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*command, "--workers", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out/index/index.json").exists()


def test_speakers_with_too_few_utterances_are_left_out_with_a_count(corpus, tmp_path, capfd):
    def shorten(folder):
        lines = (folder / "train_list.txt").read_text().splitlines()
        kept = [x for x in lines if not x.startswith(("id00002 ", "id00005 ")) or x.endswith("/00000.wav")]
        (folder / "train_list.txt").write_text("\n".join(kept) + "\n")

    train(1, [*loose(corpus, tmp_path, shorten), "--model.width", "0.125"])
    assert "2 speakers have fewer than 2 utterances and are left out" in capfd.readouterr().err


def test_fewer_speakers_than_a_batch_says_how_many_there_are(options, tmp_path, capfd):
    said = error_of([*options, "--data.speakers_per_batch", "13", "--run_dir", str(tmp_path)], capfd)
    assert "12 speakers have at least 2 utterances" in said and "speakers_per_batch=13" in said
    assert read_state(tmp_path)["state"] == "failed"


def test_a_batch_that_the_ranks_cannot_share_names_both(options, tmp_path, capfd):
    said = error_of([*options, "--data.speakers_per_batch", "9", "--run_dir", str(tmp_path)], capfd, world=2)
    assert "data.speakers_per_batch=9 cannot be shared by 2 ranks; choose a multiple of 2" in said


def test_an_unknown_option_names_the_nearest(options, tmp_path, capfd):
    said = error_of([*options, "--data.worker", "3", "--run_dir", str(tmp_path)], capfd)
    assert "unknown option --data.worker; did you mean data.workers?" in said


def test_a_trial_without_its_file_is_named_with_its_line_before_training(options, corpus, tmp_path, capfd):
    trials = tmp_path / "trials.txt"
    good = (corpus / "test_list.txt").read_text().splitlines()[:3]
    trials.write_text("\n".join([*good, "0 id00000/session0/00000.wav id00000/none.wav"]) + "\n")
    words = [*options, "--eval.trials", str(trials), "--eval.root", str(corpus), "--run_dir", str(tmp_path / "run")]
    said = error_of(words, capfd)
    assert "line 4" in said and "id00000/none.wav" in said
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--data.train_shards FOLDER"),
        (["--data.train_list", "x"], "wants --data.train_root"),
        (["--data.train_shards", "nowhere"], "nowhere"),
        (["--config", "fast_resnet"], "recipes:"),
    ],
)
def test_missing_data_says_what_to_give(words, expected, tmp_path, capfd):
    assert expected in error_of([*words, "--run_dir", str(tmp_path)], capfd)


def test_a_missing_run_dir_is_asked_for(options, capfd):
    assert "--run_dir FOLDER is missing" in error_of(options, capfd)


def test_changed_options_are_named_on_resume_and_the_run_is_left_as_it_was(options, tmp_path, capfd):
    words = [*options, "--run_dir", str(tmp_path)]
    train(1, [*words, "--train.max_steps", "2"])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    said = error_of([*words, "--train.max_steps", "4", "--optim.lr", "0.01", "--loss.name", "ge2e"], capfd)
    assert "optim.lr: 0.001 -> 0.01" in said and "loss.name: angleproto -> ge2e" in said and "resume_override" in said
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    lines = train(1, [*words, "--train.max_steps", "4", "--optim.lr", "0.01", "--train.resume_override", "true"])
    assert [line["lr"] for line in lines] == [0.001, 0.001, 0.01, 0.01]


def test_what_may_change_does_change_on_resume(options, corpus, tmp_path):
    words = [*options, "--run_dir", str(tmp_path / "a")]
    train(1, [*words, "--train.max_steps", "2"])
    shutil.copytree(corpus / "shards", tmp_path / "moved")  # another path with the same content
    place = words.index("--data.train_shards") + 1
    words[place] = str(tmp_path / "moved")
    lines = train(1, [*words, "--train.max_steps", "5", "--data.workers", "1", "--log.every_steps", "3"])
    assert [line["step"] for line in lines] == [1, 2, 3, 5]


def test_a_checkpoint_folder_that_is_not_one_is_named(options, tmp_path, capfd):
    said = error_of([*options, "--run_dir", str(tmp_path), "--train.resume", str(tmp_path / "none.pt")], capfd)
    assert "none.pt: no such checkpoint" in said


def test_an_unlabelled_list_is_scored_during_training(options, corpus, tmp_path):
    blind = tmp_path / "blind.txt"
    lines = (corpus / "test_list.txt").read_text().splitlines()[:6]
    blind.write_text("".join(line.split(" ", 1)[1] + "\n" for line in lines))
    words = [*options, "--eval.trials", str(blind), "--eval.root", str(corpus), "--train.max_steps", "1"]
    train(1, [*words, "--run_dir", str(tmp_path / "run")])
    scores = (tmp_path / "run/eval/step-00000001/scores.txt").read_text().splitlines()
    assert [line.split()[1:3] for line in scores] == [line.split()[1:] for line in lines]


def test_training_evaluates_and_keeps_the_best_checkpoint(options, corpus, tmp_path):
    words = [
        *options,
        "--run_dir",
        str(tmp_path),
        "--eval.trials",
        f"{corpus}/test_list.txt",
        "--eval.root",
        str(corpus),
    ]
    shutil.copy(corpus / "test_list.txt", tmp_path / "dev_list.txt")
    words += ["--eval.dev_trials", f"{tmp_path}/dev_list.txt", "--eval.every_epochs", "0.5", "--train.max_steps", "9"]
    words += ["--train.keep_checkpoints", "1", "--log.tensorboard", "true"]
    lines = train(2, words)
    evaluated = {line["step"]: line["eval"] for line in lines if "eval" in line}
    # 12 speakers of 2 groups, 8 a batch: 3 steps an epoch; half of that is rounded to 2
    assert list(evaluated) == [2, 4, 6, 8, 9]
    best = min(evaluated, key=lambda step: (evaluated[step]["dev_eer"], step))
    kept = {int(p.stem.split("-")[1]) for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, 9}
    assert {p.name for p in (tmp_path / "eval/step-00000009").iterdir()} >= {"scores.txt", "report.json", "det.png"}
