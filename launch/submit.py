"""Submit one run: to SLURM through submitit, or to this machine.

    spknet submit --nodes 4 --gpus-per-node 8 --partition gpu --hours 48 -- --config RECIPE --run_dir runs/a ...
    spknet submit --executor local --ranks-per-node 2 -- --config RECIPE --run_dir runs/a

What can be checked is checked here, before anything is queued (launch/checks.py); `--dry-run` stops after that. What is the same for
every run may stand in ~/.config/spknet/cluster.yaml (launch/cluster.py).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from launch import checks, cluster, jobs
from launch.cluster import SubmitError, ranks_per_node, split_words
from shards.commands import Parser
from spknet.config import Config
from spknet.errors import run


def parser() -> Parser:
    own = Parser(prog="spknet submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cluster.add_cluster_options(own)
    own.add_argument("--name", help="the job's name (the run folder's)")
    own.add_argument("--dry-run", action="store_true", help="check, and print what would be submitted")
    return own


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 2 for what cannot be submitted; with --executor debug 1 for a run that failed."""
    own, run_words = split_words(sys.argv[1:] if argv is None else argv)
    try:
        options = parser().parse_args([*cluster.profile_words(), *own])
        config = checks.checked_config(run_words, options)
        run_dir = Path(config.run_dir).absolute()
        checks.check_free(run_dir)
        checks.check_cluster(options)
        task = make_task(run_words, run_dir, options, config)
        if options.dry_run:
            print(f"would be submitted to {options.executor}: {shlex.join(['spknet', 'train', *task.argv])}")
            return 0
        checks.writable_folder(run_dir)
        with only_submission(run_dir):
            queued = submit([task], options, run_dir / "jobs", config.data.workers)
        evaluation = submit_evaluation(queued, [task], options, run_dir / "jobs")
    except cluster.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    job = queued[0]
    print(f"run   {run_dir}\njob   {job.job_id}{evaluation}\nlogs  {job.paths.stderr} (.out beside it)")
    print(f"state spknet status {shlex.quote(str(run_dir))}")
    return wait_in_process(queued) if options.executor == "debug" else 0


def make_task(run_words: list[str], run_dir: Path, options: argparse.Namespace, config: Config):
    """The picklable launch.task.Task of a run. Raises SubmitError where submitit is missing."""
    try:
        from launch.task import Task
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "submitit":
            raise
        raise SubmitError(
            "submitit is not installed; `pip install 'spknet[launch]'` (or `pip install submitit`)"
        ) from None
    argv, stage = list(run_words), []
    if options.stage:
        sets = config.data.train_shards
        if not sets:
            raise SubmitError("--stage copies packed shards; give --data.train_shards, or leave it out")
        stage = [[str(Path(s).absolute()), options.stage] for s in (sets if isinstance(sets, list) else [sets])]
        argv += ["--data.cache_dir", options.stage]
    # The last --run_dir wins: the same folder whatever directory the job starts in.
    return Task(
        argv=[*argv, "--run_dir", str(run_dir)],
        run_dir=str(run_dir),
        nodes=options.nodes,
        ranks_per_node=ranks_per_node(options),
        signal_delay=options.signal_delay,
        max_restarts=options.max_restarts,
        stage=stage,
        environment=cluster.environment(options),
    )


