"""voxceleb_trainer's command lines and files, for those who come from there.

    python -m spknet.train --model ResNetSE34L --trainfunc angleproto --batch_size 200 --nPerSpeaker 2 --save_path exp1
        --train_list train.txt --train_path vox2/wav --test_list veri_test.txt --test_path vox1/wav

Two versions are known, each with its own defaults: that of mid 2020 ("seed": 16-bit input scale, Hann window, zero padding,
length-normalised embeddings) and the newer one, told by flags that only it has, by its YAML files, or by the window in the
checkpoint. `--legacy.version seed|newer` says it. Options of spknet (`--eval.scores FILE`) may stand beside the flags and
beat them. Files are read by spknet.checkpoints.voxceleb_trainer.

    config, instead = options(argv)  # of either kind
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spknet import config as configuration
from spknet.checkpoints.voxceleb_trainer import is_legacy_checkpoint, split, window_of
from spknet.config import Config, ConfigError, flatten
from spknet.messages import say
from spknet.options import parse as parse_options
from spknet.train.voxceleb_trainer_flags import KNOWN, ONLY_NEWER, defaults, parse, read_yaml, value_of

HOP, EXTRA = 0.010, 0.015  # seconds: n frames of the reference are 160 n + 240 samples at 16 kHz
NORMALIZED = ("ge2e", "angleproto")  # losses whose embeddings the version of mid 2020 length-normalises first


@dataclass(frozen=True)
class Translation:
    """A command line of voxceleb_trainer in our terms. `notes`: lines for the user, the equivalent command first."""

    config: Config
    notes: list[str]
    eval_only: bool

    def evaluate(self) -> int:
        """Does what `--eval` asks for: embeds, scores, prints EER and minDCF, never asks. Returns the exit status."""
        from spknet.checkpoints.network import load_network
        from spknet.evaluate import evaluation as evaluate
        from spknet.parallel.ranks import join

        config, out = self.config, Path(self.config.run_dir) / "eval" / "initial"
        with join(config.train.device, config.train.threads) as me:
            path = config.train.initial_model or config.run_dir
            model, _, _ = load_network(path, me.device, model=config.model)
            found = evaluate.evaluate_network(model, config, out_dir=out)
            if me.first:
                print(f"EER {found['eer']:.4f} %, minDCF(0.05) {found['min_dcf_p05']:.5f}; report: {out}")
        return 0


def is_legacy(argv: list[str]) -> bool:
    """Whether a command line is voxceleb_trainer's: all of its words are, and it names a model and what to do with it.

    A model and a loss, or --eval, may stand in its YAML file. Options of spknet (`--group.name`) may stand between. Any other
    command line is ours; `spknet voxceleb-trainer` takes one for theirs whatever it says.
    """
    names = [word[2:].split("=", 1)[0] for word in argv if word.startswith("--")]
    if not all(name in KNOWN or "." in name or name in ("config", "run_dir") for name in names):
        return False
    path = value_of(argv, "config")
    values = read_yaml(path) if path is not None and Path(path).is_file() else {}
    # Our own files have groups of options where theirs have values: model, eval, augment.
    given = {*names, *(name for name, value in values.items() if isinstance(value, (str, int, float)))}
    return "model" in given and bool(given & {"trainfunc", "eval"})


def translate(argv: list[str]) -> Translation:
    """Our Config of a command line of voxceleb_trainer, and what there is to say about it. Raises ConfigError."""
    argv, own = _separate(argv)
    version = own.pop("legacy.version", None)
    given, notes = parse(argv)
    if version is None:
        version = _version(argv, given)
    elif version not in ("seed", "newer"):
        raise ConfigError(f"--legacy.version {version}: expected seed or newer")
    flags = argparse.Namespace(**{**defaults(version), **given})
    values = _values(flags, version, notes)
    config = _with_options(values, own)
    _check(config, flags)
    lines = [f"voxceleb_trainer's flags, version {version} (--legacy.version); the same in spknet's terms:"]
    return Translation(config, [*lines, "  " + command(config, flags.eval), *notes], flags.eval)


def _separate(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Their words, and our `--group.key value` among them."""
    theirs, own, words = [], {}, iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and ("." in name or name == "run_dir"):
            own[name] = value if equals else next(words, None)
            if own[name] is None:
                raise ConfigError(f"{word}: a value is missing")
        else:
            theirs.append(word)
    return theirs, own


