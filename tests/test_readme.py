"""What README and docs name exists: commands, files, recipes, options."""

import importlib.util
import re
from pathlib import Path

import pytest

from spknet import config
from spknet.cli import COMMANDS
from spknet.options import RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "shards/FORMAT.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_modules_files_recipes_and_options_that_a_page_names_exist(page):
    text = page.read_text()
    for module in set(re.findall(r"python -m ((?:shards|spknet|tools|launch)\.\w+)", text)):
        assert importlib.util.find_spec(module), f"{page.name}: python -m {module}"
    for link in set(re.findall(r"\]\((?!http)([^)#]+)\)", text)):
        assert (page.parent / link).exists(), f"{page.name}: link to {link}"
    known = set(config.option_names())
    groups = "|".join(k.split(".")[0] for k in known if "." in k)
    for option in set(re.findall(rf"--((?:{groups})\.[a-z_]\w*)", text)):
        assert option in known, f"{page.name}: --{option}"
    for recipe in set(re.findall(r"--config ([a-z]\w+)(?![\w./])", text)):
        assert (RECIPES / f"{recipe}.yaml").exists(), f"{page.name}: --config {recipe}"


def lines_of_text(page: Path) -> list[tuple[int, str]]:
    """(number, line) of a page without its code (fenced, or indented by four) and tables."""
    found, fenced = [], False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("|", "    ")):
            found.append((number, line))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_lines_of_a_page_have_at_most_120_characters(page):
    assert [(number, len(line)) for number, line in lines_of_text(page) if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_page_puts_data_into_the_folders_of_the_packages(page):
    """What a page names below a package is there, or is source that the page adds to it."""
    named = set(re.findall(r"(?<![\w./-])((?:shards|spknet|launch|tools)/\w[\w./-]*)", page.read_text()))
    assert {n for n in named if not (ROOT / n.rstrip(".")).exists() and not n.endswith((".py", ".yaml"))} == set()


@pytest.mark.parametrize("group", COMMANDS)
def test_the_readme_names_every_command(group):
    row = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {group} | `spknet ")
    )
    assert re.findall(r"`(?:spknet )?([\w-]+)`", row) == list(COMMANDS[group])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_that_a_page_names_exist(page):
    known = {name for group in COMMANDS.values() for name in group}
    assert set(re.findall(r"\bspknet ([a-z][\w-]*)(?= --|`| [A-Z\[]| all\b| runs/)", page.read_text())) <= known


def test_the_design_page_names_every_file_of_a_run():
    text = (ROOT / "docs/design.md").read_text()
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "state.json",
        "record.json",
        "tensorboard/",
        "lock",
        "scores.txt",
        "report.json",
    ):
        assert name in text
