"""A run, from the command line to the last checkpoint, read from top to bottom.

    python -m spknet.train --config fast_resnet34_angleproto --data.train_shards shards/vox2 --run_dir runs/a
    torchrun --nproc_per_node 8 -m spknet.train --config ...        the same run on 8 GPUs
    srun --ntasks-per-node 8 python -m spknet.train --config ...    the same run, one task a GPU

Every step is a function of its number: batch, crops, augmentation, learning rate and margin. A run that continues from a
checkpoint at step k therefore needs the weights, the optimizer's moments and k. What is written where: spknet/train/run_folder.py,
log.py, checkpoint.py.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from spknet import config as configuration
from spknet import rng
from spknet.checkpoints import file as checkpoint
from spknet.config import Config
from spknet.data.batches import Corpus, loader
from spknet.evaluate import evaluation as evaluate
from spknet.evaluate.lists import on_first
from spknet.losses import build_loss
from spknet.models import build_model
from spknet.parallel import ranks as distributed
from spknet.parallel.batchnorm import globalize
from spknet.parallel.gather import all_reduce_sum
from spknet.parallel.ranks import Ranks, Watchdog
from spknet.train import run_folder as run
from spknet.train import voxceleb_trainer as legacy
from spknet.train.metrics_log import Meter, MetricsLog, profiler
from spknet.train.optim import build_optimizer, finite_gradients, learning_rate, margin
from spknet.train.run_folder import StopSignals, write_state
from spknet.train.step import SpeakerTask, prepare, step_at_once, step_in_chunks, train_batchnorm


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; the message names step, rank and utterances."""


