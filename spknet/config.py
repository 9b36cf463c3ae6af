"""Every option of a run, in one place: frozen dataclasses, read from a YAML recipe and the command line by jsonargparse.

The command line beats the YAML file, the YAML file beats the defaults below. `parse(argv)` returns a `Config`;
`python -m spknet.train --print_config` prints all of it. Units stand in the name or in the comment of the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spknet.errors import UserError

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class DataConfig:
    train_shards: str | list[str] | None = None  # packed data set (folder made by shards.pack), or several
    train_list: str | None = None  # loose files instead: lines `speaker path`
    train_root: str | None = None  # folder that the paths in train_list start from
    speakers_per_batch: int = 40  # N: distinct speakers of one global batch, over all ranks
    utterances_per_speaker: int = 2  # M: crops of each speaker in a batch
    crop_seconds: float = 2.0  # length of a training crop
    max_utterances_per_speaker: int = 500  # utterances of a speaker used in one epoch
    epoch: Literal["utterances", "balanced"] = "utterances"  # an epoch covers utterances once, or speakers equally
    workers: int = 2  # loader processes of each rank; 0 loads in the training process
    cache_dir: str | None = None  # node-local folder that tars are copied to before they are read
    cache_gib: float = 0.0  # size limit of cache_dir in GiB; 0 for none
    dev_speakers: int | str = 0  # speakers kept out of training: how many, or a file with one name a line
    unite_speakers: bool = False  # equal names in several data sets are one speaker


@dataclass(frozen=True)
class AugmentConfig:
    noise_shards: str | None = None  # noise, music and babble, packed with the category as the speaker
    rir_shards: str | None = None  # room impulse responses, packed the same way
    probability: float = 0.6  # probability that an utterance gets noise or reverberation, where such shards are given
    speed: list[float] = field(default_factory=list)  # playing speeds drawn from, e.g. [0.9, 1.0, 1.1]; empty for none
    spec_augment: bool = False  # mask 2 frequency bands and 2 time spans of each crop's features


@dataclass(frozen=True)
class ModelConfig:
    name: str = "ResNetSE34L"  # a key of spknet.models.MODELS
    encoder: str = "SAP"  # pooling over time: SAP, TAP, MAX, ASP, ECA
    embedding_size: int = 512  # dimensions
    n_mels: int = 40  # mel bands
    log_input: bool = True  # logarithm of the mel energies
    window: Literal["auto", "hamming", "hann"] = "auto"  # auto: as voxceleb_trainer's network of that name
    input_scale: Literal["unit", "int16"] = "unit"  # what the network is given: [-1, 1] or -32768..32767
    width: float = 1.0  # factor on the number of channels
    sinc_stride: int = 10  # RawNet3: stride of the learned filter bank, samples


@dataclass(frozen=True)
class LossConfig:
    name: str = "angleproto"  # a key of spknet.losses.LOSSES
    margin: float = 0.2  # of amsoftmax, aamsoftmax, triplet, contrastive
    scale: float = 30.0  # of amsoftmax, aamsoftmax
    margin_warmup_steps: int = 0  # steps over which the margin grows linearly from 0
    normalize_embeddings: bool = False  # length-normalise embeddings before ge2e, angleproto, proto
    hard_rank: int = 10  # triplet, contrastive: negatives come from the hard_rank + 1 nearest; below 0: semi-hard
    hard_prob: float = 0.5  # probability of such a hard negative; any other speaker otherwise
    semi_hard_fallback: Literal["any", "skip"] = "any"  # where none is semi-hard: any other, or no triplet
    cosine_floor: float | None = None  # ge2e: floor of cosines (voxceleb_trainer: 1e-6); a flaw, for comparison only
    n_classes: int | None = None  # classes of a classification head; None: as many as the data has labels


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 0.001  # peak learning rate
    weight_decay: float = 0.0
    momentum: float = 0.9  # of sgd
    schedule: Literal["constant", "step", "cosine"] = "step"  # shape over the steps of the run
    lr_decay: float = 0.95  # step: factor
    lr_decay_epochs: int = 10  # step: epochs between two factors
    warmup_steps: int = 0  # steps of linear growth from 0
    final_lr_fraction: float = 0.01  # cosine: lr at the last step, as a fraction of lr
    clip_norm: float = 0.0  # largest norm of the gradient; 0 for no limit


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 100
    max_steps: int | None = None  # stop after this many steps, whatever the epoch
    precision: Literal["float32", "bf16", "fp16", "float64"] = "float32"
    compile: bool = False  # torch.compile the network
    channels_last: bool = False  # memory layout of convolutions
    sync_batchnorm: bool = True  # BatchNorm statistics of the global batch
    deterministic: bool = False  # deterministic kernels on the GPU; the CPU is bit-exact without
    seed: int = 0
    chunk: int = 0  # utterances a rank embeds at a time (GradCache, exact gradient); 0: all at once
    save_every_steps: int = 0  # 0: by time only
    save_every_minutes: float = 15.0
    keep_checkpoints: int = 3  # newest checkpoints kept; the best one is kept besides
    resume: str = "auto"  # auto, never, or the path of a checkpoint
    resume_override: bool = False  # continue although options that shape the result have changed
    initial_model: str | None = None  # weights to start from: a checkpoint of spknet or voxceleb_trainer
    allow_partial: bool = False  # start although initial_model lacks weights or has others
    timeout_seconds: float = 600.0  # no step of some rank, saving included, for so long: name it and stop
    profile: bool = False  # write a torch.profiler trace of steps 10 to 15 to RUN/profile
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0  # CPU threads of a rank; 0: cores divided by the ranks on this machine


@dataclass(frozen=True)
class EvalConfig:
    trials: str | list[str] | None = None  # test lists, reported but never chosen by
    dev_trials: str | None = None  # development list: chooses the best checkpoint
    shards: str | list[str] | None = None  # packed data sets that hold the trials' utterances, keys as in the lists
    root: str | list[str] | None = None  # folders that the paths in the lists start from
    every_epochs: float = 10.0  # epochs between evaluations; the last step is always evaluated; 0: at the end only
    crop_seconds: float = 0.0  # length of an evaluation crop; 0: whole utterances
    crops: int = 1  # crops spread evenly over each utterance
    score: Literal["cosine", "mean_distance"] = "cosine"  # of mean embeddings, or the mean distance of all crop pairs
    normalize_embeddings: Literal["auto", "always", "never"] = "auto"  # length 1 first; auto: not proto's mean_distance
    padding: Literal["repeat", "zeros"] = "repeat"  # of utterances shorter than crop_seconds; zeros: on both sides
    metrics: Literal["default", "voxceleb_trainer"] = "default"  # arithmetic of EER and minDCF
    scores: str | None = None  # a file that scores are also written to
    batch_seconds: float = 60.0  # audio embedded in one forward pass


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 10
    tensorboard: bool = True


@dataclass(frozen=True)
class Config:
    run_dir: str | None = None  # folder of the run; the same folder continues it
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


class ConfigError(UserError):
    """An option that does not exist or does not fit; the message says what would."""


def keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every option as `group.key`, in the order of the dataclasses."""
    names = []
    for f in dataclasses.fields(cls):
        group = f.default_factory if f.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(group):
            names += keys(group, f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names


def nearest(name: str) -> str:
    """`; did you mean X?` for an unknown option, or an empty string where nothing is near."""
    known = keys()
    by_last = {k.rsplit(".", 1)[-1]: k for k in known}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    last = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, n=1, cutoff=0.7)
    found = near or [by_last[k] for k in last]
    return f"; did you mean {found[0]}?" if found else "; `spknet train --print_config` shows all options"


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path, or the name of an installed recipe. Raises ConfigError naming those there are."""
    path = Path(name)
    if path.is_file():
        return path
    installed = RECIPES / (name.removesuffix(".yaml") + ".yaml")
    if installed.is_file():
        return installed
    names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"--config {name}: no such file and no such recipe; {hint}recipes: {', '.join(names)}")


def from_dict(values: dict[str, Any]) -> Config:
    """The Config of a nested dict (a checkpoint's `config`, a YAML file already read); types are checked."""
    return _build(Config, _parser().parse_object(_known(values)))


def to_dict(config: Config) -> dict[str, Any]:
    """The nested plain dict of a Config: strings, numbers, lists and None only."""
    return dataclasses.asdict(config)


def parse(argv: list[str]) -> Config:
    """Config from command-line words. Raises ConfigError; `--help` and `--print_config` print and leave."""
    argv = [_checked_word(word) for word in _resolved_recipes(argv)]
    return _build(Config, _parser().parse_args(argv))


def _parser():
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message, *args, **kwargs):
            raise ConfigError(_readable(message))

    parser = Parser(prog="python -m spknet.train", description=__doc__, env_prefix="SPKNET", default_env=False)
    parser.add_argument("--config", action="config", help="a recipe's name or a YAML file")
    parser.add_class_arguments(Config, nested_key=None, fail_untyped=True)
    return parser


