"""`python -m spknet.train`: from the command line to an exit status. Training itself is spknet/train/trainer.py.

    python -m spknet.train --config fast_resnet34_angleproto --data.train_shards data/shards/vox2 --run_dir runs/a
    torchrun --nproc_per_node 8 -m spknet.train --config ...        the same run on 8 GPUs
    srun --ntasks-per-node 8 python -m spknet.train --config ...    the same run, one task a GPU

Exit status: 0 done; 75 stopped by a signal and saved, or another rank is gone (start the same command again); 2 a mistake of
the user; 1 any other error. What is written where: spknet/train/run_folder.py, metrics_log.py, spknet/checkpoints/file.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

import torch

from shards.format import remove_leftovers
from spknet import config as configuration
from spknet.checkpoints.file import path_of, remove_orphans, steps
from spknet.config import Config
from spknet.data.batches import LoaderLost, end_processes, of_loader
from spknet.errors import INTERRUPTED, USAGE, UserError, printable
from spknet.messages import say
from spknet.parallel import stacks
from spknet.parallel.ranks import RankLost, Ranks, here, join, meet
from spknet.parallel.together import Failed, agree, gather_objects, on_first, sentence, together
from spknet.parallel.watchdog import CONTINUES, REQUEUE, Failure, Watchdog
from spknet.train import kernels, run_folder, voxceleb_trainer
from spknet.train.lock import Owner, RunError, hold
from spknet.train.run_folder import write_state
from spknet.train.sidelines import Sidelines
from spknet.train.signals import StopSignals
from spknet.train.told import NonFiniteLoss
from spknet.train.trainer import Trainer

# Words of collectives (gloo, NCCL) and of the store whose other end is gone.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "remote process exited",
)


class Run:
    """One start of a run on this rank: who owns the folder, and what state.json is to say."""

    def __init__(self):
        self.config: Config | None = None
        self.trainer: Trainer | None = None
        self.owner: Owner | None = None  # on rank 0, from the lock on
        self.held = contextlib.ExitStack()
        self.begun = False  # whether every check has passed
        self.taken = False  # whether the folder is another run's

    def report(self, failure: Failure) -> None:
        """On rank 0: state.json after a failure. A command that was refused leaves another run's folder as it is."""
        if self.config is None or self.config.run_dir is None or self.taken or not here().first:
            return
        token = self.owner.token if self.owner else None
        with contextlib.suppress(OSError, UserError):  # the disk may be what has failed, or the path may be no folder
            if self.begun:
                write_state(self.config.run_dir, failure.state, self.trainer.step, failure.reason, token)
            else:
                Path(self.config.run_dir).mkdir(parents=True, exist_ok=True)
                run_folder.note_before_begin(self.config.run_dir, failure.state, failure.reason, token)


def main(argv: list[str] | None = None, theirs: bool = False) -> int:
    """The command line; returns the exit status. theirs: it is voxceleb_trainer's, whatever it says."""
    argv = sys.argv[1:] if argv is None else argv
    run, stop = Run(), StopSignals()
    words, error = None, None
    try:
        words = voxceleb_trainer.options(argv, theirs)
        run.config = words[0]
    except (UserError, OSError) as mistake:  # told below, when the ranks have met
        error = UserError(sentence(mistake))
    with stop:
        try:
            with meet(run.config.train.timeout_seconds if run.config else 60.0):
                return _watched(run, words, error, stop)
        except UserError as mistake:  # the ranks have not met: each tells its own
            print(f"error: {printable(str(mistake))}", file=sys.stderr)
            run.report(Failure(str(mistake), USAGE))
            return USAGE


def _watched(run: Run, words, error: UserError | None, stop: StopSignals) -> int:
    """Everything that happens once the ranks have met."""
    watchdog = Watchdog(run.report, lambda: stop.received)
    try:
        watchdog.start()
        with together("reading the options"):
            if error is not None:
                raise error
        if words[1] is not None:
            return words[1]()
        config = run.config
        watchdog.dumps = run_folder.job_folder(config.run_dir)
        stacks.record(watchdog.dumps)
        with join(config.train.device, config.train.threads) as me:
            return _run(run, config, me, watchdog, stop)
    except BaseException as failed:
        # Handled here and not by the interpreter, which would keep the frames, and in them the loader's workers, until it
        # waits for these workers at its end.
        return _failed(run, failed, watchdog)
    finally:
        watchdog.stop()
        end_processes(multiprocessing.active_children())
        run.held.close()


