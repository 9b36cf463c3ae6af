"""What stands beside the training and watches it: metrics, progress bar, watchdog, checkpoints, evaluation, profiler.

with Sidelines(trainer, owner, watchdog, stop) as side: trainer.train(side)
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from spknet.checkpoints import file as checkpoint
from spknet.checkpoints import pieces
from spknet.data.batches import Batch, Batches
from spknet.evaluate import evaluation
from spknet.losses.sharded import Sharded
from spknet.messages import Progress, say, warn
from spknet.parallel.ranks import meeting
from spknet.parallel.together import broadcast, gather_objects, on_first
from spknet.parallel.watchdog import Watchdog
from spknet.train.kernels import of_varying_shapes
from spknet.train.lock import Owner
from spknet.train.meter import Meter
from spknet.train.metrics_log import MetricsLog, profiler
from spknet.train.run_folder import write_state
from spknet.train.signals import StopSignals
from spknet.train.straggler import Straggler
from spknet.train.trainer import Trainer

DATA_LIMIT = 0.1  # share of the time spent waiting for data from which on the run says so
FIRST_STEPS = 20


class Sidelines:
    """One for a run on a rank; rank 0's has the log."""

    def __init__(self, trainer: Trainer, owner: Owner | None, watchdog: Watchdog, stop: StopSignals):
        self.trainer, self.owner, self.watchdog, self.stop = trainer, owner, watchdog, stop
        self.config, self.first = trainer.config, trainer.me.first
        self.run_dir = Path(self.config.run_dir)
        self.meter, self.log = Meter(trainer.me.device), None
        self.measured = 0  # steps whose time has been read
        self.warned, self.straggler = False, Straggler()
        self.stopped = False  # whether a signal came before the first step
        trainer.saved()

    def __enter__(self) -> Sidelines:
        t = self.trainer
        with contextlib.ExitStack() as stack:
            if self.first:
                self.log = MetricsLog(self.run_dir, t.step, self.config.log.tensorboard, self.owner)
                stack.callback(self.log.close)
            self.progress = stack.enter_context(Progress(t.total_steps, t.step, shown=self.first))
            self.trace = stack.enter_context(profiler(self.run_dir, self.config.train.profile and self.first))
            self._stack = stack.pop_all()
        try:
            known = broadcast(self.log is not None and self.log.has_evaluation(t.step))
            if t.step > 0 and self.evaluation_due() and not known:
                self.stopped = self.evaluate()  # the run died between this step's checkpoint and its evaluation
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def watched(self, batches: Batches) -> Iterator[Batch]:
        """The batches, with the time spent waiting for each; the watchdog knows which step is computed."""
        self.meter = Meter(self.trainer.me.device)
        for _ in range(self.trainer.step, self.trainer.total_steps):
            self.watchdog.says("waiting for data", self.trainer.step, 0)
            self.meter.begins("data")
            batch = next(batches)
            self.meter.begins("forward")
            # Ranks meet in the step's collectives, so one that is slow stays behind in this alone.
            self.watchdog.says("computing", self.trainer.step, 1)
            yield batch

    def stopped_by(self) -> str:
        """The signal that asked for the stop, as far as this rank knows."""
        return self.stop.received or self.watchdog.asked or "a signal to another rank"

    def asks(self) -> list[bool]:
        """What this rank asks of all: to stop, to save."""
        minutes = (time.monotonic() - self.trainer.saved_at) / 60
        return [self.stop.received is not None, self.first and minutes > self.config.train.save_every_minutes]

    def after_step(self) -> bool:
        """Logs, saves and evaluates what is due. Returns whether the run is to stop here."""
        t = self.trainer
        self.meter.begins(None)
        done = t.step == t.total_steps
        self.progress.advance()
        if self.trace is not None:
            self.trace.step()
        if t.step % self.config.log.every_steps == 0 or done:
            t.settle()
            self.write_metrics()
        evaluates, (stop, save) = self.evaluation_due(), t.asked
        if stop or save or done or evaluates or self._save_step():
            t.seconds += self.meter.pause()
            # Before an evaluation, too: a signal that comes in it finds the steps saved.
            self.save()
            stop = t.asked[0]
            if evaluates and not stop:
                stop = self.evaluate()
                t.task.train()
            self.meter.resume()
        return stop

    def _save_step(self) -> bool:
        every, t = self.config.train.save_every_steps, self.trainer
        return every > 0 and t.step % every == 0 and t.step != t.saved_step

    def save(self) -> None:
        """Writes the checkpoint of this step on rank 0; every rank returns when it is durable."""
        self.trainer.settle()
        self.watchdog.says("saving", self.trainer.step, -1)
        t, head = self.trainer, {}
        if isinstance(t.task.loss, Sharded):
            on_first("saving", lambda: self.owner.check(), share=False)  # before any rank writes rows
            head = {"head": pieces.write(checkpoint.path_of(self.run_dir, t.step), t.task.loss, t.optimizer)}
        on_first("saving", lambda: self._write_checkpoint(head), share=False)
        self.trainer.saved()

    def _write_checkpoint(self, head: dict) -> None:
        t = self.trainer
        self.log.sync()
        best = t.best and t.best["step"]
        keep = self.config.train.keep_checkpoints
        checkpoint.save(self.run_dir, t.state() | head, keep, best, self.owner.check)
        write_state(self.run_dir, "running", t.step, "", self.owner.token)

    def evaluation_due(self) -> bool:
        c, t = self.config.eval, self.trainer
        if not (c.trials or c.dev_trials):
            return False
        every = max(1, round(c.every_epochs * t.steps_per_epoch)) if c.every_epochs else t.total_steps
        return t.step == t.total_steps or (t.step > 0 and t.step % every == 0)

    def evaluate(self) -> bool:
        """Evaluates the network, averaged where the run averages, on all ranks; a better development EER makes this step
        the best checkpoint. Returns whether a signal stopped it; it is then done after the restart."""
        t = self.trainer
        self.watchdog.pause("evaluating", t.step)
        folder = self.run_dir / "eval" / f"step-{t.step:08d}"
        averaged = t.averaging.applied() if self.config.eval.weights == "averaged" else contextlib.nullcontext()
        # Whole utterances differ in length, and each length would be compiled anew.
        with torch.compiler.set_stance("force_eager"), of_varying_shapes(), averaged:
            how = {"out_dir": folder, "step": t.step, "trials": t.lists}
            try:
                figures = evaluation.evaluate_network(t.task.model, self.config, **how, stop=self.watchdog.stop_asked)
            except evaluation.Stopped:
                return True
        figures = broadcast(figures)
        if figures.get("dev_eer") is not None and (t.best is None or figures["dev_eer"] < t.best["dev_eer"]):
            t.best = {"step": t.step, "dev_eer": figures["dev_eer"]}
            self.save()
        if self.first:
            self.log.write({"step": t.step, "epoch": t.step / t.steps_per_epoch, "eval": figures})
            self.log.add_picture("eval/det", folder / "det.png", t.step)
        if "eer" in figures:  # not with unlabelled lists only
            say(f"step {t.step}: EER {figures['eer']:.2f} %, minDCF(0.01) {figures['min_dcf_p01']:.3f}")
        return False

    def write_metrics(self) -> None:
        t, n = self.trainer, self.trainer.window["steps"]
        loss, accuracy = t.window["loss"] / n, t.window["accuracy"] / n
        t.window = {"loss": 0.0, "accuracy": 0.0, "steps": 0}
        per_step = self.config.data.speakers_per_batch * self.config.data.utterances_per_speaker
        seconds, parts = self.meter.read()
        speed, waited = n * per_step / seconds, min(1.0, parts["data"] / seconds)
        own = gather_objects(round((sum(parts.values()) - parts["exchange"]) / n, 6))
        if self.log is not None:
            self.log.write(
                {
                    "step": t.step,
                    "epoch": t.step / t.steps_per_epoch,
                    "loss": loss,
                    "accuracy": accuracy,
                    "lr": t.optimizer.param_groups[0]["lr"],
                    "utterances_per_second": speed,
                    "data_wait_fraction": waited,
                    "seconds": t.seconds + self.meter.elapsed(),
                    "step_seconds": {part: spent / n for part, spent in parts.items()},
                    "rank_seconds": own,  # of each rank, a step, without the exchange between them
                }
            )
            self._warn_of_data(waited)
            self._warn_of_straggler(own)
        self.measured += n
        self.progress.advance(f"loss {loss:.3f} accuracy {accuracy:.1f} % {speed:.0f} utterances/s", by=0)

    def _warn_of_data(self, waited: float) -> None:
        # The first steps wait for the loaders to start.
        if waited > DATA_LIMIT and self.measured >= FIRST_STEPS and not self.warned:
            self.warned = True
            workers = self.config.data.workers
            warn(
                f"training waits for its data {waited:.0%} of the time: give more --data.workers (now {workers}), a local disk"
                " by --data.cache_dir, or less augmentation"
            )

    def _warn_of_straggler(self, seconds: list[float]) -> None:
        slow = self.straggler.look(seconds) if self.measured >= FIRST_STEPS else None
        if slow is not None:
            others = statistics.median(seconds[:slow] + seconds[slow + 1 :])
            warn(
                f"rank {slow} ({meeting().peers[slow][0]}) keeps the others waiting: {seconds[slow]:.3g} s a step of its own,"
                f" the others {others:.3g} s; look at what else runs there, at its disk and its clock"
            )