def _version(argv: list[str], given: dict[str, Any]) -> str:
    words = {word[2:].split("=", 1)[0] for word in argv if word.startswith("--")}
    if words & ONLY_NEWER or given.get("model") in ("ResNetSE34V2", "RawNet3"):
        return "newer"
    path = Path(given.get("initial_model") or "none given")
    if given.get("model") == "ResNetSE34L" and path.is_file():
        from spknet.checkpoints.file import read

        state = read(path)
        if is_legacy_checkpoint(state) and window_of(split(state)[0]) == "hamming":
            return "newer"
    return "seed"


def _values(flags: argparse.Namespace, version: str, notes: list[str]) -> dict[str, Any]:
    """Nested options of a Config."""
    seed = version == "seed"
    values: dict[str, Any] = {
        "run_dir": flags.save_path,
        "data": {
            "train_list": flags.train_list or None,
            "train_root": flags.train_path or None,
            "speakers_per_batch": flags.batch_size,
            "utterances_per_speaker": flags.nPerSpeaker,
            "crop_seconds": _seconds(flags.max_frames),
            "max_utterances_per_speaker": flags.max_seg_per_spk,
            "workers": flags.nDataLoaderThread,
        },
        "model": _model(flags, seed),
        "loss": {
            "name": flags.trainfunc,
            "margin": flags.margin,
            "scale": flags.scale,
            "normalize_embeddings": seed and flags.trainfunc in NORMALIZED,
            "hard_rank": flags.hard_rank,
            "hard_prob": flags.hard_prob,
            "n_classes": flags.nSpeakers if "softmax" in flags.trainfunc else None,
        },
        "optim": _optim(flags),
        "train": {"epochs": flags.max_epoch, "seed": flags.seed, **_start(flags, seed, notes)},
        "eval": _eval(flags, seed),
    }
    if flags.mixedprec:
        values["train"]["precision"] = "fp16"
    if flags.augment:
        shards = {"noise_shards": flags.musan_path, "rir_shards": flags.rir_path}
        values["augment"] = {"preset": "voxceleb_trainer", **shards}
    notes += _remarks(flags)
    return values


def _model(flags: argparse.Namespace, seed: bool) -> dict[str, Any]:
    return {
        "name": flags.model,
        "encoder": flags.encoder_type,
        "embedding_size": flags.nOut,
        "n_mels": 40 if flags.model in ("VGGVox", "VGGVox40") else flags.n_mels,
        "log_input": flags.log_input,
        "window": "hann" if seed else "auto",
        "input_scale": "int16" if seed else "unit",
        "sinc_stride": flags.sinc_stride,
    }


def _optim(flags: argparse.Namespace) -> dict[str, Any]:
    if flags.optimizer not in ("adam", "sgd"):
        raise ConfigError(f"--optimizer {flags.optimizer}: voxceleb_trainer has adam and sgd")
    if flags.scheduler != "steplr":
        raise ConfigError(f"--scheduler {flags.scheduler}: expected steplr; see --optim.schedule for others")
    decay = flags.weight_decay
    if decay is None:
        decay = 5e-5 if flags.optimizer == "sgd" else 0.0
    return {
        "name": flags.optimizer,
        "lr": flags.lr,
        "weight_decay": decay,
        "schedule": "step",
        "lr_decay": flags.lr_decay,
        "lr_decay_epochs": flags.test_interval,
    }


def _eval(flags: argparse.Namespace, seed: bool) -> dict[str, Any]:
    whole = flags.eval_frames == 0
    return {
        "trials": flags.test_list or None,
        "root": flags.test_path or None,
        "every_epochs": float(flags.test_interval),
        "crop_seconds": 0.0 if whole else _seconds(flags.eval_frames),
        "crops": 1 if whole else 10,
        "score": "mean_distance",
        "padding": "zeros" if seed else "repeat",
        "metrics": "voxceleb_trainer",
    }


def _seconds(frames: int) -> float:
    return round(frames * HOP + EXTRA, 3)


def _start(flags: argparse.Namespace, seed: bool, notes: list[str]) -> dict[str, Any]:
    """Which weights training starts from: a checkpoint in save_path beats initial_model in 2020, and loses to it later."""
    folder = Path(flags.save_path)
    theirs = sorted((folder / "model").glob("model0*.model"))
    ours = any((folder / "checkpoints").glob("step-*.pt"))
    first = flags.initial_model or None
    if theirs and not ours and (seed or not first):
        notes.append(
            f"note: training goes on from {theirs[-1]}, voxceleb_trainer's last checkpoint in save_path, with its next epoch"
        )
        return {"initial_model": str(theirs[-1])}
    if first and not seed and ours and not flags.eval:
        notes.append(
            "note: --initial_model beats the checkpoints in save_path, as there; --train.resume auto continues"
        )
        return {"initial_model": first, "resume": "never"}
    return {"initial_model": first}


