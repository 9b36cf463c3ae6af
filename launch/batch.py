"""What a batch script does around srun, on the first node, outside of any container: may the run start, and what its end means.

    python -m launch.batch begin RUN || exit        refuse a run that another job has; note the start in RUN/launch.json
    python -m launch.batch watch RUN &              kill an srun that waits for a dead slurmstepd
    srun ...
    python -m launch.batch end RUN                  requeue the job, leave bad nodes out, or end it; its exit status is the job's

In submitit's script `--submitted FOLDER` stands for RUN: the runs of the job are those of its pickle.

The script asks for the requeue and nothing below it does, so that a killed task, torchrun or srun ends as any other death.
Where the script is lost with its node, the tasks of the other nodes take its place (take_over).

    done      the job is over                                 failed    an error of the run: never requeued
    requeue   saved on a signal: requeue                      running   the ranks are gone without a word: requeue
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from launch import jobs, starts
from launch.log_text import blamed_hosts, killed_ranks
from launch.processes import descendants, kill, wait
from spknet.errors import UserError, run
from spknet.parallel.nodelist import expand
from spknet.train.run_folder import job_id, read_state, write_state

SECONDS_TO_LEAVE = 60  # SLURM kills the script of a requeued job in that time
OVER_SECONDS = 16  # longer than a restart by torchrun takes to say `running` again
REFUSED = 2
TRIES = 3  # a slurmd that is started again answers after a second
CONNECT_SECONDS = 3  # a lost host does not even refuse


def begin(runs: list[Path], ranks_per_node: int) -> int:
    """0 where the job may train; 2 where another job has a run, which is then left as it is."""
    job, nodes = os.environ["SLURM_JOB_ID"], expand(os.environ["SLURM_JOB_NODELIST"])
    for folder in runs:
        holder = jobs.holder_of(folder, own_names())
        if holder is not None:
            print(f"{folder} belongs to {holder}; job {job} ends without touching it", file=sys.stderr)
            return REFUSED
    for folder in runs:
        _note_lost_nodes(folder, job)
        starts.note_start(folder, job, nodes, dict(os.environ), ranks_per_node)
        if str(jobs.read_job(folder).get("job")) not in own_names():
            folder.mkdir(parents=True, exist_ok=True)
            jobs.note_job(folder, job=job, executor="slurm", log=_log(job), cwd=os.getcwd())
    bad = [node for folder in runs for node in starts.bad_nodes(folder) if node in nodes]
    if bad and _enough_without(bad):
        for folder in runs:
            starts.note_end(folder, "lost")
        requeue(job, bad)
    return 0


def end(runs: list[Path]) -> int:
    """Exit status of the job. Does not return where the job is requeued."""
    job = os.environ["SLURM_JOB_ID"]
    said = {folder: starts.said_since_start(folder) for folder in runs}
    again = [folder for folder in runs if (said[folder] or {}).get("state") not in ("done", "failed")]
    if again and jobs.state_of(job) != "RUNNING":
        print(f"job {job} was cancelled, or requeued by SLURM itself", file=sys.stderr)
        return 1
    for folder in list(again):
        told = starts.read_starts(folder)[-1:] or [{}]
        # Neither a word of the run nor a signal: what would not start now would not start in the next life, either.
        why = "" if said[folder] or "ended" in told[0] else "it ended before it started; the job's log says why"
        starts.note_end(folder, starts.cause(said[folder]), blamed(folder, said[folder]))
        why = why or starts.without_progress(folder)
        if why and jobs.holder_of(folder, own_names()) is None:
            print(f"{folder}: {why}", file=sys.stderr)
            again.remove(folder)
            if (read_state(folder) or {}).get("state") != "done":
                write_state(folder, "failed", starts.newest_checkpoint_step(folder), why)
    for folder in runs:
        shown = (starts.said_since_start(folder) or {"state": "silent"})["state"]
        print(f"{folder} is '{shown}'" + (", to be continued" if folder in again else ""), file=sys.stderr)
    if again:
        bad = sorted({node for folder in runs for node in starts.bad_nodes(folder)})
        requeue(job, bad if _enough_without(bad) else [])
    return int(any((starts.said_since_start(folder) or {}).get("state") != "done" for folder in runs))


def take_over(runs: list[Path]) -> None:
    """In a task of another node, whose torchrun has ended: `end` in the script's place, where its node is lost.

    SLURM would notice after SlurmdTimeout, minutes on most clusters. Does nothing where the first node's slurmd answers.
    """
    if os.environ.get("SLURM_NODEID", "0") == "0":
        return
    first = expand(os.environ["SLURM_JOB_NODELIST"])[0]
    if not _is_lost(first):
        return
    print(f"{first}, the job's first node, is lost: its slurmd does not answer", file=sys.stderr, flush=True)
    for folder in runs:
        starts.note_end(folder, "died", [first])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which SLURM sends next: there is nothing left to save
    end(runs)


def watch(runs: list[Path]) -> int:
    """Kills srun where all runs have said for a while that they are over: the slurmstepd of a task is dead, and srun waits
    for it as long as KillWait. What still lives in the job is ended by the requeue, or by the job's end."""
    script, since, before = os.getppid(), time.monotonic(), None
    while os.getppid() == script:
        time.sleep(2)
        said = [starts.said_since_start(folder) or {} for folder in runs]
        if said != before or any(s.get("state", "running") == "running" for s in said):
            before, since = said, time.monotonic()
        elif time.monotonic() - since > OVER_SECONDS:
            print(f"ending srun: {runs[0]} has been '{said[0]['state']}' for {OVER_SECONDS} s", file=sys.stderr)
            kill([pid for pid in descendants(script) if name_of(pid) == "srun"])
            return 0
    return 0