@contextlib.contextmanager
def only_submission(run_dir: Path) -> Iterator[None]:
    """Of two submissions at the same moment one goes on; the other is told. Released when this process ends, too."""
    with open(run_dir / "submit.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SubmitError(f"{run_dir} is being submitted by another process at this moment") from None
        checks.check_free(run_dir)
        yield


def submit(tasks: list, options: argparse.Namespace, folder: Path, workers: int, at_once: int = 256, slot: int = 0):
    """Queue tasks as one job, or one array of which at most `at_once` run together; submitit's jobs in their order.

    folder: RUN/jobs or SWEEP/jobs. slot: which GPUs of this machine a local job takes. RUN/job.json keeps the job's id and words.
    """
    import submitit

    packed = max(len(task.runs()) for task in tasks)
    if options.executor == "debug":
        queued = [submitit.DebugExecutor(folder / "%j").submit(task) for task in tasks]
    else:
        executor = executor_of(options, folder)
        wanted = cluster.local_parameters(options, slot)
        if options.executor == "slurm":
            wanted = cluster.slurm_parameters(
                options, getattr(options, "name", None) or folder.parent.name, workers, at_once, packed
            )
            # The submitter's interpreter, outside of any container; TERM must not end the script before it has asked for a requeue.
            batch, runs = (
                f"{shlex.quote(sys.executable)} -m launch.batch",
                f"--submitted {shlex.quote(str(folder / '%j'))}",
            )
            wanted["setup"] = [
                *wanted["setup"],
                "trap : TERM",
                f"{batch} begin {runs} || exit",
                f"{batch} watch {runs} &",
            ]
            wanted["teardown"] = [f"{batch} end {runs}"]
        executor.update_parameters(**wanted)
        try:
            queued = executor.submit_array(tasks) if len(tasks) > 1 else [executor.submit(tasks[0])]
        except submitit.core.utils.FailedJobError as error:
            raise SubmitError(f"sbatch refused: {str(error).strip().splitlines()[-1]}") from None
    for task, job in zip(tasks, queued):
        for one in task.runs():
            # Of several runs in one job each has a log of its own (launch/several.py).
            log = job.paths.stderr if len(task.runs()) == 1 else one / "jobs" / job.job_id / "log.err"
            note = {"job": job.job_id, "executor": options.executor, "log": str(log), "cwd": os.getcwd()}
            jobs.note_job(one, **note, cluster=words_again(options), run=words_of_run(task, one))
    return queued


def executor_of(options: argparse.Namespace, folder: Path):
    """submitit's executor. A time-out is how a long run moves on: it must never use up a count."""
    import submitit

    if options.executor == "slurm":
        return submitit.SlurmExecutor(folder / "%j", max_num_timeout=10**6, python=cluster.python(options))
    return submitit.LocalExecutor(folder / "%j", max_num_timeout=10**6)


def submit_evaluation(queued: list, tasks: list, options: argparse.Namespace, folder: Path) -> str:
    """Queue --evaluate's jobs, each after its run has ended as done; what to print of it."""
    if not options.evaluate:
        return ""
    from launch.evaluation import Evaluation

    words = shlex.split(options.evaluate)
    works = [Evaluation(words, str(r), options.nodes, ranks_per_node(options)) for task in tasks for r in task.runs()]
    executor = executor_of(options, folder)
    wanted = cluster.slurm_parameters(options, "evaluate", 0, 256)
    number = queued[0].job_id.split("_")[0]
    after = f"{'aftercorr' if len(works) > 1 else 'afterok'}:{number}"
    wanted["additional_parameters"] = {**wanted["additional_parameters"], "dependency": after}
    executor.update_parameters(**wanted)
    follow = executor.submit_array(works) if len(works) > 1 else [executor.submit(works[0])]
    return f", then its evaluation: {follow[0].job_id.split('_')[0]}"


def words_again(options: argparse.Namespace) -> list[str]:
    """The cluster's options as words, for `spknet resubmit`."""
    known = cluster_keys()
    words = []
    for key, value in vars(options).items():
        if key not in known or value in (None, False, []):
            continue
        option = f"--{key.replace('_', '-')}"
        words += (
            [option] if value is True else [f"{option}={v}" for v in (value if isinstance(value, list) else [value])]
        )
    return words


def cluster_keys() -> set[str]:
    """Names in the namespace of the options that add_cluster_options makes."""
    known = Parser(add_help=False)
    cluster.add_cluster_options(known)
    return {action.dest for action in known._actions}


def words_of_run(task, run_dir: Path) -> list[str]:
    """spknet.train's words of one run of a job."""
    return next(t.argv for t in getattr(task, "tasks", [task]) if Path(t.run_dir) == run_dir)


def wait_in_process(queued: list) -> int:
    """Run debug jobs here and now; 1 where one failed."""
    for job in queued:
        os.environ["SUBMITIT_DEBUG_JOB_ID"] = job.job_id
        error = job.exception()
        if error is not None:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