def _remarks(flags: argparse.Namespace) -> list[str]:
    notes = []
    if flags.distributed:
        n, ranks = flags.batch_size, int(os.environ.get("WORLD_SIZE", 1))
        same = f"{n * ranks} on these {ranks} ranks" if ranks > 1 else f"{n} times the number of GPUs"
        notes.append(
            f"note: --batch_size {n} is the number of speakers of the global batch; with --distributed it was that of each"
            f" GPU: the same would be --data.speakers_per_batch {same}. Ranks are started by torchrun"
        )
    for name in ("gpu_id", "port"):
        if getattr(flags, name) is not None:
            notes.append(f"note: --{name} is ignored: torchrun and CUDA_VISIBLE_DEVICES choose")
    if (flags.dcf_p_target, flags.dcf_c_miss, flags.dcf_c_fa) != (0.05, 1.0, 1.0):
        notes.append(
            "note: minDCF is reported for a target probability of 0.01 and 0.05 and costs of 1, not for --dcf_*"
        )
    if flags.trainfunc == "ge2e":
        notes.append("note: cosines of ge2e are not floored at 1e-6; --loss.cosine_floor 1e-6 does as there")
    return notes


def _with_options(values: dict[str, Any], own: dict[str, str]) -> Config:
    """The Config of nested values, with our own options on top."""
    config = configuration.from_dict(values)
    if not own:
        return config
    words = [word for pair in own.items() for word in (f"--{pair[0]}", pair[1])]
    said = parse_options(words)
    for name in own:
        config = _replaced(config, name.split("."), said)
    return config


def _replaced(config: Any, path: list[str], source: Any) -> Any:
    value = getattr(source, path[0])
    if len(path) > 1:
        value = _replaced(getattr(config, path[0]), path[1:], value)
    return replace(config, **{path[0]: value})


def _check(config: Config, flags: argparse.Namespace) -> None:
    """What voxceleb_trainer would stumble over later, or we cannot do as it did."""
    if not config.model.name:
        raise ConfigError("--model is missing: ResNetSE34, ResNetSE34L, ResNetSE34V2, VGGVox or RawNet3")
    if not flags.trainfunc and not flags.eval:
        raise ConfigError("--trainfunc is missing: the name of a loss, such as angleproto")
    if flags.eval and not config.eval.trials:
        raise ConfigError("--eval wants --test_list FILE: lines `label path path`, paths starting from --test_path")
    for name in ("noise_shards", "rir_shards"):
        folder = getattr(config.augment, name)
        if flags.augment and not flags.eval and not (Path(folder or "") / "index" / "index.json").is_file():
            raise ConfigError(
                f"--augment wants noise and impulse responses as packed shards; {folder} holds no index/index.json. Pack"
                f" them once (spknet musan --help) and give --augment.{name} FOLDER"
            )


def command(config: Config, eval_only: bool) -> str:
    """The command that does the same, with the options that are not spknet's defaults."""
    own, default = flatten(configuration.to_dict(config)), flatten(configuration.to_dict(Config()))
    changed = {key: value for key, value in own.items() if value != default[key]}
    words = ["python", "-m", "spknet.train"]
    if eval_only:
        words = ["python", "-m", "spknet.evaluate", "--checkpoint", config.train.initial_model or config.run_dir]
        words += ["--out", str(Path(config.run_dir) / "eval" / "initial")]
        asked = (key for key in changed if key.startswith("eval.") and key not in ("eval.scores", "eval.every_epochs"))
        changed = {key.removeprefix("eval."): changed[key] for key in asked}
    for key, value in changed.items():
        words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)


def options(argv: list[str], theirs: bool = False) -> tuple[Config, Callable[[], int] | None]:
    """The run that a command line, ours or voxceleb_trainer's, describes; and for its --eval, what to do instead of training.

    theirs: it is voxceleb_trainer's, whatever it says.

    Prints what a translation has to say. Raises ConfigError for words that are wrong and where there is no run folder.
    """
    instead = None
    if theirs or is_legacy(argv):
        translation = translate(argv)
        say("\n".join(translation.notes))
        config = translation.config
        if translation.eval_only:
            instead = translation.evaluate
    else:
        config = parse_options(argv)
    if config.run_dir is None:
        raise ConfigError("--run_dir FOLDER is missing: where checkpoints, metrics and evaluations of this run go")
    return config, instead
