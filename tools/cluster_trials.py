"""Interrupt runs on a real SLURM, kill what they are made of, and compare each with an undisturbed run. Prints a Markdown table.

    python -m tools.cluster_trials --speech ../shared/speech --sandbox ../shared/cluster/slurm-sandbox --out /tmp/trials

Each run is a small network on 2 nodes x 1 rank, submitted by launch.submit. Asked of each: it ends as done, metrics.jsonl
holds every step once with the undisturbed run's losses, and the final weights are bit-equal to the undisturbed run's.
`--sandbox` names the program that stops and starts a node; without it the trials that kill are left out, since the processes
of real nodes cannot be reached from here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from launch import submit
from shards.commands import Parser
from spknet.errors import run
from spknet.parallel.nodelist import expand
from spknet.train.metrics_log import read_metrics
from spknet.train.run_folder import read_state

SAVE_EVERY = 20  # steps
SHAPING = ("step", "loss", "accuracy", "lr")  # what must not depend on interruptions


@dataclass
class Outcome:
    """What became of one run."""

    kind: str
    states: list[str]  # of the job's lives, from sacct
    starts: list[int]  # step at which each life began
    state: str
    each_step_once: bool
    equal_losses: bool
    equal_weights: bool
    seconds: float
    free: float | None = None  # seconds from a death until the job has left its nodes

    @property
    def good(self) -> bool:
        return self.state == "done" and self.each_step_once and self.equal_losses and self.equal_weights


def words(speech: Path, run: Path, steps: int, trials: Path) -> list[str]:
    """spknet.train's words of a run that takes seconds."""
    options = {
        **{"data.train_list": speech / "train_list.txt", "data.train_root": speech, "data.workers": 0},
        **{"data.speakers_per_batch": 16, "data.utterances_per_speaker": 2, "data.crop_seconds": 0.5},
        **{"model.width": 0.125, "model.embedding_size": 32, "train.threads": 1, "train.max_steps": steps},
        **{"train.save_every_steps": SAVE_EVERY, "train.keep_checkpoints": 0, "log.every_steps": 1},
        **{"eval.trials": trials, "eval.root": speech, "eval.every_epochs": 0, "eval.crop_seconds": 0.5},
        "run_dir": run,
    }
    return [f"--{key}={value}" for key, value in options.items()]


def few_trials(speech: Path, out: Path, count: int = 60) -> Path:
    """The first lines of the development list, so that an evaluation takes a second."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "few_trials.txt"
    path.write_text("".join((speech / "dev_list.txt").read_text().splitlines(keepends=True)[:count]))
    return path


def submit_run(run_words: list[str], *cluster: str) -> str:
    """Submit on 2 nodes x 1 rank; the job's id. Raises RuntimeError with what launch.submit said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = submit.main(["--nodes", "2", "--cpus-per-rank", "1", *cluster, "--", *run_words])
    if status:
        raise RuntimeError(said.getvalue())
    run = run_words[-1].removeprefix("--run_dir=")
    return json.loads((Path(run) / "job.json").read_text())["job"]


def wait_for(what: str, seconds: float, reached: Callable[[], bool]) -> None:
    """Poll. Raises TimeoutError that says what was waited for."""
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.3)


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return lines[-1]["step"] if lines else 0


def command(*args: str) -> str:
    return subprocess.run(args, capture_output=True, text=True, check=True).stdout.strip()


def quietly(*args: str) -> None:
    command(*args)


def in_queue(job: str) -> bool:
    return bool(subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout.strip())