def _build(cls: type, values: Any) -> Any:
    arguments = {}
    for f in dataclasses.fields(cls):
        value = values[f.name]
        group = f.default_factory if f.default_factory is not dataclasses.MISSING else None
        arguments[f.name] = _build(group, value) if dataclasses.is_dataclass(group) else value
    return cls(**arguments)


def _known(values: dict[str, Any], cls: type = Config, prefix: str = "") -> dict[str, Any]:
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown option {prefix}{name}{nearest(prefix + name)}")
        group = known[name].default_factory
        if dataclasses.is_dataclass(group) and isinstance(value, dict):
            _known(value, group, f"{prefix}{name}.")
    return values


def _resolved_recipes(argv: list[str]) -> list[str]:
    import yaml

    words = list(argv)
    for i, word in enumerate(words):
        name = word.split("=", 1)[1] if word.startswith("--config=") else None
        if word == "--config" and i + 1 < len(words):
            path = recipe_path(words[i + 1])
            words[i + 1] = str(path)
        elif name is not None:
            path = recipe_path(name)
            words[i] = f"--config={path}"
        else:
            continue
        values = yaml.safe_load(path.read_text()) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a mapping of groups to options, found {type(values).__name__}")
        _known(values)
    return words


def _checked_word(word: str) -> str:
    match = re.match(r"--([A-Za-z_][\w.]*)", word)
    special = {"config", "print_config", "help"}
    groups = {f.name for f in dataclasses.fields(Config)}
    if match and match[1] not in special and match[1] not in groups and match[1] not in keys():
        raise ConfigError(f"unknown option --{match[1]}{nearest(match[1])}")
    return word


def _readable(message: str) -> str:
    unknown = re.search(
        r"Key '([\w.]+)' (?:is not expected|not found)|unrecognized arguments?: --([\w.]+)", message, re.I
    )
    if unknown:
        name = unknown[1] or unknown[2]
        return f"unknown option {name}{nearest(name)}"
    return message
