"""Every option of a run, in one place: name, type, default, meaning with its unit, and range.

Values are checked by pydantic wherever they come from: a recipe, the command line, a checkpoint. spknet/options.py reads
recipes and command lines, and prints the help.

    config = from_dict({"optim": {"lr": 0.1}}); to_dict(config)["optim"]["lr"]
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import field
from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from spknet.errors import UserError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, str_max_length=4096)

# encoder, embedding_size, n_mels where not given: as published, by the beginning of the name; else SAP, 512, 40.
PUBLISHED = {
    "ResNetSE": ("SAP", 512, 40),
    "ResNet": ("TSTP", 256, 80),
    "Res2Net": ("TSTP", 256, 80),
    "DF-ResNet": ("TSTP", 256, 80),
    "SimAM-ResNet": ("ASP", 256, 80),
    "ECAPA": ("ASTP-GLOB", 192, 80),
    "CAM++": ("TSTP", 512, 80),
    "ERes2NetV2": ("TSTP", 192, 80),
    "ReDimNet-B0": ("ASTP-GLOB", 192, 60),
    "ReDimNet": ("ASTP-GLOB", 192, 72),
    "GE2E-LSTM": ("TAP", 256, 40),
}


def option(default: Any, about: str, **bounds: float):
    """A field with its default, its meaning (unit included) and pydantic's bounds: ge, gt, le, lt."""
    if isinstance(default, list):
        return Field(default_factory=lambda: list(default), description=about, **bounds)
    return Field(default, description=about, **bounds)


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where the training data lie, and what a batch is."""

    train_shards: str | list[str] | None = option(None, "packed data set (folder made by spknet pack), or several")
    train_list: str | None = option(None, "loose files instead: lines `speaker path`")
    train_root: str | None = option(None, "folder that the paths in train_list start from")
    sample_rate: int | None = option(
        None,
        "Hz of the training data, and from then on of the network; null: of packed data theirs, of loose files 16000",
        ge=2000,
        le=192000,
    )
    speakers_per_batch: int = option(40, "N, distinct speakers of one global batch, over all ranks together", ge=2)
    utterances_per_speaker: int = option(2, "M, crops of each speaker in a batch", ge=1)
    crop_seconds: float = option(2.0, "length of a training crop, seconds", gt=0, le=3600)
    max_utterances_per_speaker: int = option(500, "utterances of a speaker used in one epoch", ge=1)
    epoch: Literal["utterances", "balanced"] = option(
        "utterances", "an epoch covers utterances once, or speakers equally"
    )
    plan: Literal["auto", "table", "formula"] = option(
        "auto", "an epoch's batches: a table of them, or a formula; auto: a formula from 2^24 utterances on"
    )
    workers: int = option(2, "loader processes of each rank; 0 loads in the training process", ge=0, le=1024)
    cache_dir: str | None = option(None, "node-local folder that tars are copied to before they are read")
    cache_gib: float = option(0.0, "size limit of cache_dir in GiB; 0 for none", ge=0)
    dev_speakers: int | str = option(0, "speakers kept out of training: how many, or a file with one name a line")
    unite_speakers: bool = option(False, "equal names in several data sets are one speaker")


@dataclass(frozen=True, config=STRICT)
class AugmentConfig:
    """Noise, rooms, channels and speed, drawn for each crop. Options left at null take the preset's values."""

    noise_shards: str | None = option(None, "noise, music and speech, packed with the category as the speaker")
    rir_shards: str | None = option(None, "room impulse responses, packed the same way")
    preset: Literal["none", "kaldi", "wespeaker", "redimnet2", "voxceleb_trainer"] = option(
        "none", "whose values null takes (spknet/data/presets.py); none: one of the kinds in the shards, equally likely"
    )
    probability: float | None = option(
        None, "probability of noise or reverberation for an utterance (none: 0.6)", ge=0, le=1
    )
    reverb: float | None = option(None, "share of these with reverberation alone", ge=0, le=1)
    both: float | None = option(None, "share of these with reverberation and noise on top", ge=0, le=1)
    noise: float | None = option(None, "weight of noise among what is added", ge=0)
    music: float | None = option(None, "weight of music", ge=0)
    talker: float | None = option(None, "weight of one talker", ge=0)
    babble: float | None = option(None, "weight of several talkers", ge=0)
    by_recording: bool | None = option(None, "weights times numbers of recordings: every file equally likely")
    noise_snr: list[float] | None = option(None, "dB, [lowest, highest], or three values and more to choose from")
    music_snr: list[float] | None = option(None, "dB, the same for music")
    talker_snr: list[float] | None = option(None, "dB, the same for one talker")
    babble_snr: list[float] | None = option(None, "dB, the same for babble: of the sum, or of each talker")
    talkers: list[int] | None = option(None, "recordings in a babble, [fewest, most]")
    talkers_apart: bool | None = option(None, "each talker of a babble at an SNR of its own")
    power_floor: float | None = option(None, "added to both mean squares when the SNR is set (full scale: 1)", ge=0)
    rir: Literal["aligned", "unit_energy"] | None = option(
        None, "aligned: direct sound in place, level kept; or of energy 1, as it is"
    )
    level: Literal["kept", "power", "peak"] | None = option(None, "as mixed, the power of before, or peak 1")
    gain_db: list[float] | None = option(None, "random gain, dB, [lowest, highest]; never beyond full scale")
    rir_seconds: float = option(1.0, "seconds of an impulse response that are used", ge=0.01, le=20)
    lowpass: float = option(0.0, "probability of a low-pass filter", ge=0, le=1)
    lowpass_hz: list[float] = option([2000.0, 7000.0], "its cut-off, Hz, [lowest, highest]")
    telephone: float = option(0.0, "probability of a telephone band: 8 kHz, 300 to 3400 Hz, G.711", ge=0, le=1)
    telephone_law: Literal["mu", "a", "both"] = option("both", "law of G.711; both: equally likely")
    dither: float = option(0.0, "deviation of white noise on every crop, steps of 16-bit samples (WeSpeaker: 1)", ge=0)
    speed: list[float] = option([], "playing speeds drawn from, e.g. [1.0, 0.9, 1.1]; empty for none")
    speed_labels: bool = option(False, "each speed is a speaker of its own: class speaker + S * index in speed")
    speed_classes: int | None = option(None, "speeds that the head has classes for; null: those of speed_labels", ge=1)
    spec_augment: bool = option(False, "mask frequency bands and time spans of each crop's features")
    spec_probability: float = option(1.0, "probability that an utterance is masked", ge=0, le=1)
    frequency_masks: int = option(2, "bands that are masked", ge=0)
    frequency_width: float = option(0.2, "largest width of a band, as a fraction of the axis", ge=0, le=1)
    time_masks: int = option(2, "spans that are masked", ge=0)
    time_width: float = option(0.1, "largest width of a span, as a fraction of the crop", ge=0, le=1)


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The network."""

    name: str = option("ResNetSE34L", "network; `spknet info` lists them")
    encoder: str | None = option(None, "pooling over time (docs/variants.md lists them); null: as published")
    embedding_size: int | None = option(None, "dimensions of an embedding; null: as published", ge=1, le=65536)
    n_mels: int | None = option(None, "mel bands of the features; null: as published", ge=1, le=1024)
    log_input: bool = option(True, "logarithm of the mel energies")
    window: Literal["auto", "hamming", "hann"] = option(
        "auto", "analysis window; auto: as voxceleb_trainer's network of that name"
    )
    input_scale: Literal["unit", "int16"] = option("unit", "what the network is given: [-1, 1] or -32768..32767")
    width: float = option(1.0, "factor on the number of channels", gt=0, le=64)
    sinc_stride: int = option(10, "RawNet3: stride of the learned filter bank, samples", ge=1)
    variant: str = option(
        "auto", "whose version of the network, e.g. wespeaker, 3dspeaker, speechbrain; auto: its first"
    )
    two_emb_layer: bool | None = option(None, "ResNet: a second layer after the first; null: as in the variant")
    pool_input: bool = option(False, "ECAPA: pool the features and their differences, too, beside the layers")
    agg_gnorm: bool = option(False, "ReDimNet2: group norms where maps are summed, as in its recipes since July 2026")

    def __post_init__(self):
        names = [name for name in PUBLISHED if self.name.startswith(name)]
        published = PUBLISHED[names[0]] if names else ("SAP", 512, 40)
        for name, value in zip(("encoder", "embedding_size", "n_mels"), published):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


@dataclass(frozen=True, config=STRICT)
class FeaturesConfig:
    """What the network sees of a wave."""

    name: Literal["auto", "log_mel", "spectrum", "kaldi", "speechbrain", "tfmel", "redimnet", "ge2e"] = option(
        "auto", "front end; auto: as the network was published"
    )
    window: Literal["auto", "hamming", "povey"] = option(
        "auto", "kaldi: analysis window; auto: as the network's variant was published"
    )
    scale: Literal["auto", "unit", "int16"] = option(
        "auto", "kaldi: samples in [-1, 1] or -32768..32767; auto: as published"
    )
    hop_ms: float | None = option(None, "step from frame to frame, ms; null: 10, of redimnet 15", gt=0)
    remove_mean: bool = option(True, "each band minus its mean over the utterance")
    batch_norm: bool = option(False, "then a BatchNorm of each band; with remove_mean false the spectrum's mean stays")
    normalize_wave: bool | None = option(
        None, "each wave minus its mean, over its deviation; null: tfmel yes, redimnet no"
    )


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """What is minimised."""

    name: str = option("angleproto", "loss; `spknet recipes loss` lists them")
    margin: float = option(0.2, "margin of amsoftmax, aamsoftmax (radians), sphereface2, triplet, contrastive", ge=0)
    scale: float = option(30.0, "scale of the cosines of amsoftmax, aamsoftmax, sphereface2", gt=0)
    margin_warmup_steps: int = option(0, "steps over which the margin grows linearly from 0", ge=0)
    margin_schedule: Literal["constant", "linear", "exponential"] = option(
        "constant", "how the margin grows from margin_start_epoch to margin_end_epoch"
    )
    margin_start: float = option(0.0, "linear, exponential: margin before margin_start_epoch", ge=0)
    margin_start_epoch: float = option(0.0, "epochs done when the margin begins to grow", ge=0)
    margin_end_epoch: float = option(0.0, "epochs done when the margin has grown to loss.margin", ge=0)
    beyond_pi: Literal["jump", "continuous"] = option(
        "jump", "aamsoftmax where theta + m > pi: cos - m sin m, or cos - (1 - cos m)"
    )
    sub_centers: int = option(1, "amsoftmax, aamsoftmax: centres of a class, of which the nearest counts", ge=1)
    top_k: int = option(0, "amsoftmax, aamsoftmax: hardest other classes that are penalised; 0 for none", ge=0)
    top_k_margin: float = option(
        0.06, "radians by which these come nearer at margin 0.2, else in proportion to the margin", ge=0
    )
    margin_type: Literal["C", "A"] = option("C", "sphereface2: margin on the curved cosine, or on the angle")
    curve: float = option(3.0, "sphereface2: exponent t of the curved cosine 2 ((cos + 1) / 2)^t - 1", gt=0)
    positive_weight: float = option(
        0.7, "sphereface2: lambda, weight of the right class against all others", ge=0, le=1
    )
    temperature: float = option(0.1, "supcon: what cosines are divided by", gt=0)
    normalize_embeddings: bool = option(False, "length-normalise embeddings before ge2e, angleproto, proto")
    hard_rank: int = option(
        10, "triplet, contrastive: negatives come from the hard_rank + 1 nearest; below 0: semi-hard"
    )
    hard_prob: float = option(0.5, "probability of such a hard negative; any other speaker otherwise", ge=0, le=1)
    semi_hard_fallback: Literal["any", "skip"] = option("any", "where none is semi-hard: any other, or no triplet")
    cosine_floor: float | None = option(
        None, "ge2e: floor of cosines (voxceleb_trainer: 1e-6); a flaw, for comparison only"
    )
    n_classes: int | None = option(
        None, "classes of a classification head; null: as many as the data have labels", ge=1
    )
    sharded: bool | Literal["auto"] = option("auto", "cut the head over the ranks; auto: from 2^24 weights on")
    shards: int = option(64, "sharded: pieces of the head, whatever the number of ranks; a power of 2", ge=1, le=65536)
    sample: float = option(1.0, "sharded: share of the other classes that a step compares with", gt=0, le=1)


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    """How it is minimised."""

    name: Literal["adam", "adamw", "sgd"] = option("adam", "optimizer")
    lr: float = option(0.001, "peak learning rate", gt=0)
    weight_decay: float = option(0.0, "weight decay", ge=0)
    head_weight_decay: float | None = option(None, "weight decay of the loss's parameters; null: weight_decay", ge=0)
    momentum: float = option(0.9, "momentum of sgd", ge=0, lt=1)
    network_lr: float = option(1.0, "factor on the network's rate beside that of the head; for fine-tuning", gt=0)
    nesterov: bool = option(False, "sgd with Nesterov's momentum")
    lr_batch: int = option(
        0, "utterances of the global batch that lr is meant for: the rate is lr * N * M / lr_batch; 0: lr", ge=0
    )
    schedule: Literal["constant", "step", "cosine", "exponential", "warmup_cosine"] = option(
        "step", "shape over the steps of the run"
    )
    lr_decay: float = option(0.95, "step: factor", gt=0, le=1)
    lr_decay_epochs: int = option(10, "step: epochs between two factors", ge=1)
    warmup_steps: int = option(0, "steps of linear growth from 0", ge=0)
    warmup_epochs: float = option(0.0, "the same in epochs, where warmup_steps is 0", ge=0)
    warm_from_zero: bool = option(True, "exponential: warm up from 0, or from the rate of lr_batch utterances")
    final_lr_fraction: float = option(0.01, "cosine, exponential: lr at the end, as a fraction of lr", ge=0, le=1)
    clip_norm: float = option(0.0, "largest norm of the gradient; 0 for no limit", ge=0)


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """How long, how exactly and on what the run goes."""

    epochs: int = option(100, "passes over the training data", ge=1)
    max_steps: int | None = option(None, "stop after this many steps, whatever the epoch", ge=1)
    precision: Literal["float32", "tf32", "bf16", "fp16", "float64"] = option("float32", "arithmetic of the step")
    compile: bool = option(False, "torch.compile the network")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = option(
        "default", "torch.compile's mode; reduce-overhead: by CUDA graphs"
    )
    channels_last: bool = option(False, "channels last in memory: faster convolutions in half precision")
    sync_batchnorm: bool = option(True, "BatchNorm statistics of the global batch")
    batchnorm_groups: int = option(1, "of each of so many groups of it (docs/scaling.md); 0: frozen", ge=0)
    deterministic: bool = option(False, "deterministic kernels on the GPU; a CPU needs none")
    seed: int = option(0, "seed of weights, batches, crops and augmentation", ge=0, lt=2**32)
    average_epochs: int = option(0, "also keep the mean of the weights at the last so many epochs' ends; 0: none", ge=0)
    ema: float = option(
        0.0, "also keep the exponential moving average of the weights, with this decay a step; 0: none", ge=0, lt=1
    )
    chunk: int = option(0, "utterances a rank embeds at a time (GradCache, exact gradient); 0: all at once", ge=0)
    save_every_steps: int = option(0, "steps between two checkpoints; 0: by time only", ge=0)
    save_every_minutes: float = option(15.0, "minutes between two checkpoints", gt=0)
    keep_checkpoints: int = option(3, "newest checkpoints kept, the best one besides; 0: all", ge=0)
    resume: str = option("auto", "auto, never, or the path of a checkpoint")
    resume_override: bool = option(False, "continue although options that shape the result have changed")
    initial_model: str | None = option(None, "weights to start from: whatever spknet.load reads")
    initial_weights: Literal["averaged", "trained"] = option(
        "averaged", "which weights of initial_model, where it has averages"
    )
    frozen: str | list[str] | None = option(None, "parts of the network not trained, by the beginnings of their names")
    allow_partial: bool = option(False, "start although initial_model lacks weights or has others")
    timeout_seconds: float = option(
        600.0, "seconds without a step of some rank, saving included, until it is named and the run stops", gt=0
    )
    profile: bool = option(False, "write one torch.profiler trace of 5 steps to RUN/profile")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the network runs")
    threads: int = option(0, "CPU threads of a rank; 0: an equal share of the cores", ge=0, le=1024)


@dataclass(frozen=True, config=STRICT)
class EvalConfig:
    """What the network is tried on during the run, and how."""

    trials: str | list[str] | None = option(None, "test lists: reported, never chosen by")
    dev_trials: str | None = option(None, "development list: chooses the best checkpoint")
    shards: str | list[str] | None = option(
        None, "packed data sets that hold the trials' utterances, keys as in the lists"
    )
    root: str | list[str] | None = option(None, "folders that the paths in the lists start from")
    every_epochs: float = option(
        10.0, "epochs between evaluations; the last step is always evaluated; 0: at the end only", ge=0
    )
    crop_seconds: float = option(0.0, "length of an evaluation crop, seconds; 0: whole utterances", ge=0, le=3600)
    crops: int = option(1, "crops spread evenly over each utterance", ge=1)
    score: Literal["cosine", "mean_distance"] = option(
        "cosine", "cosine of mean embeddings, or mean distance of all pairs of crops"
    )
    normalize_embeddings: Literal["auto", "always", "never"] = option("auto", "length 1 first; auto: not after proto")
    padding: Literal["repeat", "zeros"] = option(
        "repeat", "fills what is shorter than crop_seconds; zeros: on both sides"
    )
    metrics: Literal["default", "voxceleb_trainer"] = option("default", "arithmetic of EER and minDCF")
    scores: str | None = option(None, "a file that scores are also written to")
    weights: Literal["averaged", "trained"] = option(
        "averaged", "averaged where the run averages (train.average_epochs, train.ema)"
    )
    batch_seconds: float = option(0.0, "s of audio in one pass; 0: half of the GPU's memory, 60 on a CPU", ge=0, le=1e6)


@dataclass(frozen=True, config=STRICT)
class LogConfig:
    """What is written down."""

    every_steps: int = option(10, "steps between two lines of metrics.jsonl", ge=1)
    tensorboard: bool = option(True, "write TensorBoard files, too")


@dataclass(frozen=True, config=STRICT)
class Config:
    """Every option of a run."""

    run_dir: str | None = option(None, "folder of the run; the same folder continues it")
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


class ConfigError(UserError):
    """An option that does not exist or does not fit; the message says what would."""


def groups() -> dict[str, type]:
    """The groups of options: name -> dataclass."""
    found = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    return {name: kind for name, kind in found.items() if dataclasses.is_dataclass(kind)}


def option_names() -> list[str]:
    """Every option as `group.key`, in the order of the dataclasses."""
    return list(flatten(to_dict(Config())))


def nearest(name: str) -> str:
    """`; did you mean X?` for an unknown option, or where all options are shown if nothing is near."""
    known = [*option_names(), "config", "print_config", "help"]
    by_last = {key.rsplit(".", 1)[-1]: key for key in known}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    last = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, n=1, cutoff=0.7)
    match = near or [by_last[key] for key in last]
    return f"; did you mean {match[0]}?" if match else "; `spknet train --help` shows all options"


def from_dict(values: dict[str, Any]) -> Config:
    """The Config of a nested dict (a recipe, a checkpoint's `config`). Raises ConfigError naming every option that is wrong."""
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise ConfigError("; ".join(dict.fromkeys(map(_sentence, error.errors())))) from None


def _sentence(problem: dict[str, Any]) -> str:
    place = [str(part) for part in problem["loc"]]
    inside = groups()
    name = ".".join(place[: 2 if place[0] in inside else 1])
    if problem["type"] == "unexpected_keyword_argument":
        return f"unknown option {name}{nearest(name)}"
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    if problem["type"].startswith("dataclass"):
        expected = "a mapping of options"
    return f"{name}: {problem['input']!r} given, expected {expected}"


def to_dict(config: Config) -> dict[str, Any]:
    """The nested plain dict of a Config: strings, numbers, lists and None only."""
    return dataclasses.asdict(config)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one dict of `group.key`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
