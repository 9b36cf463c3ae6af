"""Run folders written by hand, as the trainer and the launcher leave them."""

import json
import time
from pathlib import Path

import yaml

from spknet.train.run_folder import write_state


def write_run(folder: Path, state: str, steps=(), evaluation=None, reason="") -> None:
    """A run folder as the trainer leaves it: 8 x 2 utterances a step, 50 steps an epoch, 4 epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    write_state(folder, state, steps[-1] if steps else 0, reason)
    lines = [{"step": s, "epoch": s / 50, "loss": 1.0, "utterances_per_second": 32.0} for s in steps]
    lines += [{"step": steps[-1], "epoch": steps[-1] / 50, "eval": evaluation}] if evaluation else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"train": {"epochs": 4, "max_steps": None}, "data": {"speakers_per_batch": 8, "utterances_per_speaker": 2}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def note_job(folder: Path, job: str, executor: str = "slurm", log: Path | None = None, age: float = 0.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    note = {"job": job, "executor": executor, "log": str(log), "time": time.time() - age}
    (folder / "job.json").write_text(json.dumps(note))


def write_sweep(folder: Path, runs: dict[str, dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    said = {name: {"overrides": overrides, "words": []} for name, overrides in runs.items()}
    (folder / "sweep.json").write_text(json.dumps({"runs": said}))
