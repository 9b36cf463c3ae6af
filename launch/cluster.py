"""What a run asks of the cluster: options, the user's profile, and their translation for submitit.

~/.config/spknet/cluster.yaml (or $SPKNET_CLUSTER) holds what is the same for every run of a user, in the options' own names:

    partition: gpu
    account: lab
    setup: [module load cuda/13.0, export NCCL_SOCKET_IFNAME=ib0]
    container: /images/spknet.sqsh
    slurm: [mail-type=END, "mail-user=me@site.org"]

The command line beats a sweep's `cluster:`, and that beats the profile.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from shards.commands import Parser
from spknet.errors import UserError

OURS = {  # options of sbatch that launch sets itself, and what to use
    **{
        "nodes": "--nodes",
        "ntasks": "--ranks-per-node",
        "ntasks-per-node": "--ranks-per-node",
        "tasks-per-node": "--ranks-per-node",
    },
    **{"gpus": "--gpus-per-node", "gpus-per-node": "--gpus-per-node", "gpus-per-task": "--gpus-per-node"},
    **{
        "cpus-per-task": "--cpus-per-rank",
        "cpus-per-gpu": "--cpus-per-rank",
        "signal": "--signal-delay",
        "time": "--hours",
    },
    **{"partition": "--partition", "account": "--account", "job-name": "--name", "mem": "--mem-gb"},
    **dict.fromkeys(
        ("output", "error", "open-mode", "array", "requeue", "no-requeue", "kill-on-invalid-dep"),
        "nothing: it is fixed",
    ),
}
AFTER_FIRST_SECONDS = 8  # srun ends the other tasks that long after the first one's end


class SubmitError(UserError):
    """The run cannot be submitted; the message says what to change."""


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Words before and after the first `--`: the launcher's and the run's."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """What a run asks of the cluster: shared by `spknet submit` and `spknet sweep`."""
    add = parser.add_argument
    add("--executor", choices=["slurm", "local", "debug"], default="slurm", help="debug: in this process, in front")
    add("--nodes", type=positive, default=1, help="machines of a run (1)")
    add("--gpus-per-node", type=natural, default=0, help="GPUs asked for on each node")
    add("--ranks-per-node", type=positive, help="training processes on each node (one a GPU; 1 without GPUs)")
    add("--cpus-per-rank", type=positive, help="CPUs asked for, for each rank (data.workers + 1)")
    add("--mem-gb", type=float, help="memory of a node")
    add("--partition", help="SLURM's queue (the cluster's default)")
    add("--account", help="whom SLURM charges (the user's default)")
    add("--hours", type=float, default=24.0, help="time limit of a job (24); the run goes on in the next one")
    add("--signal-delay", type=positive, default=180, metavar="SECONDS", help="warning before the time limit (180)")
    add("--max-restarts", type=natural, default=1, help="of torchrun, before the job is requeued (1)")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch, e.g. qos=high")
    add("--setup", action="append", default=[], metavar="LINE", help="shell line before the run, or a file of them")
    add("--env", action="append", default=[], metavar="KEY=VALUE", help="environment variable of the ranks")
    add("--container", metavar="IMAGE", help="pyxis image or .sqsh file; a .sif file is run by apptainer")
    add("--mount", action="append", default=[], metavar="PATH[:PATH]", help="folder that the container sees")
    add("--stage", metavar="DIR", help="copy the shards to this folder on each node's own disk before each start")
    add("--evaluate", metavar="WORDS", help="spknet evaluate's options: a job that follows the run")
    add("--skip-data-check", action="store_true", help="data and lists are visible on the nodes only")


def positive(text: str) -> int:
    """argparse type: a whole number, at least 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """argparse type: a whole number, at least 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"-?\d+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least {least}, found {text!r}")
    return int(text)


def profile_words() -> list[str]:
    """The user's profile as words of the command line. Raises SubmitError for a file that is no mapping."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = Path(os.environ.get("SPKNET_CLUSTER") or home / "spknet" / "cluster.yaml")
    if not path.is_file():
        if "SPKNET_CLUSTER" in os.environ:
            raise SubmitError(f"SPKNET_CLUSTER={path}: no such file")
        return []
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise SubmitError(f"{path}: no YAML ({str(error).splitlines()[0]})") from None
    return words_of(values, str(path))


def words_of(values: Any, where: str) -> list[str]:
    """A mapping of cluster options as words. Raises SubmitError naming the unknown key."""
    parser = Parser(add_help=False)
    add_cluster_options(parser)
    parser.add_argument("--name")
    known = {o.removeprefix("--"): action for action in parser._actions for o in action.option_strings}
    if not isinstance(values, dict):
        raise SubmitError(f"{where}: expected `option: value` lines, found {type(values).__name__}")
    words = []
    for key, value in values.items():
        if key not in known:
            raise SubmitError(f"{where}: unknown option {key!r}; expected {', '.join(known)}")
        if value is True or value is False:
            words += [f"--{key}"] if value else []
            continue
        pairs = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
        words += [f"--{key}={one}" for one in (pairs if isinstance(pairs, list) else [pairs])]
    return words


