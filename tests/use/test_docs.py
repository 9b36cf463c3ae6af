"""docs/use.md from top to bottom: its commands and its Python are run on real speech and print what stands there.

The training is cut to three steps, so numbers and answers differ; the test compares the lines with both masked.
`python -m tests.use.test_docs FOLDER` runs the page as it stands, in FOLDER, and writes what is printed into it.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "use.md"
BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```$", re.M | re.S)
ANSWERS = r"same speaker|different speakers|Speaker \d \(|nobody who is enrolled \(|\b(true|false)\b"


def masked(text: str) -> list[str]:
    """Lines with numbers, digests and answers masked, sorted where identify's order may differ."""
    text = re.sub(ANSWERS, "ANSWER", text)
    return [re.sub(r"-?\d[\d,.]*(e-?\d+)?", "#", line).strip() for line in text.splitlines()]


def run_page(folder: Path, text: str) -> list[tuple[re.Match, str]]:
    """Every block of code with what it printed."""
    (folder / "bin").mkdir()
    (folder / "bin" / "spknet").write_text(f'#!/bin/sh\nexec {sys.executable} -m spknet "$@"\n')
    (folder / "bin" / "spknet").chmod(0o755)
    (folder / "shared").symlink_to(ROOT.parent / "shared")
    (folder / "work" / "out").mkdir(parents=True, exist_ok=True)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    names, done = {}, []
    for block in BLOCK.finditer(text):
        kind, code = block.groups()
        if kind == "bash":
            words = {"cwd": folder / "work", "env": environment, "capture_output": True, "text": True}
            ran = subprocess.run(["bash", "-c", code], **words)
            assert ran.returncode == 0 and "error:" not in ran.stderr and "Traceback" not in ran.stderr, ran.stderr
            done.append((block, ran.stdout))
        elif kind == "python":
            with contextlib.chdir(folder / "work"), contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, names)
            done.append((block, printed.getvalue()))
    return done


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(shared, tmp_path):
    text = PAGE.read_text().replace("--train.max_steps 300", "--train.max_steps 3")
    assert text.count("--train.max_steps 3") == 1
    for block, printed in run_page(tmp_path, text):
        following = BLOCK.match(text, block.end() + 2)
        if following and following[1] == "text":
            assert masked(printed) == masked(following[2]), block[2]
    assert (tmp_path / "work" / "runs" / "small" / "card.md").is_file()


if __name__ == "__main__":
    content = PAGE.read_text()
    for match, output in reversed(run_page(Path(sys.argv[1]), content)):
        after = BLOCK.match(content, match.end() + 2)
        if after and after[1] == "text":
            content = content[: after.start()] + f"```text\n{output}```" + content[after.end() :]
    PAGE.write_text(content)
