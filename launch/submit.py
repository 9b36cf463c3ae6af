"""Submit one run: to SLURM through submitit, or to this machine.

    python -m launch.submit --nodes 4 --gpus-per-node 8 --partition gpu --hours 48 -- --config RECIPE --run_dir runs/a ...
    python -m launch.submit --executor local --ranks-per-node 2 -- --config RECIPE --run_dir runs/a

What can be checked is checked here, before anything is queued: the run's options, the run folder, the partition.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spknet.config import Config, ConfigError
from spknet.errors import UserError
from spknet.options import parse
from spknet.train.run_folder import write_json

SINFO_SECONDS = 30  # a client that cannot reach its controller tries for a minute or more


class SubmitError(UserError):
    """The run cannot be submitted; the message says what to change."""


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m launch.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_cluster_options(parser)
    parser.add_argument("--name", help="the job's name (the run folder's)")
    own, run_words = split_words(words)
    options = parser.parse_args(own)
    try:
        config = checked_config(run_words, options)
        run_dir = writable_folder(config.run_dir)
        task = make_task(run_words, run_dir, options)
        check_cluster(options)
        jobs = submit([task], options, options.name or run_dir.name, run_dir / "jobs", config.data.workers)
    except (SubmitError, ConfigError) as error:
        print(f"launch.submit: {error}", file=sys.stderr)
        return 2
    job = jobs[0]
    print(f"run   {run_dir}\njob   {job.job_id}\nlogs  {job.paths.stderr} (.out beside it)")
    print(f"state python -m launch.status {run_dir}")
    return wait_in_process(jobs) if options.executor == "debug" else 0


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Words before and after the first `--`: the launcher's and the run's."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """What a run asks of the cluster: shared by launch.submit and launch.sweep."""
    add = parser.add_argument
    add("--executor", choices=["slurm", "local", "debug"], default="slurm", help="debug: in this process, in front")
    add("--nodes", type=int, default=1)
    add("--gpus-per-node", type=int, default=0, help="GPUs asked for on each node")
    add("--ranks-per-node", type=int, help="training processes on each node (one a GPU; 1 without GPUs)")
    add("--cpus-per-rank", type=int, help="CPUs asked for, for each rank (data.workers + 1)")
    add("--mem-gb", type=float, help="memory of a node")
    add("--partition")
    add("--account")
    add("--hours", type=float, default=24.0, help="time limit of a job; the run goes on in the next one")
    add("--signal-delay", type=int, default=180, metavar="SECONDS", help="warning before the time limit")
    add("--max-restarts", type=int, default=1, help="of torchrun, before the job is requeued")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="any option of sbatch, e.g. qos=high")


def ranks_per_node(options: argparse.Namespace) -> int:
    return options.ranks_per_node or options.gpus_per_node or 1


def checked_config(run_words: list[str], options: argparse.Namespace) -> Config:
    """The Config of the run's words. Raises ConfigError or SubmitError for what would fail on the cluster."""
    if not run_words:
        raise SubmitError(
            "the run's own options are missing; give them after `--`: ... -- --config RECIPE --run_dir DIR"
        )
    config = parse(run_words)
    if not config.run_dir:
        raise SubmitError("--run_dir is missing; give it after `--`: it is where the run is kept and continued")
    ranks = options.nodes * ranks_per_node(options)
    if config.data.speakers_per_batch % ranks:
        raise SubmitError(
            f"data.speakers_per_batch={config.data.speakers_per_batch} is not divisible by {ranks} ranks"
            f" ({options.nodes} nodes x {ranks_per_node(options)}); change one of them"
        )
    limit = options.hours * 3600
    if options.signal_delay >= limit:
        raise SubmitError(
            f"--signal-delay {options.signal_delay} s does not fit in a time limit of {limit:.0f} s (--hours"
            f" {options.hours:g}): the run would be stopped as it starts; give a longer limit or a shorter delay"
        )
    return config


def writable_folder(path: str | Path) -> Path:
    """The folder, made where it is missing. Raises SubmitError where nothing can be written there."""
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise SubmitError(f"cannot write to {folder}: {error.strerror}; give another --run_dir") from None


def make_task(run_words: list[str], run_dir: Path, options: argparse.Namespace):
    """The picklable launch.task.Task of a run. Raises SubmitError where submitit is missing."""
    try:
        from launch.task import Task
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        raise SubmitError(
            "submitit is not installed; `pip install 'spknet[launch]'` (or `pip install submitit`)"
        ) from None
    # The last --run_dir wins: the same folder whatever directory the job starts in.
    return Task(
        argv=[*run_words, "--run_dir", str(run_dir)],
        run_dir=str(run_dir),
        nodes=options.nodes,
        ranks_per_node=ranks_per_node(options),
        signal_delay=options.signal_delay,
        max_restarts=options.max_restarts,
    )


