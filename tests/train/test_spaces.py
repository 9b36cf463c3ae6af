"""A corpus whose folders have spaces goes all the way: packed or loose, trained on, evaluated with its trials."""

import json
import subprocess
import sys

import pytest

from shards import pack
from spknet.evaluate import __main__ as evaluate
from tests.ranks import train


@pytest.mark.slow
def test_folders_with_spaces_are_packed_trained_on_and_evaluated(shared, corpus, options, tmp_path):
    data, spaced = tmp_path / "data", tmp_path / "spaced"
    data.mkdir()
    (data / "wav").symlink_to(corpus)
    (data / "train_list.txt").symlink_to(corpus / "train_list.txt")
    subprocess.run([sys.executable, str(shared / "cases" / "c08_spaces.py"), str(data), str(spaced)], check=True)
    assert "/my session0/" in (spaced / "trials.txt").read_text()
    listed, root = str(spaced / "train_list.txt"), str(spaced / "wav")
    assert not pack.main(["--list", listed, "--root", root, "--out", str(spaced / "shards")])
    shared_words = options[2:] + [
        "--train.max_steps",
        "2",
        "--eval.trials",
        str(spaced / "trials.txt"),
        "--eval.root",
        root,
    ]
    ways = {
        "packed": ["--data.train_shards", str(spaced / "shards")],
        "loose": ["--data.train_list", listed, "--data.train_root", root],
    }
    lines = [train(1, [*words, *shared_words, "--run_dir", str(tmp_path / way)]) for way, words in ways.items()]
    assert [line.get("loss") for line in lines[0]] == [line.get("loss") for line in lines[1]]
    words = ["--checkpoint", str(tmp_path / "loose"), "--trials", str(spaced / "trials.txt"), "--root", root]
    assert not evaluate.main([*words, "--out", str(tmp_path / "out"), "--no_pictures"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert lines[1][-1]["eval"]["eer"] == pytest.approx(report["lists"][0]["systems"]["cosine"]["eer"])