def _failed(run: Run, error: BaseException, watchdog: Watchdog) -> int:
    """Tells the other ranks, the user and state.json why this rank ends; returns the exit status."""
    me = here()
    if run.config is not None:
        error = of_loader(error, run.config.data.workers) or error
    everywhere = isinstance(error, (Failed, NonFiniteLoss)) or getattr(error, "everywhere", False)
    failure = Failure(sentence(error), 1, me.rank)
    if isinstance(error, NonFiniteLoss):
        failure = Failure(str(error), 1)
    elif isinstance(error, RankLost):
        failure = Failure(str(error), REQUEUE, me.rank)
    elif isinstance(error, (UserError, OSError)):
        failure = Failure(sentence(error), USAGE, me.rank)
    elif isinstance(error, KeyboardInterrupt):
        failure = Failure("stopped by Ctrl-C", INTERRUPTED, me.rank)
    elif isinstance(error, LoaderLost):
        failure = Failure(str(error), REQUEUE, me.rank)
    elif isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST):
        failure = Failure(f"{watchdog.gone()}; {CONTINUES} ({sentence(error)})", REQUEUE, me.rank)
    elif not everywhere:
        traceback.print_exception(error, file=sys.stderr)
    if not everywhere:
        if me.world_size > 1 and failure.status != REQUEUE and not isinstance(error, KeyboardInterrupt):
            failure = Failure(f"rank {me.rank} ({socket.gethostname()}): {failure.reason}", failure.status, me.rank)
        failure = watchdog.fail(failure)
    if me.first or failure.rank == me.rank and not everywhere:
        print(f"error: {printable(failure.reason)}", file=sys.stderr, flush=True)
    run.report(failure)
    watchdog.last_acts(failure)
    return failure.status


def _run(run: Run, config: Config, me: Ranks, watchdog: Watchdog, stop: StopSignals) -> int:
    """Checks, owns the run folder, trains; leaves state.json saying how it ended."""
    kernels.choose(config.train, me.device)
    options = {f"option {k}": repr(v) for k, v in configuration.flatten(configuration.to_dict(config)).items()}
    versions = {f"version of {k}": v for k, v in run_folder.versions().items()}
    threads = {"CPU threads (--train.threads sets them)": str(torch.get_num_threads())}
    agree({"the code": run_folder.code_digest(), **versions, **options, **threads})
    watchdog.says("opening the data")
    trainer = Trainer(config, me)
    watchdog.pause("taking the run folder")  # a lock of another machine is watched for 35 s
    on_first("taking the run folder", lambda: _own(run, config), share=False)
    watchdog.says("reading the checkpoint")
    trainer.resume()
    watchdog.says("beginning")
    places = gather_objects((socket.gethostname(), _device_name(me)))
    run.trainer = trainer
    on_first("writing to the run folder", lambda: _begin(run, places), share=False)
    run.begun = True
    for warning in trainer.corpus.warnings():
        say(f"warning: {warning}")
    with Sidelines(trainer, run.owner, watchdog, stop) as side:
        stopped_by = trainer.train(side)
    on_first("ending", lambda: _end(run, stopped_by), share=False)
    return REQUEUE if stopped_by else 0


def _own(run: Run, config: Config) -> None:
    try:
        run.owner = run.held.enter_context(hold(config.run_dir))
    except RunError:
        run.taken = True
        raise


def _begin(run: Run, places: list[tuple[str, str]]) -> None:
    """Every check has passed: from here on this run writes into its folder."""
    hosts, devices = zip(*places)
    run_dir, start, notes = Path(run.config.run_dir), run.trainer.continues, []
    run.owner.check()
    remove_leftovers(run_dir / "checkpoints")  # of a run killed while it saved
    remove_orphans(run_dir)
    there = [path_of(run_dir, step).resolve() for step in steps(run_dir)]
    start = start and start.resolve()
    if there and start != there[0]:  # the next start would take what stands there for this run's
        notes += run_folder.set_aside(run.owner, start if start in there else None)
    about = run_folder.record(list(devices), list(hosts))
    notes += run_folder.begin(run.owner, configuration.to_dict(run.config), about, run.trainer.step)
    for note in notes:
        say(note)


def _end(run: Run, stopped_by: str | None) -> None:
    run.owner.check()
    step = run.trainer.step
    write_state(run.config.run_dir, "requeue" if stopped_by else "done", step, stopped_by or "", run.owner.token)
    say(f"stopped by {stopped_by} at step {step}" if stopped_by else f"done: {run.config.run_dir}")


def _device_name(me: Ranks) -> str:
    return torch.cuda.get_device_name(me.device) if me.device.type == "cuda" else "CPU"


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter's own end would wait for a collective that is under way, and gloo's threads may abort it.
    os._exit(status)