def check_cluster(options: argparse.Namespace) -> None:
    """Raises SubmitError where the executor cannot take what is asked for."""
    if options.executor != "slurm":
        if options.nodes > 1:
            raise SubmitError(f"--executor {options.executor} has one node, not {options.nodes}")
        return
    if not (shutil.which("sinfo") and shutil.which("sbatch") and shutil.which("srun")):
        raise SubmitError("no SLURM here (sinfo, sbatch or srun not found); --executor local runs on this machine")
    try:
        asked = subprocess.run(
            ["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, timeout=SINFO_SECONDS, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        why = error.stderr.strip() if isinstance(error.stderr, str) else f"sinfo took over {SINFO_SECONDS} s"
        raise SubmitError(f"SLURM does not answer: {why}; --executor local runs on this machine") from None
    partitions = sorted(set(asked.stdout.split()))
    unknown = [p for p in (options.partition or "").split(",") if p and p not in partitions]
    if unknown:
        raise SubmitError(f"unknown partition {unknown[0]}; this cluster has {', '.join(partitions)}")


def submit(tasks: list, options: argparse.Namespace, name: str, folder: Path, workers: int, at_once: int = 256) -> list:
    """Queue tasks as one job, or one array of which at most `at_once` run together; submitit's jobs in their order.

    RUN/job.json keeps the job's id for launch.status.
    """
    import submitit

    if options.executor == "debug":
        return [submitit.DebugExecutor(folder / "%j").submit(task) for task in tasks]
    kind = submitit.SlurmExecutor if options.executor == "slurm" else submitit.LocalExecutor
    # A time-out is how a long run moves on: it must never use up a count.
    executor = kind(folder / "%j", max_num_timeout=10**6)
    wanted = (
        slurm_parameters(options, name, workers, at_once) if options.executor == "slurm" else local_parameters(options)
    )
    executor.update_parameters(**wanted)
    try:
        jobs = executor.submit_array(tasks) if len(tasks) > 1 else [executor.submit(tasks[0])]
    except submitit.core.utils.FailedJobError as error:
        raise SubmitError(f"sbatch refused: {str(error).strip().splitlines()[-1]}") from None
    for task, job in zip(tasks, jobs):
        note = {"job": job.job_id, "executor": options.executor, "log": str(job.paths.stderr), "time": time.time()}
        write_json(Path(task.run_dir) / "job.json", note)
    return jobs


def slurm_parameters(options: argparse.Namespace, name: str, workers: int, at_once: int) -> dict:
    """submitit's parameters. Without --cpus-per-rank each rank gets a CPU for itself and one for every loader."""
    bad = [pair for pair in options.slurm if "=" not in pair]
    if bad:
        raise SubmitError(f"--slurm {bad[0]}: expected KEY=VALUE, e.g. --slurm qos=high")
    given = {
        "partition": options.partition,
        "account": options.account,
        "gpus_per_node": options.gpus_per_node or None,
        "mem": f"{options.mem_gb * 1024:.0f}M" if options.mem_gb else None,
    }
    return {
        **{key: value for key, value in given.items() if value is not None},
        "job_name": name,
        "time": minutes(options),
        "nodes": options.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": ranks_per_node(options) * (options.cpus_per_rank or workers + 1),
        "signal_delay_s": options.signal_delay,
        "array_parallelism": at_once,
        # A node that dies must end the job as NODE_FAIL, which SLURM requeues, and not as a step that failed.
        "srun_args": ["--kill-on-bad-exit=0"],
        "additional_parameters": {"requeue": True, **dict(pair.split("=", 1) for pair in options.slurm)},
    }


def local_parameters(options: argparse.Namespace) -> dict:
    """submitit's parameters on this machine; a CUDA_VISIBLE_DEVICES of the user's stands."""
    values = {"timeout_min": minutes(options), "tasks_per_node": 1, "signal_delay_s": options.signal_delay}
    visible = [int(x) for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.isdigit()]
    return {**values, "gpus_per_node": options.gpus_per_node, "visible_gpus": visible or range(options.gpus_per_node)}


def minutes(options: argparse.Namespace) -> int:
    return max(1, round(options.hours * 60))


def wait_in_process(jobs: list) -> int:
    """Run debug jobs here and now; 1 where one failed."""
    for job in jobs:
        os.environ["SUBMITIT_DEBUG_JOB_ID"] = job.job_id
        error = job.exception()
        if error is not None:
            print(f"launch.submit: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
