"""`python -m spknet.train`: from the command line to an exit status. Training itself is spknet/train/trainer.py."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
import yaml

from shards.format import ShardError, atomic_write, remove_leftovers
from spknet import config as configuration
from spknet.checkpoints.file import CheckpointError
from spknet.config import Config, ConfigError
from spknet.data.sampler import SamplerError
from spknet.evaluate.trials import TrialError
from spknet.parallel import ranks as distributed
from spknet.parallel.ranks import RankError, Ranks, Watchdog
from spknet.train import run_folder as run
from spknet.train import voxceleb_trainer as legacy
from spknet.train.metrics_log import MetricsLog
from spknet.train.run_folder import RunError, StopSignals, write_state
from spknet.train.trainer import NonFiniteLoss, Trainer

REQUEUE = 75  # exit status: stopped by a signal, saved, start the same command again (EX_TEMPFAIL)
USER_ERRORS = (ConfigError, ShardError, SamplerError, CheckpointError, RunError, RankError, TrialError)


def main(argv: list[str] | None = None) -> int:
    """`python -m spknet.train`: exit status 0 done, 75 stopped by a signal and saved, 2 a user's error, 1 any other."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        config, instead = legacy.options(argv)
        if instead is not None:
            return instead()
        with (
            distributed.ranks(config.train.device, config.train.threads, config.train.timeout_seconds) as me,
            StopSignals() as stop,
        ):
            return _run(config, me, stop)
    except (*USER_ERRORS, NonFiniteLoss) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteLoss) else 2
    except Exception:
        # Handled here and not by the interpreter, which would keep the frames, and in them the loader's workers, until it
        # waits for these workers at its end.
        traceback.print_exc()
        return 1


def _run(config: Config, me: Ranks, stop: StopSignals) -> int:
    """Owns the run folder while training; leaves state.json saying how it ended."""
    trainer = None
    with contextlib.ExitStack() as held:
        with distributed.first_rank_only(me) as first:
            if first:
                held.enter_context(run.owned(config.run_dir))
                write_state(config.run_dir, "running", 0, "starting")
                remove_leftovers(Path(config.run_dir) / "checkpoints")  # of a run killed while it saved
        try:
            trainer = _prepare(config, me)
            stopped_by = _train(trainer, me, stop)
        except BaseException as error:
            _fail(config, trainer, error)
            raise
        distributed.barrier(me)
        if me.first:
            write_state(config.run_dir, "requeue" if stopped_by else "done", trainer.step, stopped_by or "")
        trainer.say(f"stopped by {stopped_by} at step {trainer.step}" if stopped_by else f"done: {config.run_dir}")
    # torchrun takes any other status of a worker for a failure, and would start the group again.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    return REQUEUE if stopped_by and not restarts else 0


def _prepare(config: Config, me: Ranks) -> Trainer:
    torch.use_deterministic_algorithms(config.train.deterministic)
    options = {f"option {k}": repr(v) for k, v in configuration.flatten(configuration.to_dict(config)).items()}
    distributed.agree(
        {"the code": run.code_digest(), **{f"version of {k}": v for k, v in run.versions().items()}, **options}, me
    )
    device = torch.cuda.get_device_name(me.device) if me.device.type == "cuda" else "CPU"
    places = distributed.gather_objects((socket.gethostname(), device), me)
    if me.first:
        hosts, devices = zip(*places)
        folder = Path(config.run_dir)
        run.write_json(folder / "record.json", run.record(list(devices), list(hosts)))
        with atomic_write(folder / "config.yaml") as file:
            file.write(yaml.safe_dump(configuration.to_dict(config), sort_keys=False).encode())
    trainer = Trainer(config, me)
    for warning in trainer.corpus.warnings():
        trainer.say(f"warning: {warning}")
    return trainer


def _train(trainer: Trainer, me: Ranks, stop: StopSignals) -> str | None:
    config = trainer.config
    log = MetricsLog(config.run_dir, trainer.step, config.log.tensorboard) if me.first else None

    def stalled(message: str) -> None:
        write_state(config.run_dir, "failed", trainer.step, message)
        print(f"error: rank {me.rank}: {message}", file=sys.stderr, flush=True)

    watchdog = Watchdog(me, config.train.timeout_seconds, stalled)
    watchdog.start()
    try:
        return trainer.train(log, watchdog, stop)
    finally:
        watchdog.stopped.set()
        if log is not None:
            log.close()


def _fail(config: Config, trainer: Trainer | None, error: BaseException) -> None:
    """state.json after an error. A lost peer is a reason to go on later, unless that peer itself has said `failed`."""
    lost = distributed.peer_lost(error)
    if lost and (run.read_state(config.run_dir) or {}).get("state") == "failed":
        return
    reason = f"{type(error).__name__}: {error}"
    if lost:
        reason = f"another rank is gone; the run continues from its newest checkpoint ({reason})"
    write_state(config.run_dir, "requeue" if lost else "failed", trainer.step if trainer else 0, reason)


if __name__ == "__main__":
    sys.exit(main())
