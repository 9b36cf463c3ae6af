"""What the commands of evaluation have in common on the command line: defaults in the help, numbers with a range, places to
write to.

    parser = Parser("spknet trials", __doc__); parser.add("--targets", type=at_least(0), default=50, help="...")
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from shards import commands
from spknet.errors import UserError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """The defaults, where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


class Parser(commands.Parser):
    """argparse, with the first paragraph of a docstring as description and the defaults in the help."""

    def __init__(self, prog: str, doc: str):
        super().__init__(prog=prog, description=doc.split("\n\n")[0], formatter_class=_Help)
        self.add = self.add_argument


def at_least(low: float, above: bool = False):
    """The type of an option: a whole number (of an int `low`) or any from `low` on; above: larger than it."""

    def number(text: str) -> float:
        value = type(low)(text)
        if not (value > low if above else value >= low) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text}: expected a number {'above' if above else 'from'} {low}")
        return value

    number.__name__ = "whole number" if isinstance(low, int) else "number"  # what argparse calls it in errors
    return number


def check_writable(folder: str | Path) -> None:
    """Makes a folder and tries to write there, before hours of work whose result it must take. Raises UserError or OSError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_file(path: str | Path) -> None:
    """The same of a file to be written."""
    if Path(path).is_dir():
        raise UserError(f"{path}: a folder, where a file is to be written; give a file name")
    check_writable(Path(path).resolve().parent)
