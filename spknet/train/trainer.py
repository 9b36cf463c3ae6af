"""A run on one rank, read from top to bottom: batch, forward, backward, step.

Every step is a function of its number: batch, crops, augmentation, learning rate and margin. A run that continues from a
checkpoint at step k therefore needs the weights, the optimizer's moments and k. What watches the training (log, bar, saving,
evaluation) hangs on its side: spknet/train/sidelines.py. The command is spknet/train/__main__.py.

    trainer = Trainer(config, me); trainer.resume()
    with Sidelines(trainer, ...) as side: trainer.train(side)
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spknet import config as configuration
from spknet import rng
from spknet.checkpoints import file as checkpoint
from spknet.checkpoints import pieces, voxceleb_trainer_state
from spknet.checkpoints.head_rows import load_head_by_speaker
from spknet.checkpoints.initial import load_initial
from spknet.checkpoints.resume import check_resume, load_optimizer
from spknet.config import Config
from spknet.data.batches import Batch, Batches
from spknet.data.corpus import Corpus
from spknet.evaluate import evaluation
from spknet.evaluate.lists import Lists
from spknet.losses import build_loss
from spknet.losses.sharded import Sharded
from spknet.messages import say, warn
from spknet.models import build_model
from spknet.parallel.batchnorm import check_groups, globalize
from spknet.parallel.gradients import AveragedGradients
from spknet.parallel.ranks import Ranks
from spknet.parallel.together import agree, gather_objects, on_first, together
from spknet.train import run_folder
from spknet.train.averaging import Averaging
from spknet.train.optim import build_optimizer, clip_gradients, learning_rate, margin, set_rate, total_norm
from spknet.train.step import SpeakerTask, prepare, step_at_once, step_in_chunks, train_batchnorm
from spknet.train.told import Told

if TYPE_CHECKING:
    from spknet.train.sidelines import Sidelines


class Trainer:
    """The state of a run on one rank: data, network, loss, optimizer, and the number of steps done."""

    def __init__(self, config: Config, me: Ranks):
        self.config, self.me = config, me
        with together("opening the data"):
            self.corpus = Corpus.open(config.data, config.train.seed, config.augment)
        agree({"the training data": self.corpus.fingerprint()})
        self.sample_rate = self.corpus.utterances.sample_rate
        look = partial(evaluation.check, config, sample_rate=self.sample_rate)
        self.lists: Lists | None = on_first("reading the trial lists", look, share=False)  # once for all evaluations
        self.steps_per_epoch = self.corpus.sampler.steps
        self.total_steps = min(config.train.epochs * self.steps_per_epoch, config.train.max_steps or math.inf)
        self.dtype = torch.float64 if config.train.precision == "float64" else torch.float32
        self.samples = round(config.data.crop_seconds * self.sample_rate)
        with together("building the network"):
            self._build()
        self.step, self.saved_step = 0, 0  # optimizer steps done; of the newest checkpoint, 0: there is none
        self.window = {"loss": 0.0, "accuracy": 0.0, "steps": 0}  # sums since the last logged step
        self.told: Told | None = None  # what the last step told, not read yet
        self.asked = [False, False]  # whether some rank asks for a stop, for a checkpoint
        self.best: dict | None = None  # {"step", "dev_eer"}
        self.seconds = 0.0  # of training, evaluation and saving apart

    def _build(self) -> None:
        c, per_speaker = self.config, self.config.data.utterances_per_speaker
        model = build_model(c.model, self.sample_rate, c.features)
        loss = build_loss(c.loss, c.model.embedding_size, self.corpus.n_classes, per_speaker)
        rng.initialize(model, c.train.seed)
        rng.initialize(loss, c.train.seed)
        check_groups(c.train.batchnorm_groups, c.data.speakers_per_batch)
        if c.train.sync_batchnorm and (self.me.world_size > 1 or c.train.batchnorm_groups != 1):
            model = globalize(model, c.train.batchnorm_groups)
        self.task = SpeakerTask(model, loss, per_speaker, c.train.precision).to(self.me.device, self.dtype)
        if c.train.channels_last:
            self.task.to(memory_format=torch.channels_last)
        self.task.freeze(c.train.frozen)
        half = self.task.half is not None
        self.optimizer = build_optimizer(c.optim, model.parameters(), loss.parameters(), loss.shards(), half)
        self.scaler = torch.amp.GradScaler(self.me.device.type, enabled=c.train.precision == "fp16")
        self.averaging = Averaging(c.train, self.task, self.steps_per_epoch, self.total_steps)
        self.gradients = AveragedGradients(self.task.parameters())
        if c.train.compile:
            model.compile(mode=c.train.compile_mode)

    def resume(self) -> None:
        """Continues the run's newest checkpoint, or starts from other weights, as train.resume and initial_model say."""
        c = self.config.train
        path, state = self._starting_point()
        self.continues = path
        with together("reading the checkpoint"):
            if path is not None:
                notes = check_resume(state, path, self.config, self.corpus.fingerprint(), self.facts())
                self._load(state, path)
                for note in [f"continuing {path} at step {self.step}", *notes]:
                    say(note)
            elif c.initial_model:
                how = (c.allow_partial, c.initial_weights)
                notes = load_initial(self.task, c.initial_model, self.corpus, *how)
                if voxceleb_trainer_state.is_of_run(c.initial_model, self.config.run_dir):
                    args = (c.initial_model, self.task, self.optimizer)
                    epoch, more = voxceleb_trainer_state.continue_from(*args)
                    self.step, notes = epoch * self.steps_per_epoch, notes + more
                for note in notes:
                    say(note)

    def _starting_point(self) -> tuple[Path, dict] | tuple[None, None]:
        """The checkpoint to go on from and what is in it, when all of its files are whole; (None, None) to begin."""
        resume, run_dir, below = self.config.train.resume, self.config.run_dir, math.inf
        while True:
            look = partial(_newest_or_named, resume, run_dir, below)
            path = on_first("looking for the newest checkpoint", look)
            if path is None:
                return None, None
            with together("reading the checkpoint"):
                state = checkpoint.read(path)
                own = pieces.damages(Path(path), state)
            damages = sum(gather_objects(own), [])
            with together("reading the checkpoint"):
                if damages and path == resume:
                    raise checkpoint.CheckpointError(f"{damages[0]}; use an earlier checkpoint")
            if not damages:
                return Path(path), state
            for damage in damages:
                warn(f"{damage} (using the one before it)")
            below = state["step"]

    def _load(self, state: dict, path: Path) -> None:
        checkpoint.load_weights(self.task.model, state["model"], f"{path}: the network")
        labels, loss = self.corpus.utterances.labels, self.task.loss
        ours = (self.speakers(), labels, self.corpus.classes_per_speaker)
        moved = (state["speakers"], state["labels"]) != (ours[0], labels.tolist())
        if isinstance(loss, Sharded):
            classes = pieces.classes_by_speaker(state, loss.n_classes, *ours) if moved else None
            trained = sum(p.requires_grad for p in self.task.model.parameters())
            pieces.resume(loss, trained, self.optimizer, path, state, classes)
        elif "head" in state:
            raise checkpoint.CheckpointError(f"{path} has a head in pieces: continue with --loss.sharded true")
        else:
            rows = load_head_by_speaker(loss, state, *ours) if moved else state["loss"]
            checkpoint.load_weights(loss, rows, f"{path}: the loss")
            load_optimizer(self.optimizer, state["optimizer"], path)
        if state["scaler"]:  # empty where the precision was another one
            self.scaler.load_state_dict(state["scaler"])
        averages = state.get("averaging")
        if moved and averages and averages["steps"]:
            say("the averages of weights begin anew: the speakers are others")
        self.averaging.load(None if moved else averages)
        self.step, self.window, self.best, self.seconds = (state[k] for k in ("step", "window", "best", "seconds"))

    def facts(self) -> dict:
        """What a resume compares: it changes the last bits, and is no option."""
        return {"CPU threads": torch.get_num_threads(), "torch": str(torch.__version__), "ranks": self.me.world_size}

    def state(self) -> dict:
        """What a checkpoint holds, a head in pieces apart."""
        return {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "config": configuration.to_dict(self.config),
            "sample_rate": self.sample_rate,
            "model": self.task.model.state_dict(),
            "loss": self.task.loss.state_dict(),
            "averaging": self.averaging.state(),
            "optimizer": pieces.optimizer_state(self.optimizer, self.task.loss),
            "scheduler": {"name": self.config.optim.schedule, "step": self.step},
            "scaler": self.scaler.state_dict(),
            "speakers": self.speakers(),
            "dev_speakers": [name for name, out in zip(self.speakers(), self.corpus.kept_out) if out],
            "labels": self.corpus.utterances.labels.tolist(),
            "data_fingerprint": self.corpus.fingerprint(),
            "versions": run_folder.versions(),
            "facts": self.facts(),
            "window": self.window,
            "best": self.best,
            "seconds": self.seconds,
        }

    def speakers(self) -> list[str]:
        return [str(name) for name in self.corpus.utterances.speakers]

    def train(self, side: Sidelines) -> str | None:
        """Runs to the last step. Returns the name of the signal that stopped it before, or None."""
        c = self.config.train
        if side.stopped:
            return side.stopped_by()
        self.task.train()
        if c.chunk and train_batchnorm(self.task.model):
            say(f"train.chunk: BatchNorm's statistics are those of {c.chunk} utterances a rank")
        with Batches(self.config, self.corpus, self.me, self.step, self.total_steps) as batches:
            for batch in side.watched(batches):
                self._set_rates(batch)
                inputs = prepare(batch, self.samples, self.dtype, self.me.device)
                self.gradients.clear()
                for rows in self.task.loss.shards():  # this rank's alone, and so not among those above
                    rows.grad = None
                how, begins = (self.task, inputs, self.scaler.scale, self.gradients), side.meter.begins
                loss, accuracy = step_in_chunks(*how, c.chunk, begins) if c.chunk else step_at_once(*how, begins)
                self.settle()  # of the step before: the device computes this one meanwhile
                side.meter.begins("optimizer")
                self._update(loss, accuracy, side, batch, inputs[0])
                if side.after_step():
                    return side.stopped_by()
        return None

    def _set_rates(self, batch: Batch) -> None:
        c = self.config
        utterances = c.data.speakers_per_batch * c.data.utterances_per_speaker
        set_rate(self.optimizer, learning_rate(c.optim, self.step, self.steps_per_epoch, self.total_steps, utterances))
        self.task.loss.margin, self.task.loss.step = margin(c.loss, self.step, self.steps_per_epoch), self.step
        self.task.loss.classes = batch.classes

    def _update(self, loss, accuracy, side: Sidelines, batch: Batch, waves) -> None:
        """The optimizer's step. What the ranks tell of it is read later (`settle`)."""
        with self.task.loss.updating(self.optimizer) as shards:
            parameters, scaled = list(self.task.parameters()), self.scaler.is_enabled()
            finite, norm = torch.isfinite(loss), None
            sound = finite
            if shards or not scaled:
                norm = total_norm(parameters)
                sound = torch.isfinite(norm) & torch.isfinite(total_norm(shards)) if shards else torch.isfinite(norm)
            if not scaled:  # with float16 the scaler skips such a step
                finite = finite & sound
            self.told = Told(self.step, loss, accuracy, [~finite, ~sound], side.asks(), (batch, waves))
            if scaled:  # not sound on some rank, perhaps in its pieces of the head alone: every rank skips the step
                norm, unsound = None, self.told.sums[3] > 0
                next(p.grad for p in [*parameters, *shards] if p.grad is not None).masked_fill_(unsound, torch.inf)
            self.scaler.unscale_(self.optimizer)
            limit = self.config.optim.clip_norm
            if limit:
                clip_gradients(parameters, shards, self.task.loss.squared_gradient(), limit, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.task.loss.clamp_()
        self.step += 1
        self.averaging.update(self.step)

    def settle(self) -> None:
        """Reads what the last step told, unless that was done. Raises NonFiniteLoss on all ranks."""
        if self.told is None:
            return
        told, self.told = self.told, None
        loss, accuracy, infinite, _, *asked = told.read()
        if infinite:
            self.step = told.step
            told.raise_non_finite(self.corpus.utterances.key, self.saved_step)
        self.window["loss"] += loss / self.me.world_size
        self.window["accuracy"] += accuracy / self.me.world_size
        self.window["steps"] += 1
        self.asked = [before or count > 0 for before, count in zip(self.asked, asked)]

    def saved(self) -> None:
        """This step's checkpoint is durable."""
        self.saved_step, self.saved_at = self.step, time.monotonic()
        self.asked[1] = False


def _newest_or_named(resume: str, run_dir: str, below: float) -> str | None:
    """The checkpoint to go on from; a start that carries on with an interrupted one always takes the newest."""
    if resume == "auto" or run_folder.carries_on(run_dir):
        match = checkpoint.newest(run_dir, warn, below)
        if match or resume in ("auto", "never"):
            return str(match[0]) if match else None
    return None if resume == "never" else resume
