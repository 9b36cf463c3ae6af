"""docs/use.md from top to bottom, and the README's lines of Python: run on real speech, they print what stands there.

The training is cut to three steps, so numbers and answers differ; the test compares the lines with both masked.
`python -m tests.use.test_docs FOLDER` runs both as they stand, in FOLDER, and writes what is printed into them.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs" / "use.md", ROOT / "README.md"]
BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```$", re.M | re.S)
ANSWERS = r"same speaker|different speakers|Speaker \d \(|nobody who is enrolled \(|\b(true|false)\b"


def masked(text: str) -> list[str]:
    """Lines with numbers, digests and answers masked, sorted where identify's order may differ."""
    text = re.sub(ANSWERS, "ANSWER", text)
    return [re.sub(r"-?\d[\d,.]*(e-?\d+)?", "#", line).strip() for line in text.splitlines()]


def prepare(folder: Path) -> dict[str, str]:
    """The environment of commands: a folder `work` beside `shared`, and `spknet` on the path."""
    (folder / "bin").mkdir()
    (folder / "bin" / "spknet").write_text(f'#!/bin/sh\nexec {sys.executable} -m spknet "$@"\n')
    (folder / "bin" / "spknet").chmod(0o755)
    (folder / "shared").symlink_to(ROOT.parent / "shared")
    (folder / "work" / "out").mkdir(parents=True, exist_ok=True)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_page(work: Path, text: str, environment: dict[str, str]) -> list[tuple[str, re.Match | None, str]]:
    """Every block of commands or Python: its code, the block of text behind it, and what it printed."""
    names, done = {}, []
    for block in BLOCK.finditer(text):
        kind, code = block.groups()
        if kind == "bash":
            words = {"cwd": work, "env": environment, "capture_output": True, "text": True}
            ran = subprocess.run(["bash", "-c", code], **words)
            assert ran.returncode == 0 and "error:" not in ran.stderr and "Traceback" not in ran.stderr, ran.stderr
            printed = ran.stdout
        elif kind == "python":
            with inside(work), contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(code, names)
            printed = stream.getvalue()
        else:
            continue
        behind = BLOCK.match(text, block.end() + 2)
        done.append((code, behind if behind and behind[1] == "text" else None, printed))
    return done


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_pages_run_from_top_to_bottom(shared, tmp_path):
    environment = prepare(tmp_path)
    for page in PAGES:
        text = page.read_text().replace("--train.max_steps 300", "--train.max_steps 3")
        done = run_page(tmp_path / "work", text, environment)
        assert any(behind for _, behind, _ in done)
        for code, behind, printed in done:
            if behind:
                assert masked(printed) == masked(behind[2]), code
    assert (tmp_path / "work" / "runs" / "small" / "card.md").is_file()


if __name__ == "__main__":
    home = Path(sys.argv[1])
    variables = prepare(home)
    for page in PAGES:
        content = page.read_text()
        for _, behind, printed in reversed(run_page(home / "work", content, variables)):
            if behind:
                content = content[: behind.start()] + f"```text\n{printed}```" + content[behind.end() :]
        page.write_text(content)
