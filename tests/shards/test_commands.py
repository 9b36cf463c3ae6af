"""What a command of shards calls itself, and how its parser answers what it does not know."""

import subprocess
import sys
from pathlib import Path

import pytest

from shards.commands import MODULES, Parser, did_you_mean

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", MODULES)
def test_a_command_calls_itself_as_it_was_started(name):
    module = f"python -m shards.{MODULES[name]}"
    for words, called in ((["-m", "spknet", name], f"spknet {name}"), (module.split()[1:], module)):
        done = subprocess.run([sys.executable, *words, "--nonsense"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr == f"error: unknown option --nonsense; `{called} --help` tells its options\n"


def parser() -> Parser:
    made = Parser("spknet pack")
    made.add_argument("step", choices=("download", "pack"))
    made.add_argument("--out", required=True)
    made.add_argument("--workers", type=int)
    made.add_argument("--words", nargs="...")
    return made


TOLD = {
    "pack --ot a": "unknown option --ot; did you mean --out?",
    "pack --out a --workers=3 --werkers=4": "unknown option --werkers; did you mean --workers?",
    "pack --out a --work 3": "unknown option --work; did you mean --workers?",
    "downlod --out a": "did you mean download?",
    "pack --out a --workers x": "invalid int value: 'x';",
    "pack": "the following arguments are required: --out;",
    # What follows `--words` or `--` is not this parser's.
    "pack --workers x --words --train.sed 1": "invalid int value: 'x';",
    "pack -- --ot": "required: --out;",
}


@pytest.mark.parametrize("words", TOLD)
def test_a_mistake_is_one_line_with_the_nearest_word(words, capsys):
    with pytest.raises(SystemExit) as left:
        parser().parse_args(words.split())
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert TOLD[words] in said and said.endswith("`spknet pack --help` tells its options\n")


def test_only_a_near_word_is_suggested():
    assert did_you_mean("evalute", ["evaluate", "train"]) == "did you mean evaluate? "
    assert did_you_mean("xyz", ["evaluate", "train"]) == ""