def victim(job: str, part: str, node: int) -> int:
    """Process number of a part of a running job: rank, torchrun, submitit or slurmstepd of a node of the sandbox."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            if not {f"SLURM_JOB_ID={job}", f"SLURM_NODEID={node}", "SLURM_STEP_ID=0"} <= set(variables):
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            kind = (
                "torchrun"
                if "torch.distributed.run" in words
                else "submitit"
                if "submitit.core._submit" in words
                else ""
            )
            kind = kind or ("rank" if "spknet.train" in words else "")
            if kind == part:
                return int(folder.name)
            if part == "slurmstepd" and kind == "submitit":
                return int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    raise LookupError(f"no {part} of job {job} on node {node}")


def its_nodes(job: str) -> list[str]:
    """The nodes that a job has not left yet."""
    said = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T %N"], capture_output=True, text=True).stdout.split()
    return expand(said[1]) if said and said[0] in ("RUNNING", "COMPLETING") else []


def kill_part(part: str, node: int) -> Callable[[str], float]:
    """What kills a part of a job and returns the seconds until its nodes are free."""

    def kill(job: str) -> float:
        os.kill(victim(job, part, node), signal.SIGKILL)
        begun = time.monotonic()
        wait_for("the nodes to be free", 120, lambda: not its_nodes(job))
        return time.monotonic() - begun

    return kill


def fail_node(sandbox: Path, node: str) -> Callable[[str], float]:
    """What stops a node, waits until the job has left the others, and starts it again; returns the seconds until then."""

    def fail(job: str) -> float:
        command(str(sandbox), "stop-node", node)
        begun = time.monotonic()
        wait_for("the other nodes to be free", 120, lambda: its_nodes(job) in ([], [node]))
        seconds = time.monotonic() - begun
        command(str(sandbox), "start-node", node)
        return seconds

    return fail


def interruptions(sandbox: Path | None) -> dict[str, tuple[list[str], Callable[[str], float | None] | None]]:
    """Name -> (launch.submit's options, what is done to the job once it trains; it may return the seconds to free nodes)."""

    usual = ["--hours", "0.5", "--signal-delay", "60"]
    kinds = {
        "signal USR2": (usual, lambda job: quietly("scancel", "--signal=USR2", job)),
        "scontrol requeue": (usual, lambda job: quietly("scontrol", "requeue", job)),
        "preemption": (
            [*usual, "--partition", "low"],
            lambda job: quietly(
                "sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"
            ),
        ),
        "time limit of a minute": (["--hours", "0.0167", "--signal-delay", "10"], None),
    }
    if sandbox is not None:
        for node in (0, 1):
            for part in ("rank", "torchrun", "submitit", "slurmstepd"):
                # Without a restart by torchrun, which would keep the nodes.
                restarts = ["--max-restarts", "0"] if part == "rank" else []
                kinds[f"{part} of node {node} killed"] = ([*usual, *restarts], kill_part(part, node))
            kinds[f"node {node} lost"] = (usual, fail_node(sandbox, f"node{node + 1}"))
    return kinds


def lives(job: str) -> list[str]:
    """How each life of the job ended (sacct lags by some seconds)."""
    said = command("sacct", "-j", job, "-X", "-D", "-n", "-P", "-o", "State")
    return [line.split()[0] for line in said.splitlines()]


def run_trial(
    kind: str,
    cluster: list[str],
    interrupt: Callable[[str], float | None] | None,
    run_words: list[str],
    reference: Path,
) -> Outcome:
    """One run from submission to its end, compared with the undisturbed run in `reference`."""
    run, begun = Path(run_words[-1].removeprefix("--run_dir=")), time.monotonic()
    job, free = submit_run(run_words, *cluster), None
    if interrupt is not None:
        # A signal loses nothing even before the first checkpoint; a dead node loses what follows the newest one.
        first = 2 * SAVE_EVERY if "lost" in kind else SAVE_EVERY // 2
        wait_for(f"{run} to train", 180, lambda: last_step(run) >= first)
        free = interrupt(job)
    ended = ("done", "failed")
    wait_for(f"the end of job {job}", 600, lambda: (read_state(run) or {}).get("state") in ended and not in_queue(job))
    wait_for("sacct", 30, lambda: lives(job)[-1] not in ("RUNNING", "PENDING", "COMPLETING"))
    starts = json.loads((run / "launch.json").read_text())["starts"]
    state = read_state(run)
    steps, expected = trained(run), {line["step"]: line for line in trained(reference)}
    return Outcome(
        kind=kind,
        states=lives(job),
        starts=[start["step"] for start in starts],
        state=state["state"],
        each_step_once=[line["step"] for line in steps] == list(range(1, state["step"] + 1)),
        equal_losses=all(line[key] == expected[line["step"]][key] for line in steps for key in SHAPING),
        equal_weights=equal_weights(run, reference, newest_common_checkpoint(run, reference)),
        seconds=time.monotonic() - begun,
        free=free,
    )


def trained(run: Path) -> list[dict]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "eval" not in line]


def newest_common_checkpoint(run: Path, other: Path) -> int:
    """Step of the newest checkpoint that both runs have; 0 where there is none."""
    names = [{path.stem for path in folder.glob("checkpoints/step-*.pt")} for folder in (run, other)]
    return max((int(name.removeprefix("step-")) for name in names[0] & names[1]), default=0)


def equal_weights(run: Path, other: Path, step: int) -> bool:
    """Whether model, loss and optimizer of two runs' checkpoints of a step are bit-equal."""
    paths = [folder / "checkpoints" / f"step-{step:08d}.pt" for folder in (run, other)]
    if not all(path.exists() for path in paths):
        return False
    one, two = (torch.load(path, weights_only=True) for path in paths)
    return all(same(one[key], two[key]) for key in ("model", "loss", "optimizer"))


def same(a, b) -> bool:
    """Equality of nested dicts, lists, tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def table(outcomes: list[Outcome]) -> str:
    rows = [
        (
            "interruption",
            "lives of the job",
            "began at step",
            "ended",
            "each step once",
            "losses",
            "weights",
            "free s",
            "seconds",
        )
    ]
    rows.append(("---",) * len(rows[0]))
    for o in outcomes:
        verdicts = ["equal" if equal else "DIFFERENT" for equal in (o.equal_losses, o.equal_weights)]
        once = "yes" if o.each_step_once else "NO"
        starts = ", ".join(map(str, o.starts))
        free = "" if o.free is None else f"{o.free:.0f}"
        rows.append((o.kind, ", ".join(o.states), starts, o.state, once, *verdicts, free, f"{o.seconds:.0f}"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where a run was not what it should be."""
    parser = Parser(
        prog="python -m tools.cluster_trials", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path, required=True, help="folder with train_list.txt and dev_list.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; must be new")
    parser.add_argument("--sandbox", type=Path, help="program with stop-node and start-node")
    parser.add_argument(
        "--steps", type=int, default=100, help="of a run; the one against the time limit has four times that"
    )
    parser.add_argument("--only", nargs="+", help="some of the interruptions")
    options = parser.parse_args(argv)
    speech, out = options.speech.absolute(), options.out.absolute()
    out.mkdir(parents=True)
    trials, kinds = few_trials(speech, out), interruptions(options.sandbox)
    reference = out / "undisturbed"
    longest = 4 * options.steps if not options.only or "time limit of a minute" in options.only else options.steps
    outcomes = []
    for kind, (cluster, interrupt) in {"none": (["--hours", "0.5"], None), **kinds}.items():
        if options.only and kind not in ("none", *options.only):
            continue
        run = reference if kind == "none" else out / kind.replace(" ", "-")
        steps = longest if kind in ("none", "time limit of a minute") else options.steps
        outcomes.append(run_trial(kind, cluster, interrupt, words(speech, run, steps, trials), reference))
        print(outcomes[-1], file=sys.stderr, flush=True)
    print(table(outcomes))
    return int(not all(o.good for o in outcomes))


if __name__ == "__main__":
    sys.exit(run(main))
