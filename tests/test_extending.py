"""What docs/extending.md adds is added to a copy of the repository, as written, and trained with."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks() -> list[tuple[str, str, str]]:
    """(language, file, content) of each code block: the file stands in its first line."""
    found = re.findall(
        r"^```(\w+)\n(?:# |--- )(\S+)\n(.*?)^```$", (ROOT / "docs/extending.md").read_text(), re.M | re.S
    )
    assert {language for language, _, _ in found} == {"python", "diff", "yaml"}
    return found


def patched(text: str, diff: str) -> str:
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if not line.startswith("+"))
    new = "".join(line[1:] for line in lines if not line.startswith("-"))
    assert text.count(old) == 1, f"not once in the file: {old}"
    return text.replace(old, new)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The packages with the edits of the page."""
    folder = tmp_path_factory.mktemp("extended")
    for package in ("spknet", "shards"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for language, name, content in blocks():
        path = folder / name
        assert path.exists() == (language == "diff"), name
        path.write_text(patched(path.read_text(), content) if language == "diff" else content)
    return folder


def run(folder: Path, *words: str) -> str:
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_s_network_has_the_published_size(copy):
    code = (
        "from spknet.config import ModelConfig; from spknet.models import build_model;"
        "print(sum(p.numel() for p in build_model(ModelConfig(name='XVector')).parameters()))"
    )
    assert int(run(copy, "-c", code)) == 4610524  # WeSpeaker's x-vector with TSTP and 512 dimensions


def test_the_page_s_parts_train_together(copy, corpus, noise_and_rir, tmp_path):
    options = f"--config xvector --data.train_shards {corpus}/shards --augment.noise_shards {noise_and_rir[0]}"
    options += f" --augment.rir_shards {noise_and_rir[1]} --data.speakers_per_batch 8 --data.crop_seconds 0.5"
    options += " --data.workers 0 --model.width 0.125 --model.embedding_size 16 --train.max_steps 2 --train.threads 1"
    options += f" --log.tensorboard false --log.every_steps 1 --train.device cpu --run_dir {tmp_path}/run"
    run(copy, "-m", "spknet.train", *options.split())
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    config = (tmp_path / "run/config.yaml").read_text()
    assert all(word in config for word in ("XVector", "logistic", "mfcc", "noisy"))


def test_the_page_s_lines_are_few():
    lines = [line for language, _, content in blocks() for line in content.splitlines() if language != "diff"]
    added = [line[1:] for language, _, c in blocks() if language == "diff" for line in c.splitlines() if line[0] == "+"]
    code = [line for line in lines + added if line.strip() and not re.match(r'\s*(#|"""|import|from|class)', line)]
    assert len(code) <= 45
