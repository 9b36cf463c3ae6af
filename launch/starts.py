"""RUN/launch.json: every start of a run, how it ended, on which nodes; when to stop trying, and which node to avoid.

    {"starts": [{"job": "812", "step": 400, "time": 1.7e9, "nodes": ["gpu1", "gpu2"], "environment": {"NCCL_DEBUG": "INFO"},
                 "ended": "died", "blamed": ["gpu2"]}, ...]}

`ended` says why a start was over before the run was:

    signal   told to save: a time limit, a preemption, a cancel        never counted
    lost     a node was lost, or SLURM requeued the job                never counted
    died     a rank, torchrun or the task ended without a word         three in a row at one step end the run as failed
    stalled  no step within train.timeout_seconds                      six in a row at one step do

A node that was blamed twice is excluded from the job's next start.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from spknet.train.run_folder import read_state, write_json

LIMITS = {"died": 3, "stalled": 6}  # starts in a row from one checkpoint
SIGNALLED = ("SIG", "a signal to another rank")  # how the reason of a run begins that was told to stop
BLAMED_TWICE = 2
# What of the environment shapes how ranks talk: recorded, so that a slow or hanging run can be explained later.
RECORDED = (
    "NCCL_",
    "TORCH_NCCL_",
    "TORCH_FR_",
    "GLOO_",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "SLURM_CPUS_PER_TASK",
)


def read_starts(run: str | Path) -> list[dict]:
    """The starts noted in RUN/launch.json, none where it is missing or damaged."""
    try:
        starts = json.loads((Path(run) / "launch.json").read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [s for s in starts if isinstance(s, dict)] if isinstance(starts, list) else []


def note_start(run: str | Path, job: str, nodes: list[str], environment: dict[str, str], ranks: int = 1) -> None:
    """Append a start: newest checkpoint, nodes with `ranks` each, variables that shape communication."""
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    shown = {key: environment[key] for key in sorted(environment) if key.startswith(RECORDED)}
    before = (read_state(run) or {}).get("time")
    start = {
        "job": job,
        "step": newest_checkpoint_step(run),
        "time": time.time(),
        "nodes": nodes,
        "ranks_per_node": ranks,
        "state_time": before,
    }
    write_json(run / "launch.json", {"starts": [*read_starts(run), {**start, "environment": shown}]})


def said_since_start(run: str | Path) -> dict | None:
    """state.json, if it was written after the newest start; None if all it holds is an earlier start's word."""
    said, starts = read_state(run), read_starts(run)
    return said if said and (not starts or said.get("time") != starts[-1].get("state_time")) else None


def note_end(run: str | Path, ended: str, blamed: list[str] = ()) -> None:
    """How the newest start ended, if nobody has said it yet."""
    starts = read_starts(run)
    if starts and "ended" not in starts[-1]:
        starts[-1] |= {"ended": ended, "blamed": list(blamed)}
        write_json(Path(run) / "launch.json", {"starts": starts})


def cause(said: dict | None) -> str:
    """`ended` of a start whose last word in state.json is `said`."""
    reason = (said or {}).get("reason", "")
    if (said or {}).get("state") != "requeue":
        return "died"
    if "no step finished" in reason:
        return "stalled"
    return "signal" if reason.startswith(SIGNALLED) else "died"


def without_progress(run: str | Path) -> str:
    """Why the run should not be started again by this job, or an empty string."""
    starts = read_starts(run)
    if not starts:
        return ""
    last = starts[-1]
    here = []
    for start in reversed(starts):
        if (start["job"], start["step"]) != (last["job"], last["step"]):
            break
        here.append(start.get("ended"))
    if newest_checkpoint_step(run) > last["step"]:
        return ""
    for ended, limit in LIMITS.items():
        if here.count(ended) >= limit:
            return (
                f"no progress: job {last['job']} has started {limit} times at step {last['step']} and {ended} each time"
            )
    return ""


def bad_nodes(run: str | Path) -> list[str]:
    """Nodes blamed for at least two starts, sorted."""
    blamed = [node for start in read_starts(run) for node in start.get("blamed", [])]
    return sorted(node for node in set(blamed) if blamed.count(node) >= BLAMED_TWICE)


def newest_checkpoint_step(run: str | Path) -> int:
    """Step of the newest RUN/checkpoints/step-NNNNNNNN.pt, 0 where there is none."""
    names = (p.stem for p in Path(run).glob("checkpoints/step-*.pt"))
    return max((int(n.removeprefix("step-")) for n in names if n.removeprefix("step-").isdigit()), default=0)
