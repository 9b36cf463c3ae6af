"""tools/demo.sh on a person's own corpus: what is wrong with it is said first, and names may hold spaces."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A checkout that tools/setup.sh finds ready: the sources of this one, and the Python that runs the tests."""
    folder = tmp_path / "checkout"
    venv = folder / ".venv"
    venv.mkdir(parents=True)
    for name in ("shards", "spknet", "tools", "setup.cfg", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for path in Path(sys.prefix).iterdir():
        if path.name in ("bin", "lib", "pyvenv.cfg"):
            (venv / path.name).symlink_to(path)
    texts = (ROOT / "setup.cfg").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    (venv / "spknet-stamp").write_text(hashlib.sha256(texts).hexdigest() + "\n")
    return folder


def demo(checkout: Path, *words: str, **how) -> subprocess.CompletedProcess:
    command = ["bash", str(checkout / "tools/demo.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **how)


@pytest.mark.parametrize("missing", ["train_list.txt", "test_list.txt"])
def test_a_missing_list_is_named_before_anything_is_written(missing, checkout, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in {"train_list.txt", "test_list.txt"} - {missing}:
        (tmp_path / "mine" / name).write_text("x y\n")
    done = demo(checkout, "mine", cwd=tmp_path)  # a relative path is meant from where the user is
    assert done.returncode == 1 and not (checkout / "demo").exists()
    assert done.stderr == (
        f"error: {tmp_path}/mine/{missing} is missing: a training list has lines 'speaker path', a test list"
        " 'label path path'\n"
    )


def test_a_mistyped_option_is_told_before_anything_is_made(checkout):
    done = demo(checkout, "--train.max_stepz", "3")
    assert done.returncode == 2 and not (checkout / "demo").exists()
    assert done.stderr == "error: unknown option --train.max_stepz; did you mean train.max_steps?\n"


def test_a_list_that_is_none_is_named_with_its_line(checkout, tmp_path):
    (tmp_path / "train_list.txt").write_text("one\n")
    (tmp_path / "test_list.txt").write_text("1 a b\n")
    done = demo(checkout, str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "train_list.txt" in done.stderr and "line 1" in done.stderr


@pytest.mark.slow
def test_it_runs_on_a_corpus_whose_names_hold_spaces_and_refuses_another_one_of_that_name(checkout, corpus, tmp_path):
    mine = tmp_path / "my corpus"
    shutil.copytree(corpus, mine)
    for name, space in (("train_list.txt", "\t"), ("test_list.txt", " ")):
        rows = [line.split() for line in (corpus / name).read_text().splitlines()]
        lines = [space.join([first, *(f"some people/{path}" for path in paths)]) for first, *paths in rows]
        (mine / name).write_text("\n".join(lines) + "\n\n")
    (mine / "some people").mkdir()
    for path in [path for path in mine.iterdir() if path.name.startswith("id")]:
        path.rename(mine / "some people" / path.name)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = demo(checkout, "my corpus", "--train.max_steps", "3", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    run = checkout / "demo/my corpus/run"
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["step"]) == ("done", 3) and (run / "evaluation/report.json").exists()
    assert "EER" in done.stdout
    (tmp_path / "other").mkdir()
    other = Path(shutil.copytree(mine, tmp_path / "other/my corpus"))
    lines = (other / "train_list.txt").read_text().splitlines()
    (other / "train_list.txt").write_text("\n".join(lines[1:]) + "\n")
    done = demo(checkout, str(other), env=environment)
    assert done.returncode == 2 and "another list" in done.stderr, done.stderr[-3000:]
