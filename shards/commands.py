"""How the commands read their words: one argparse for all of them, which names itself as it was started and guesses what was meant.

parser = Parser(command("pack"), description=__doc__); parser.add_argument("--out"); chosen = parser.parse_args(argv)
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable

from shards.errors import USAGE

MODULES = {"lists": "make_lists", "pack": "pack", "check": "verify", "stats": "info", "stage": "stage"}


def command(name: str) -> str:
    """How to start a command of shards: `spknet pack`, or `python -m shards.pack` where they are used without spknet."""
    started = getattr(sys.modules["__main__"], "__spec__", None)
    alone = started is not None and started.name.startswith("shards.")
    return f"python -m shards.{MODULES[name]}" if alone else f"spknet {name}"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`did you mean X? `, or nothing where no name is near."""
    bare = {name.lstrip("-"): name for name in names}  # dashes would make any two options alike
    near = difflib.get_close_matches(word.lstrip("-"), bare, n=1)
    return f"did you mean {bare[near[0]]}? " if near else ""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with the nearest option or word, in place of the whole usage.

    Options are written in full, as those of `spknet train` are: a word too short is a mistake that is told, not a guess.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)
        self.words: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        unknown = self._unknown_option()
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if unknown:  # before what it makes argparse complain of: a missing option, a word too many
            message = f"unknown option {unknown}; {did_you_mean(unknown, self._option_string_actions)}"
        elif choice:
            message = f"{message}; {did_you_mean(choice[1], re.findall(r'[^, ]+', choice[2].replace(chr(39), '')))}"
        message = message.rstrip("; ")
        self.exit(
            USAGE, f"error: {message}{'' if message[-1] == '?' else ';'} `{self.prog} --help` tells its options\n"
        )

    def _unknown_option(self) -> str:
        """The first word that looks like an option and is none."""
        for word in self.words:
            action = self._option_string_actions.get(word)
            if word == "--" or (action and action.nargs == argparse.REMAINDER):
                break
            name = word.split("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                return name
        return ""