def name_of(pid: int) -> str:
    """A process' command, empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def requeue(job: str, bad: list[str]) -> None:
    """Put this job back into the queue, without the bad nodes, and wait for SLURM to end this script."""
    if bad:  # said first: SLURM may end this script before it says another word
        print(f"job {job} leaves out {', '.join(bad)}: blamed for two ends of this run", file=sys.stderr, flush=True)
    sys.stdout.flush()
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        print(f"scontrol requeue {job}: {done.stderr.strip()}", file=sys.stderr)
        sys.exit(1)
    if bad:
        # Possible while the job waits only, which it does from here on.
        subprocess.run(["scontrol", "update", f"jobid={job}", f"ExcNodeList={','.join(bad)}"])
    time.sleep(SECONDS_TO_LEAVE)
    sys.exit(1)


def blamed(folder: Path, said: dict | None) -> list[str]:
    """The node that began the end of the newest start, or none where that is not certain.

    The run's own word comes first: ranks that outlive another one see which. Where rank 0 was killed there is none; then
    torchrun says which rank was killed on its node. Ranks elsewhere may abort because of it (SIGABRT): they are followers.
    """
    newest = starts.read_starts(folder)[-1:]
    nodes = newest[0].get("nodes", []) if newest else []
    hosts = {host.partition(".")[0] for host in blamed_hosts((said or {}).get("reason", ""))}
    named = [node for node in nodes if node.partition(".")[0] in hosts]
    log = jobs.read_job(folder).get("log")
    paths = [Path(log.replace("_0_log.err", f"_{i}_log.err")) for i in range(len(nodes))] if log else []
    signals = {node: killed_ranks(path) for node, path in zip(nodes, paths)}
    killed = [node for node, numbers in signals.items() if set(numbers) - {signal.SIGABRT}]
    aborted = [node for node, numbers in signals.items() if numbers]
    return next((one for one in (named, killed, aborted) if len(one) == 1), [])


def _is_lost(node: str) -> bool:
    """Whether a node's slurmd cannot be reached; False where SLURM does not say where it listens."""
    said = jobs.ask("scontrol", "show", "node", node) or ""
    address, port = re.search(r"NodeAddr=(\S+)", said), re.search(r"\bPort=(\d+)", said)
    port = port or re.search(r"SlurmdPort += (\d+)", jobs.ask("scontrol", "show", "config") or "")
    for _ in range(TRIES if address and port else 0):
        with contextlib.suppress(OSError):
            socket.create_connection((address[1], int(port[1])), CONNECT_SECONDS).close()
            return False
        time.sleep(1)
    return bool(address and port)


def _note_lost_nodes(folder: Path, job: str) -> None:
    """A start that nobody has said the end of: a node was lost (SLURM knows which), or the job was requeued by hand."""
    earlier = starts.read_starts(folder)
    if not earlier or "ended" in earlier[-1]:
        return
    told = sum(bool(s.get("blamed")) for s in earlier if s["job"] == job and s.get("ended") == "lost")
    failed = jobs.ask("sacct", "-X", "-D", "-n", "-P", "-j", job, "-o", "FailedNode")
    if failed is None:  # SLURM 22.05 has no such field: a node that is still down
        told, failed = 0, jobs.ask("sinfo", "-h", "-N", "-t", "down", "-n", ",".join(earlier[-1]["nodes"]), "-o", "%N")
    names = [line for line in (failed or "").split() if line != "None"]
    starts.note_end(folder, "lost", names[told:][-1:] if earlier[-1]["job"] == job else [])


def _enough_without(bad: list[str]) -> bool:
    """Whether the partition has nodes enough without the bad ones."""
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    said = jobs.ask("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%t") or ""
    good = {line.split("|")[0] for line in said.splitlines()} - set(bad)
    if bad and len(good) < int(os.environ.get("SLURM_JOB_NUM_NODES", 1)):
        print(f"{', '.join(bad)}: blamed twice, but too few other nodes in partition {partition}", file=sys.stderr)
        return False
    return True


def own_names() -> list[str]:
    """This job as SLURM names it: its number and, of an array's element, the array's number and its index."""
    names = [os.environ["SLURM_JOB_ID"]]
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        names.append(f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}")
    return names


def _log(job: str) -> str | None:
    said = jobs.ask("scontrol", "show", "job", job) or ""
    lines = [line.strip().removeprefix("StdErr=") for line in said.splitlines() if line.strip().startswith("StdErr=")]
    return lines[0] if lines else None


def _submitted(folder: str):
    """The launch.task.Task that this job was submitted with. submitit writes it after sbatch has returned."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    path = JobPaths(folder, job_id=job_id()).submitted_pickle
    wait(60, path.exists)
    return DelayedSubmission.load(path).function


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if len(words) < 2 or words[0] not in ("begin", "watch", "end"):
        raise UserError("usage: python -m launch.batch begin|watch|end RUN...")
    if words[1] == "--submitted":  # submitit's folder: the runs stand in the job's pickle
        task = _submitted(words[2])
        runs, ranks = task.runs(), task.ranks_per_node
    else:
        runs, ranks = [Path(word).absolute() for word in words[1:]], int(os.environ.get("RANKS_PER_NODE", 1))
    return begin(runs, ranks) if words[0] == "begin" else watch(runs) if words[0] == "watch" else end(runs)


if __name__ == "__main__":
    sys.exit(run(main))
