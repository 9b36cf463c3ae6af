"""All that can be known before a run is queued, with the code that the run itself uses.

    config = checked_config(["--config", "RECIPE", "--run_dir", "runs/a"], options)

The options, the batch and the ranks, the loss and its utterances a speaker, the network, the training data and every trial list with
its utterances, the time limit against the warning, GPUs and CPUs against the ranks, the run folder, and who has the run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from launch import jobs
from launch.cluster import SubmitError, environment, minutes, ranks_per_node, setup_lines, slurm_options
from spknet.config import Config
from spknet.errors import of_system
from spknet.options import parse

SLURM_FIELDS = "%"  # SLURM and submitit put the job's number into names that hold %j


def checked_config(run_words: list[str], options: argparse.Namespace, seen: dict | None = None) -> Config:
    """The Config of the run's words. Raises UserError for what would fail on the cluster.

    seen: data and lists that the earlier runs of a sweep have been checked with, so that each is opened once.
    """
    if not run_words:
        raise SubmitError(
            "the run's own options are missing; give them after `--`: ... -- --config RECIPE --run_dir DIR"
        )
    config = parse(run_words)
    check_folder_name(config)
    check_ranks(config, options)
    check_time(options)
    slurm_options(options), environment(options), setup_lines(options)
    try:
        check_what_is_trained(config, options, {} if seen is None else seen)
    except OSError as error:
        raise of_system(error) from None
    return config


def check_folder_name(config: Config) -> None:
    if not config.run_dir:
        raise SubmitError("--run_dir is missing; give it after `--`: it is where the run is kept and continued")
    if SLURM_FIELDS in str(Path(config.run_dir).absolute()):
        raise SubmitError(
            f"--run_dir {config.run_dir} holds a %, where SLURM puts numbers of its own; give another name"
        )


def check_ranks(config: Config, options: argparse.Namespace) -> None:
    """Whether batch, GPUs and CPU threads fit the ranks."""
    per_node = ranks_per_node(options)
    ranks = options.nodes * per_node
    if config.data.speakers_per_batch % ranks:
        below = config.data.speakers_per_batch // ranks * ranks
        near = " or ".join(str(n) for n in (below, below + ranks) if n)
        raise SubmitError(
            f"data.speakers_per_batch={config.data.speakers_per_batch} is not divisible by {ranks} ranks"
            f" ({options.nodes} nodes x {per_node}); give {near}, or other ranks"
        )
    if options.executor != "local" and options.gpus_per_node and per_node > options.gpus_per_node:
        raise SubmitError(
            f"{per_node} ranks a node on {options.gpus_per_node} GPUs: NCCL takes one rank a GPU; give fewer ranks"
        )
    if config.train.device == "cuda" and not options.gpus_per_node:
        raise SubmitError("--train.device cuda without --gpus-per-node: the job would get no GPU")
    if options.cpus_per_rank and config.train.threads > options.cpus_per_rank:
        raise SubmitError(
            f"--train.threads {config.train.threads} on --cpus-per-rank {options.cpus_per_rank}: the threads would share CPUs;"
            " give as many CPUs, or fewer threads"
        )


def check_time(options: argparse.Namespace) -> None:
    limit = minutes(options) * 60
    if options.signal_delay >= limit:
        raise SubmitError(
            f"--signal-delay {options.signal_delay} s does not fit in a time limit of {limit} s (--hours"
            f" {options.hours:g}): the run would be stopped as it starts; give a longer limit or a shorter delay"
        )


def check_what_is_trained(config: Config, options: argparse.Namespace, seen: dict) -> None:
    """Opens the data and the lists, and builds network and loss without memory for their weights."""
    import torch

    from spknet.data.batches import Corpus
    from spknet.evaluate import evaluation
    from spknet.losses import build_loss
    from spknet.models import build_model

    classes, rate = 2, 16000
    if not options.skip_data_check:
        key = repr(config.data)
        if key not in seen:
            corpus = Corpus.open(config.data, config.train.seed)
            seen[key] = corpus.n_classes, corpus.utterances.sample_rate
        classes, rate = seen[key]
        key = repr(config.eval)
        if key not in seen:
            seen[key] = evaluation.check(config, sample_rate=rate) is not None
    key = repr((config.model, config.loss, classes, rate, config.data.utterances_per_speaker))
    if key not in seen:
        with torch.device("meta"):
            build_model(config.model, rate)
            build_loss(config.loss, config.model.embedding_size, classes, config.data.utterances_per_speaker)
        seen[key] = True


def writable_folder(path: str | Path) -> Path:
    """The folder, made where it is missing. Raises SubmitError where nothing can be written there."""
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise SubmitError(f"cannot write to {folder}: {error.strerror}; give another --run_dir") from None


def check_free(run_dir: Path) -> None:
    """Raises SubmitError where the run's job is queued or running, or a process trains in its folder."""
    holder = jobs.holder_of(run_dir)
    if holder is not None:
        raise SubmitError(
            f"{run_dir} belongs to {holder}; wait for it, or end it with `spknet cancel {run_dir}`, or give another --run_dir"
        )


def check_cluster(options: argparse.Namespace) -> None:
    """Raises SubmitError where the executor cannot take what is asked for."""
    if options.executor != "slurm":
        if options.nodes > 1:
            raise SubmitError(f"--executor {options.executor} has one node, not {options.nodes}")
        if options.evaluate or options.container:
            raise SubmitError("--evaluate and --container need SLURM; leave them out")
        return
    if not (shutil.which("sinfo") and shutil.which("sbatch") and shutil.which("srun")):
        raise SubmitError("no SLURM here (sinfo, sbatch or srun not found); --executor local runs on this machine")
    try:
        asked = subprocess.run(
            ["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, timeout=jobs.SLURM_SECONDS, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        why = error.stderr.strip() if isinstance(error.stderr, str) else f"sinfo took over {jobs.SLURM_SECONDS} s"
        raise SubmitError(f"SLURM does not answer: {why}; --executor local runs on this machine") from None
    partitions = sorted(set(asked.stdout.split()))
    unknown = [p for p in (options.partition or "").split(",") if p and p not in partitions]
    if unknown:
        raise SubmitError(f"unknown partition {unknown[0]}; this cluster has {', '.join(partitions)}")
