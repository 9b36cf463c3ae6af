"""What README and docs name exists: commands, files, recipes, options."""

import importlib.util
import re
from pathlib import Path

import pytest

from spknet import config
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