class Trainer:
    """The state of a run on one rank."""

    def __init__(self, config: Config, me: Ranks):
        self.config, self.me, self.run_dir = config, me, Path(config.run_dir)
        self.corpus = Corpus.open(config.data, config.train.seed)
        distributed.agree({"the training data": self.corpus.fingerprint()}, me)
        self.lists = on_first(lambda: evaluate.check(config), share=False)  # once for all evaluations
        self.steps_per_epoch = self.corpus.sampler.steps
        self.total_steps = min(config.train.epochs * self.steps_per_epoch, config.train.max_steps or math.inf)
        self.dtype = torch.float64 if config.train.precision == "float64" else torch.float32
        self.samples = round(config.data.crop_seconds * self.corpus.utterances.sample_rate)
        model = build_model(config.model, self.corpus.utterances.sample_rate)
        loss = build_loss(
            config.loss, config.model.embedding_size, self.corpus.n_classes, config.data.utterances_per_speaker
        )
        rng.initialize(model, config.train.seed)
        rng.initialize(loss, config.train.seed)
        if config.train.sync_batchnorm and me.world_size > 1:
            model = globalize(model)
        self.task = SpeakerTask(model, loss, config.data.utterances_per_speaker, config.train.precision)
        self.task.to(me.device, self.dtype)
        if config.train.channels_last:
            self.task.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(config.optim, self.task.parameters())
        self.scaler = torch.amp.GradScaler(me.device.type, enabled=config.train.precision == "fp16")

        self.step = 0  # optimizer steps done
        self.window = {"loss": 0.0, "accuracy": 0.0, "steps": 0}  # sums since the last logged step
        self.best: dict | None = None  # {"step", "dev_eer"}
        self.seconds = 0.0  # of training, evaluation and saving apart
        self._resume_or_initialize()
        self.saved_step, self.saved_at = self.step, time.monotonic()

        if config.train.compile:
            model.compile()
        self.parallel = self.task if config.train.chunk else distributed.data_parallel(self.task, me)

    def _resume_or_initialize(self) -> None:
        c, state = self.config.train, None
        if c.resume == "auto":
            found = checkpoint.newest(self.run_dir, warn=self.say) if self.me.first else None
            path = distributed.broadcast(str(found[0]) if found else None, self.me)
            state = found[1] if found else checkpoint.read(path) if path else None
        elif c.resume != "never":
            path = c.resume
            state = checkpoint.read(path)
        if state is not None:
            checkpoint.check_resume(state, path, self.config, self.corpus.fingerprint())
            self._load(state)
            self.say(f"continuing {path} at step {self.step}")
        elif c.initial_model:
            for note in legacy.load_initial(self.task, c.initial_model, self.corpus, c.allow_partial):
                self.say(note)

    def _load(self, state: dict) -> None:
        self.task.model.load_state_dict(state["model"])
        self.task.loss.load_state_dict(
            checkpoint.load_head_by_speaker(self.task.loss, state, self.speakers(), self.corpus.utterances.labels)
            if state["data_fingerprint"] != self.corpus.fingerprint()
            else state["loss"]
        )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.window, self.best, self.seconds = (state[k] for k in ("step", "window", "best", "seconds"))

    def state(self) -> dict:
        """What a checkpoint holds."""
        return {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "config": configuration.to_dict(self.config),
            "model": self.task.model.state_dict(),
            "loss": self.task.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"name": self.config.optim.schedule, "step": self.step},
            "scaler": self.scaler.state_dict(),
            "speakers": self.speakers(),
            "dev_speakers": [name for name, out in zip(self.speakers(), self.corpus.kept_out) if out],
            "labels": self.corpus.utterances.labels.tolist(),
            "data_fingerprint": self.corpus.fingerprint(),
            "versions": run.versions(),
            "window": self.window,
            "best": self.best,
            "seconds": self.seconds,
        }

    def speakers(self) -> list[str]:
        return [str(name) for name in self.corpus.utterances.speakers]

    def say(self, message: str) -> None:
        if self.me.first:
            tqdm.write(message, file=sys.stderr)

    def save(self) -> None:
        """Writes the checkpoint of this step on rank 0; every rank returns when it is durable."""
        with distributed.first_rank_only(self.me) as first:
            if first:
                self.watchdog.saves(self.step)
                self.log.sync()
                best = self.best and self.best["step"]
                checkpoint.save(self.run_dir, self.state(), self.config.train.keep_checkpoints, best)
                write_state(self.run_dir, "running", self.step)
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def evaluate(self) -> None:
        """Evaluates the network as it is, on all ranks; a better development EER makes this step the best checkpoint."""
        self.watchdog.pause()
        folder = self.run_dir / "eval" / f"step-{self.step:08d}"
        # Whole utterances differ in length, and each length would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            result = evaluate.evaluate_network(
                self.task.model, self.config, out_dir=folder, step=self.step, trials=self.lists
            )
        result = distributed.broadcast(result, self.me)
        if result.get("dev_eer") is not None and (self.best is None or result["dev_eer"] < self.best["dev_eer"]):
            self.best = {"step": self.step, "dev_eer": result["dev_eer"]}
            self.save()
        if self.me.first:
            self.log.write({"step": self.step, "epoch": self.step / self.steps_per_epoch, "eval": result})
            self.log.add_picture("eval/det", folder / "det.png", self.step)
            if "eer" in result:  # not with unlabelled lists only
                self.say(f"step {self.step}: EER {result['eer']:.2f} %, minDCF(0.01) {result['min_dcf_p01']:.3f}")

    def evaluation_due(self) -> bool:
        c = self.config.eval
        if not (c.trials or c.dev_trials):
            return False
        every = max(1, round(c.every_epochs * self.steps_per_epoch)) if c.every_epochs else self.total_steps
        return self.step == self.total_steps or (self.step > 0 and self.step % every == 0)

    def train(self, log: MetricsLog, watchdog: Watchdog, stop: StopSignals) -> str | None:
        """Runs to the last step. Returns the name of the signal that stopped it before, or None."""
        self.log, self.watchdog = log, watchdog
        if (
            self.step > 0
            and self.evaluation_due()
            and not distributed.broadcast(log and log.has_evaluation(self.step), self.me)
        ):
            self.evaluate()  # the run died between this step's checkpoint and its evaluation
        batches = iter(loader(self.config, self.corpus, self.me, self.step, self.total_steps))
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=not self.me.first, mininterval=1)
        self.task.train()
        if self.config.train.chunk and train_batchnorm(self.task.model):
            self.say(f"train.chunk: BatchNorm's statistics are those of {self.config.train.chunk} utterances a rank")
        meter = Meter()
        with bar, profiler(self.run_dir, self.config.train.profile and self.me.first) as trace:
            watchdog.waits(self.step)
            while self.step < self.total_steps:
                meter.wait_begins()
                batch = next(batches)
                meter.wait_ends()
                watchdog.computes(self.step)
                loss, accuracy, asked = self.train_step(batch, stop)
                self.step += 1
                bar.update()
                if trace is not None:
                    trace.step()
                self.window["loss"] += loss
                self.window["accuracy"] += accuracy
                self.window["steps"] += 1
                watchdog.waits(self.step)
                if self.step % self.config.log.every_steps == 0 or self.step == self.total_steps:
                    self.write_metrics(meter, bar)
                if asked["stop"] or asked["save"] or self.step == self.total_steps or self._save_step():
                    self.seconds += meter.pause()
                    self.save()
                    meter.resume()
                    watchdog.waits(self.step)
                if asked["stop"]:
                    return stop.received or "a signal to another rank"
                if self.evaluation_due():
                    self.seconds += meter.pause()
                    self.evaluate()
                    self.task.train()
                    meter.resume()
                    watchdog.waits(self.step)
        return None

    def train_step(self, batch, stop: StopSignals) -> tuple[float, float, dict[str, bool]]:
        """One optimizer step. Returns the global loss and accuracy and what some rank asks for: stop, save."""
        c = self.config
        rate = learning_rate(c.optim, self.step, self.steps_per_epoch, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.task.loss.margin = margin(c.loss, self.step)
        inputs = prepare(batch, self.samples, self.dtype, self.me.device)
        self.optimizer.zero_grad(set_to_none=True)
        if c.train.chunk:
            loss, accuracy = step_in_chunks(self.task, inputs, self.scaler.scale, c.train.chunk, self.me)
        else:
            loss, accuracy = step_at_once(self.parallel, inputs, self.scaler.scale)

        finite = torch.isfinite(loss)
        if not self.scaler.is_enabled():  # with float16 the scaler skips such a step
            finite &= finite_gradients(self.task.parameters())
        due = self.me.first and time.monotonic() - self.saved_at > 60 * c.train.save_every_minutes
        own = [loss.double(), accuracy.double(), stop.received is not None, due, ~finite]
        told = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.me.device) for x in own])
        total = all_reduce_sum(told).tolist()
        if total[4]:
            self._report_non_finite(float(loss), batch)
        self.scaler.unscale_(self.optimizer)
        if c.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.task.parameters(), c.optim.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.task.loss.clamp_()
        world = self.me.world_size
        return total[0] / world, total[1] / world, {"stop": total[2] > 0, "save": total[3] > 0}

    def _report_non_finite(self, loss: float, batch) -> None:
        names = [self.corpus.utterances.key(row) for row in batch.rows.tolist()]
        every = distributed.gather_objects((loss, names), self.me)
        bad = [rank for rank, (value, _) in enumerate(every) if not math.isfinite(value)]
        if not bad:
            raise NonFiniteLoss(
                f"the gradient of step {self.step} is not finite, though its loss is ({every[0][0]:g} on rank 0); the checkpoint"
                f" of step {self.saved_step} is kept. Lower --optim.lr, or give --optim.clip_norm"
            )
        raise NonFiniteLoss(
            f"the loss of step {self.step} is {every[bad[0]][0]} on rank {bad[0]}; the checkpoint of step {self.saved_step} is"
            f" kept. Its utterances: {' '.join(every[bad[0]][1])}. Lower --optim.lr, or look at these recordings"
        )

    def _save_step(self) -> bool:
        every = self.config.train.save_every_steps
        return every > 0 and self.step % every == 0 and self.step != self.saved_step

    def write_metrics(self, meter: Meter, bar) -> None:
        n = self.window["steps"]
        loss, accuracy = self.window["loss"] / n, self.window["accuracy"] / n
        self.window = {"loss": 0.0, "accuracy": 0.0, "steps": 0}
        per_step = self.config.data.speakers_per_batch * self.config.data.utterances_per_speaker
        speed, waited = meter.read(n * per_step)
        if self.log is not None:
            seconds = self.seconds + meter.elapsed()
            self.log.write(
                {
                    "step": self.step,
                    "epoch": self.step / self.steps_per_epoch,
                    "loss": loss,
                    "accuracy": accuracy,
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "utterances_per_second": speed,
                    "data_wait_fraction": waited,
                    "seconds": seconds,
                }
            )
        bar.set_postfix_str(f"loss {loss:.3f} accuracy {accuracy:.1f} % {speed:.0f} utterances/s", refresh=False)
