"""What comments, docstrings and pages name exists: files, modules and their names, headings, commands and their options."""

import ast
import importlib
import io
import re
import tokenize
from pathlib import Path

import pytest

from spknet import config
from tests.test_docs_commands import MODULES, TRAIN, known_options
from tests.test_readme import PAGES

ROOT = Path(__file__).resolve().parents[1]
ROOMS = "shards|spknet|launch|tools|tests"
SOURCES = sorted(path for room in ROOMS.split("|") for path in (ROOT / room).rglob("*.py"))
GROUPS = "|".join(config.groups())
COMMAND = re.compile(rf"(?:\bspknet ({'|'.join(MODULES)})|python -m ((?:{ROOMS})[\w.]*))\b(?! and| or)(.*)")


def said(path: Path) -> str:
    """The comments and docstrings of a file."""
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    return "\n".join(
        [t.string for t in tokens if t.type == tokenize.COMMENT] + [ast.get_docstring(n) or "" for n in nodes]
    )


def text_of(path: Path) -> str:
    return path.read_text() if path.suffix == ".md" else said(path)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or what lies in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_names_that_a_comment_or_page_mentions_exist(path):
    text = text_of(path)
    if path.name == "extending.md":  # names the files that a reader adds
        text = re.sub(r"spknet[./]\w+[./](xvector|logistic)\b(\.\w+)?", "", text)
    files = set(re.findall(rf"(?<![\w./-])((?:{ROOMS}|docs|slurm)/[\w./-]*\w\.(?:py|md|sh|sbatch|ya?ml))\b", text))
    assert {name for name in files if not (ROOT / name).exists()} == set()
    names = set(re.findall(rf"(?<![\w./-])((?:{ROOMS})(?:\.[A-Za-z_]\w*)+)(?![\w/-])", text))
    assert {name for name in names if not resolves(name) and not (path.parent / name).exists()} == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_options_of_commands_that_a_comment_shows_exist(path):
    """Those of the pages: test_docs_commands."""
    for line in re.sub(r"\s*\\\n\s*", " ", said(path)).splitlines():
        for command, module, rest in COMMAND.findall(line):
            rest = re.split(r" \| |#|`| -- ", re.sub(r"\"[^\"]*\"|'[^']*'", "", rest))[0]
            words = set(re.findall(r"(?<![\w-])(--[a-z](?:[\w.-]*\w)?)", rest))
            assert not words or words <= known_options(command or module, rest.split()) | TRAIN, line


@pytest.mark.parametrize("path", [p for p in SOURCES if "tests" not in p.parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_options_that_a_message_or_comment_names_exist(path):
    strings = [
        n.value
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    text = "\n".join([said(path), *strings])
    named = set(re.findall(rf"(?<![\w./])((?:--)?(?:{GROUPS})\.[a-z_]+)(?![\w./(])", text))
    named = {
        n.removeprefix("--")
        for n in named
        if not n.endswith((".py", ".npy", ".pt", ".txt", ".log", ".json", ".yaml", ".err", "loss.weight"))
    }
    assert named - set(config.option_names()) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_headings_that_a_page_links_to_exist(page):
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text()):
        lines = (page.parent / target if target else page).read_text().splitlines()
        titles = [
            re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
            for line in lines
            if line.startswith("#")
        ]
        assert heading in titles, f"{page.name}: {target}#{heading}"
