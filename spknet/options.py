"""Options from recipes and the command line: the command line beats recipes, later recipes beat earlier ones.

--config fast_resnet34 --config mine.yaml      recipes: names of spknet/recipes or YAML files, merged in order
--optim.lr 0.1  --optim.lr=0.1                 one option
--eval.trials a.txt b.txt  or  '[a.txt, b.txt]'  an option that takes several values
--train.compile                                true, like `--train.compile true`; `null` is no value

config = parse(["--config", "small_corpus", "--run_dir", "runs/a"])
"""

from __future__ import annotations

import re
import sys
import textwrap
import unicodedata
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from shards.commands import did_you_mean
from spknet.config import Config, ConfigError, flatten, from_dict, groups, nearest, to_dict

RECIPES = Path(__file__).parent / "recipes"
WIDTH = 118  # characters of a line of help
LARGEST = 1e15  # of any number: beyond are slips of the keyboard that no integer of torch or numpy takes
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def parse(argv: list[str]) -> Config:
    """Config from command-line words. Raises ConfigError; `--help` and `--print_config` print and leave."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        sys.exit(0)
    recipes, values, show = _read_words(argv)
    merged: dict[str, Any] = {}
    for name in recipes:
        _merge(merged, read_recipe(name))
    for key, value in values.items():
        group, dot, name = key.rpartition(".")
        _merge(merged, {group: {name: value}} if dot else {key: value})
    config = checked(merged)
    if show:
        print(commented(config), end="")
        sys.exit(0)
    return config


def _read_words(argv: list[str]) -> tuple[list[str], dict[str, Any], bool]:
    """Recipes, {option: value} and whether --print_config stands there."""
    kinds, recipes, values, show = types(), [], {}, False
    words = list(argv)
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--([A-Za-z_][\w.]*)(?:=(.*))?", word, re.S)
        if not match:
            hint = (
                f"did you mean --config {word}?" if word in recipe_names() else "options are written --group.name VALUE"
            )
            raise ConfigError(f"{word!r} belongs to no option; {hint}")
        name, given = match[1], [] if match[2] is None else [match[2]]
        several = name == "config" or _takes_several(kinds.get(name))
        while words and not words[0].startswith("--") and match[2] is None and (several or not given):
            given.append(words.pop(0))
        if name == "print_config":
            show = True
        elif name == "config":
            recipes += given or _missing(name)
        elif name not in kinds:
            raise ConfigError(f"unknown option --{name}{nearest(name)}")
        else:
            values[name] = _value(name, given, kinds[name])
    return recipes, values, show


def _missing(name: str):
    raise ConfigError(f"--{name}: a value is missing")


def _takes_several(kind: Any) -> bool:
    return "list[" in str(kind)


def _value(name: str, given: list[str], kind: Any) -> Any:
    """A word (or several) as a plain value; pydantic makes numbers of words and checks them."""
    if not given:
        return True if kind is bool else _missing(name)
    if len(given) > 1:
        return given
    word = given[0]
    takes_text = str in (kind, *get_args(kind)) and int not in get_args(kind)
    if word in ("null", "None") and type(None) in get_args(kind):
        return None
    if takes_text and not (_takes_several(kind) and word.startswith("[")):
        return word
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def types() -> dict[str, Any]:
    """The type of every option, by `group.key`."""
    inside, found = groups(), {}
    for name, kind in get_type_hints(Config).items():
        found |= {f"{name}.{n}": k for n, k in get_type_hints(kind).items()} if name in inside else {name: kind}
    return found


def checked(values: dict[str, Any]) -> Config:
    """The Config of nested options. Raises ConfigError also where a text has control characters, or true stands for a number."""
    config, kinds = from_dict(values), types()
    for name, value in flatten(values).items():
        if isinstance(value, bool) and bool not in _parts(kinds[name]):
            raise ConfigError(f"{name}: {str(value).lower()} given, expected {_kind(kinds[name])}")
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            raise ConfigError(f"{name}: {value:g} given, expected at most {LARGEST:g}")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
                raise ConfigError(f"{name}: {ascii(text)} has a control character; correct it")
    return config


class Loader(yaml.SafeLoader):
    """YAML in which an option or a group stands once; of two, PyYAML takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path, or the name of an installed recipe. Raises ConfigError naming those there are."""
    path = Path(name)
    if path.is_file():
        return path
    installed = RECIPES / (name.removesuffix(".yaml") + ".yaml")
    if installed.is_file():
        return installed
    if path.is_dir():
        raise ConfigError(f"--config {name}: a folder, expected a YAML file or the name of a recipe")
    names = recipe_names()
    hint = did_you_mean(name, names)
    raise ConfigError(f"--config {name}: no such file and no such recipe; {hint}recipes: {', '.join(names)}")


def recipe_names() -> list[str]:
    """The installed recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The nested options of a recipe. Raises ConfigError where the file holds something else."""
    path = recipe_path(name)
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot read this YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of groups to options, found {type(values).__name__}")
    # An empty group (`eval:`) is a group without options.
    values = {name: {} if value is None and name in groups() else value for name, value in values.items()}
    try:
        checked(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return values


def _about(info: Any) -> str:
    """Meaning, range and default of an option (pydantic's FieldInfo)."""
    bounds = [f"{BOUNDS[n]} {getattr(b, n):g}" for b in info.metadata for n in BOUNDS if hasattr(b, n)]
    default = info.get_default(call_default_factory=True)
    said = "none" if default in (None, []) else str(default).lower() if isinstance(default, bool) else str(default)
    return "; ".join([info.description, *([", ".join(bounds)] if bounds else []), f"default {said}"])


def _kind(kind: Any) -> str:
    """How a type reads in the help."""
    names = {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false"}
    parts = [names.get(part, part) for part in _parts(kind) if part is not type(None)]
    return "|".join(dict.fromkeys(parts)) + (" ..." if _takes_several(kind) else "")


def _parts(kind: Any) -> list[Any]:
    """The plain types and the words that a type is made of: those of `list[int] | Literal["all"]` are int and "all"."""
    return [part for inner in get_args(kind) for part in _parts(inner)] or [kind]


def help_text() -> str:
    """Every option with its meaning, range and default, by group; the recipes."""
    lines = [
        "usage: spknet train [--config RECIPE] [--group.option VALUE] ...    (or python -m spknet.train, or under torchrun)",
        "",
        "  --config RECIPE ...  a recipe's name or a YAML file; later ones beat earlier ones, options beat recipes",
        "  --print_config       show every option as it would be, as YAML, and leave",
        f"  --run_dir TEXT       {_about(Config.__pydantic_fields__['run_dir'])}",
    ]
    lines += ["", *textwrap.wrap("recipes: " + ", ".join(recipe_names()), WIDTH)]
    kinds = types()
    for group, cls in groups().items():
        lines += ["", f"{group}: {cls.__doc__.splitlines()[0]}"]
        for name, info in cls.__pydantic_fields__.items():
            lines.append(f"  --{group}.{name} {_kind(kinds[f'{group}.{name}'])}")
            lines += textwrap.wrap(_about(info), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def commented(config: Config) -> str:
    """A Config as YAML, each option with its meaning as a comment: a recipe to start from."""
    values, lines = to_dict(config), []
    for name, cls in {"": None, **groups()}.items():
        lines += [f"# {cls.__doc__}", f"{name}:"] if cls else []
        for option, info in (cls or Config).__pydantic_fields__.items():
            if cls is None and option in groups():
                continue
            value = (values[name] if cls else values)[option]
            written = yaml.safe_dump({option: value}, default_flow_style=True, width=10**6).strip()[1:-1]
            lines.append(f"{'  ' if cls else ''}{written}  # {_about(info)}")
    return "\n".join(lines) + "\n"
