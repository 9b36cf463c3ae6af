"""SLURM's compressed node lists, and where the ranks of a job meet, without `scontrol`, which containers lack.

    gpu[01-03,7],login,a[1-2]b[3-4]  ->  gpu01 gpu02 gpu03 gpu7 login a1b3 a1b4 a2b3 a2b4

A range keeps the width of its first number; several brackets multiply, the last one fastest (as `scontrol show hostnames`).

    python -m spknet.parallel.nodelist "$SLURM_JOB_NODELIST"              one host a line
    python -m spknet.parallel.nodelist --endpoint                         HOST:PORT of this job, the same on each of its nodes
"""

from __future__ import annotations

import os
import re
import sys

from spknet.errors import UserError, run

MOST_HOSTS = 1 << 20  # of one range
FIRST_PORT, PORTS = (
    15000,
    15000,
)  # below the ephemeral range of Linux (32768 to 60999) and above the registered services


class NodeListError(UserError):
    """A node list that cannot be read; the message shows where."""


def expand(nodelist: str) -> list[str]:
    """Host names in the list's order. Raises NodeListError."""
    hosts = []
    for group in _split(nodelist):
        names = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", group):
            endings = [literal] if literal else _numbers(ranges, nodelist)
            names = [name + ending for name in names for ending in endings]
        hosts += names
    return hosts


def first_host(nodelist: str) -> str:
    """The host at which ranks meet: that of node 0. Raises NodeListError."""
    return expand(nodelist)[0]


def rendezvous_port(job: str) -> int:
    """A port that every node of a job computes alike."""
    if not job.isdecimal():
        raise NodeListError(f"SLURM_JOB_ID={job!r} in the environment; expected a whole number")
    return FIRST_PORT + int(job) % PORTS


def endpoint(environment=os.environ) -> tuple[str, int]:
    """(first host, port) of the SLURM job that this process belongs to. Raises NodeListError outside of one."""
    try:
        nodelist, job = environment["SLURM_JOB_NODELIST"], environment["SLURM_JOB_ID"]
    except KeyError as error:
        raise NodeListError(f"{error.args[0]} is not set: this is no SLURM job; start it with sbatch or srun") from None
    return first_host(nodelist), rendezvous_port(job)


def _split(nodelist: str) -> list[str]:
    """The groups between commas that stand outside of brackets."""
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[^\[\]\s]+\])+(?:,(?:[^\[\],\s]|\[[^\[\]\s]+\])+)*", nodelist):
        raise NodeListError(f"node list {nodelist!r}: expected names as SLURM writes them, such as gpu[01-03,7],login")
    return re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+", nodelist)


def _numbers(ranges: str, nodelist: str) -> list[str]:
    found = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or not 0 <= int(match[2] or match[1]) - int(match[1]) < MOST_HOSTS:
            raise NodeListError(f"node list {nodelist!r}: expected a number or a range such as 01-03, found {part!r}")
        width = len(match[1])
        found += [f"{number:0{width}d}" for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return found


def main(argv: list[str] | None = None) -> int:
    """Exit status 2 for a list that cannot be read, and for a call without one."""
    words = sys.argv[1:] if argv is None else argv
    if words == ["--endpoint"]:
        print("{}:{}".format(*endpoint()))
    elif len(words) == 1:
        print("\n".join(expand(words[0])))
    else:
        raise NodeListError("usage: python -m spknet.parallel.nodelist NODELIST | --endpoint")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
