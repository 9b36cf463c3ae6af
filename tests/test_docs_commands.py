"""Every command line in README and docs: its program exists, and each of its options too."""

import argparse
import contextlib
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

from spknet import config
from spknet.cli import COMMANDS
from spknet.train.voxceleb_trainer_flags import KNOWN
from tests.test_readme import PAGES

MODULES = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
TRAIN = {f"--{name}" for name in [*config.option_names(), "config", "print_config", "help"]}
THEIRS = {f"--{name}" for name in [*KNOWN, "config", "legacy.version"]}
OURS = r"(shards|spknet|tools|launch)\b"
ENDS = {"|", ";", "&&", "||", ">", "2>", "<", "&"}


def command_lines(text: str) -> list[list[str]]:
    """The words of each line of code: fenced, indented by four, or in backquotes."""
    code, fenced = re.findall(r"(?<!`)`([^`]+)`(?!`)", text), False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            code.append("")
        else:
            code.append(line if fenced or line.startswith("    ") else "")
    words = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(code)).splitlines():
        with contextlib.suppress(ValueError):  # Python, or text with an apostrophe
            words.append(shlex.split(line.replace("$(", " ").replace(";", " ; "), comments=True))
    return words


def invocations(words: list[str]) -> list[tuple[str, list[str]]]:
    """(module or command's name, its words) of each of our programs on a line."""
    found = []
    for i, word in enumerate(words):
        rest = words[i + 1 :]
        program = rest[0] if rest and (word == "spknet" or (word == "-m" and re.match(OURS, rest[0]))) else None
        if word.startswith("slurm/") and word.endswith(".sbatch"):
            program, rest = Path(word).stem, [word, *rest]
        if program and re.fullmatch(r"[a-z][\w.-]+", program):
            end = next((k for k, other in enumerate(rest) if other in ENDS), len(rest))
            found.append((program, rest[1:end]))
    return found


@functools.cache
def options_of(module: str, *before: str) -> frozenset[str]:
    """The options of a command's parser."""
    options = set()

    def leave(parser, *_):
        options.update(parser._option_string_actions)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", leave)
        importlib.import_module(module).main([*before, "--help"])
    return frozenset(options)


def known_options(program: str, words: list[str]) -> frozenset[str]:
    module = MODULES.get(program, program)
    module = module if importlib.util.find_spec(module).submodule_search_locations is None else f"{module}.__main__"
    if module in ("spknet.train.__main__", "spknet.train.voxceleb_trainer_command"):
        return frozenset(TRAIN | THEIRS)
    if module == "tools.bench.__main__":
        return options_of(module, *(words[:1] or ["step"])) | {"--gpu"}
    if module == "spknet.use.info":
        return options_of(module, "x") | options_of("spknet.models.describe") | TRAIN
    if module == "spknet.use.embed":
        return options_of(module) | options_of(module, "--list")
    if module in ("launch.node", "spknet.parallel.nodelist"):  # they read their words themselves
        return frozenset(words)
    if module == "launch.resubmit":
        return options_of("launch.submit")
    return options_of(module) | (TRAIN if module in ("tools.listen", "tools.noisy") else set())


def wrong_options(text: str) -> list[str]:
    """What the command lines of a text name and is not there."""
    wrong = []
    for program, words in [pair for line in command_lines(text) for pair in invocations(line)]:
        if program not in MODULES and ("." not in program or importlib.util.find_spec(program) is None):
            wrong.append(f"no command {program}")
            continue
        at = words.index("--") if "--" in words else len(words)
        own, run = (
            {w.split("=")[0] for w in part if w.startswith("--") and " " not in w}
            for part in (words[:at], words[at + 1 :])
        )
        wrong += [f"{program}: {option}" for option in own - known_options(program, words) | run - TRAIN]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_option_of_every_command_on_a_page_exists(page):
    assert wrong_options(page.read_text()) == []


def test_what_is_not_there_is_found():
    text = """
`spknet pakc` or `spknet stats x --jsn`

    spknet pack --lst a \\
      --out b | head --lines 3
    torchrun --nproc_per_node 2 -m spknet.train --optim.lrr 1

```
spknet submit --node 2 -- --train.sed 1; python -m tools.synth --out x --train-speaker 3  # --no
run=$(sbatch slurm/train.sbatch --config x --data.wrkers 2)
spknet bench step --model all
```
"""
    assert sorted(wrong_options(text)) == sorted(
        ["no command pakc", "stats: --jsn", "pack: --lst", "spknet.train: --optim.lrr", "submit: --node"]
        + ["submit: --train.sed", "tools.synth: --train-speaker", "train: --data.wrkers", "bench: --model"]
    )
