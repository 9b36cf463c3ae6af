"""The flags of voxceleb_trainer's two versions, their defaults, and how its command lines and YAML files are read.

A YAML value beats the command line, as there; an unknown key of a YAML file is ignored with a word, an unknown flag is an
error. Flags may be shortened as argparse allows (`--encoder` for `--encoder_type`).

    given, notes = parse(["--model", "ResNetSE34L", "--lr", "0.001"])
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from shards.commands import did_you_mean
from spknet.config import ConfigError


def truth(word: str) -> bool:
    """True, False, yes, no, 1, 0. (There, argparse's bool takes any word, False too, for true.)"""
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "none": False, "": False}
    if word.lower() not in value:
        raise argparse.ArgumentTypeError(f"{word!r}: expected True or False")
    return value[word.lower()]


# flag: (type, default of mid 2020, default of the newer version)
FLAGS: dict[str, tuple[Any, Any, Any]] = {
    "max_frames": (int, 200, 200),
    "eval_frames": (int, 300, 300),
    "batch_size": (int, 200, 200),
    "max_seg_per_spk": (int, 100, 500),
    "nDataLoaderThread": (int, 5, 5),
    "test_interval": (int, 10, 10),
    "max_epoch": (int, 500, 500),
    "trainfunc": (str, "", ""),
    "optimizer": (str, "adam", "adam"),
    "lr": (float, 0.001, 0.001),
    "lr_decay": (float, 0.95, 0.95),
    "hard_prob": (float, 0.5, 0.5),
    "hard_rank": (int, 10, 10),
    "margin": (float, 1.0, 0.1),
    "scale": (float, 15.0, 30.0),
    "nPerSpeaker": (int, 1, 1),
    "initial_model": (str, "", ""),
    "save_path": (str, "data/exp1", "exps/exp1"),
    "train_list": (str, "", "data/train_list.txt"),
    "test_list": (str, "", "data/veri_test.txt"),
    "train_path": (str, "voxceleb2", "data/voxceleb2/dev/wav"),
    "test_path": (str, "voxceleb1", "data/voxceleb1/test/wav"),
    "model": (str, "", ""),
    "nOut": (int, 512, 512),
    "nSpeakers": (int, 5994, 5994),
}
# flags of the newer version: (type, default)
NEWER: dict[str, tuple[Any, Any]] = {
    "augment": (truth, False),
    "musan_path": (str, "data/musan_split"),
    "rir_path": (str, "data/RIRS_NOISES/simulated_rirs"),
    "n_mels": (int, 40),
    "log_input": (truth, False),
    "weight_decay": (float, 0.0),
    "scheduler": (str, "steplr"),
    "dcf_p_target": (float, 0.05),
    "dcf_c_miss": (float, 1.0),
    "dcf_c_fa": (float, 1.0),
    "seed": (int, 10),
    "sinc_stride": (int, 10),
    "gpu_id": (str, None),
    "port": (str, None),
}
SWITCHES = ("eval", "distributed", "mixedprec")
OTHER_NAMES = {"encoder": "encoder_type", "nClasses": "nSpeakers"}
ONLY_NEWER = {*NEWER, "nClasses", "config", "distributed", "mixedprec"}
KNOWN = {*FLAGS, *NEWER, *SWITCHES, *OTHER_NAMES, "encoder_type"}


def parse(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What the command line and its YAML file say (the file beats the command line, as there), and notes."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ConfigError(f"voxceleb_trainer's flags: {message}{_nearest(message)}")

    parser = Parser(prog="python -m spknet.train", argument_default=argparse.SUPPRESS, add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--encoder_type", "--encoder")
    parser.add_argument("--nSpeakers", "--nClasses", type=int)
    for name, (kind, *_) in {**FLAGS, **NEWER}.items():
        if name != "nSpeakers":
            # Values of old, switches in the newest version: both are taken.
            parser.add_argument(f"--{name}", type=kind, **({"nargs": "?", "const": True} if kind is truth else {}))
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    given = vars(parser.parse_args(argv))
    notes, path = [], given.pop("config", None)
    for name, value in read_yaml(path).items() if path else ():
        flag = OTHER_NAMES.get(name, name)
        if flag not in KNOWN:
            notes.append(f"note: {path}: {name} is no option of voxceleb_trainer and is ignored, as there")
        elif value is not None:
            value = _typed(flag, value, path)
            if given.get(flag, value) != value:
                notes.append(f"note: {flag} {value} of {path} beats {given[flag]} of the command line, as there")
            given[flag] = value
    return given, notes


def _typed(flag: str, value: Any, path: str) -> Any:
    kind = {**FLAGS, **NEWER}.get(flag, (truth if flag in SWITCHES else str,))[0]
    try:
        return kind(str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigError(f"{path}: {flag}: {value!r}: expected {kind.__name__} ({error})") from error


def _nearest(message: str) -> str:
    unknown = message.rsplit("--", 1)[-1].split()[0] if "unrecognized" in message else ""
    return f"; {did_you_mean(f'--{unknown}', [f'--{name}' for name in KNOWN])}".rstrip("; ")


def read_yaml(path: str) -> dict[str, Any]:
    """The options of a YAML file; none where it holds something else. ConfigError where it cannot be read."""
    if not Path(path).is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot read this YAML: {' '.join(str(error).split())}") from None
    return values if isinstance(values, dict) else {}


def value_of(argv: list[str], name: str) -> str | None:
    """The word behind `--name`, or behind `--name=`; None where there is none."""
    for word, following in zip(argv, [*argv[1:], None]):
        if word == f"--{name}":
            return following
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def defaults(version: str) -> dict[str, Any]:
    """Every flag's default in a version, seed or newer."""
    seed = version == "seed"
    found = {name: default[1 if seed else 2] for name, default in FLAGS.items()}
    found |= {name: default for name, (_, default) in NEWER.items()} | dict.fromkeys(SWITCHES, False)
    if seed:
        found |= {"log_input": True, "seed": 0, "weight_decay": None}
    return found | {"encoder_type": "SAP"}