def ranks_per_node(options: argparse.Namespace) -> int:
    return options.ranks_per_node or options.gpus_per_node or 1


def slurm_parameters(options: argparse.Namespace, name: str, workers: int, at_once: int, packed: int = 1) -> dict:
    """submitit's parameters. Without --cpus-per-rank each rank gets a CPU for itself and one for every loader."""
    given = {
        "partition": options.partition,
        "account": options.account,
        "gpus_per_node": options.gpus_per_node or None,
        "mem": f"{options.mem_gb * 1024:.0f}M" if options.mem_gb else None,
    }
    cpus = packed * ranks_per_node(options) * (options.cpus_per_rank or workers + 1)
    return {
        **{key: value for key, value in given.items() if value is not None},
        "job_name": name,
        "time": minutes(options),
        "nodes": options.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        "signal_delay_s": options.signal_delay,
        "array_parallelism": at_once,
        # A node that dies must end the job as NODE_FAIL, which SLURM requeues, and not as a step that failed. Since 22.05
        # srun does not take over sbatch's --cpus-per-task: where CPUs are bound, all ranks would share one.
        "srun_args": [
            "--kill-on-bad-exit=0",
            f"--wait={AFTER_FIRST_SECONDS}",
            f"--cpus-per-task={cpus}",
            *container_arguments(options),
        ],
        "setup": setup_lines(options),
        "additional_parameters": {"requeue": True, **slurm_options(options)},
    }


def slurm_options(options: argparse.Namespace) -> dict[str, Any]:
    """What --slurm adds. Raises SubmitError for what launch sets itself: its checks would be passed by."""
    found: dict[str, Any] = {}
    for pair in options.slurm:
        key, is_pair, value = pair.partition("=")
        key = key.removeprefix("--").replace("_", "-")
        if key in OURS:
            raise SubmitError(f"--slurm {pair}: launch sets {key} itself; use {OURS[key]}")
        if not is_pair and key not in ("exclusive", "contiguous", "oversubscribe", "spread-job", "reboot"):
            raise SubmitError(f"--slurm {pair}: expected KEY=VALUE, e.g. --slurm qos=high")
        found[key] = value if is_pair else True
    return found


def setup_lines(options: argparse.Namespace) -> list[str]:
    """The lines of --setup; a value that is a file stands for its lines."""
    lines = []
    for value in options.setup:
        lines += Path(value).read_text().splitlines() if Path(value).is_file() else [value]
    return [line for line in lines if line.strip()]


def environment(options: argparse.Namespace) -> dict[str, str]:
    """What --env sets. Raises SubmitError for what is no KEY=VALUE."""
    bad = [pair for pair in options.env if not re.match(r"[A-Za-z_]\w*=", pair)]
    if bad:
        raise SubmitError(f"--env {bad[0]}: expected KEY=VALUE, e.g. --env NCCL_DEBUG=INFO")
    return dict(pair.split("=", 1) for pair in options.env)


def container_arguments(options: argparse.Namespace) -> list[str]:
    """pyxis' options of srun: the image, and the folders that it must see; the working folder is always mounted."""
    if not options.container or options.container.endswith(".sif"):
        return []
    here = os.getcwd()
    mounts = ",".join(m if ":" in m else f"{m}:{m}" for m in [here, *options.mount])
    return [f"--container-image={options.container}", f"--container-mounts={mounts}", f"--container-workdir={here}"]


def python(options: argparse.Namespace) -> str:
    """The shell words that start Python on the nodes: this interpreter, or the container's."""
    if not options.container:
        return shlex.quote(sys.executable)
    if not options.container.endswith(".sif"):
        return "python"
    gpus = ["--nv"] if options.gpus_per_node else []
    binds = [word for mount in [os.getcwd(), *options.mount] for word in ("--bind", mount)]
    return shlex.join(["apptainer", "exec", *gpus, *binds, "--pwd", os.getcwd(), options.container, "python"])


def local_parameters(options: argparse.Namespace, slot: int = 0) -> dict:
    """submitit's parameters on this machine. A CUDA_VISIBLE_DEVICES of the user's stands; slot k takes the k-th GPUs of it,
    and beyond the last GPU the runs share them."""
    values = {"timeout_min": minutes(options), "tasks_per_node": 1, "signal_delay_s": options.signal_delay}
    visible = [int(x) for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.isdigit()] or visible_gpus()
    n = options.gpus_per_node
    visible = visible or list(range(n))
    mine = [visible[(slot * n + i) % len(visible)] for i in range(n)]
    return {**values, "gpus_per_node": n, "visible_gpus": mine or range(0), "setup": setup_lines(options)}


def visible_gpus() -> list[int]:
    """Numbers of this machine's NVIDIA GPUs, without starting CUDA."""
    return sorted(int(p.name.removeprefix("nvidia")) for p in Path("/dev").glob("nvidia[0-9]*"))


def minutes(options: argparse.Namespace) -> int:
    return max(1, round(options.hours * 60))
