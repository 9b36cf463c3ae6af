"""Ranks of a benchmark: processes of one thread each on this machine, over gloo or, with a GPU each, NCCL.

speeds = on_ranks(2, measure, chosen)  # [measure(me, chosen) of each rank]
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from spknet.parallel.ranks import ranks


def on_ranks(world: int, function: Callable, *arguments: Any, device: str = "cpu", threads: int = 1) -> list:
    """function(me, *arguments) of each rank, in their order; what it returns must be picklable."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    group = world, device, threads, port
    torch.multiprocessing.spawn(_rank, (group, function, arguments, queue), nprocs=world)
    return [answer for _, answer in sorted((queue.get() for _ in range(world)), key=lambda pair: pair[0])]


def _rank(rank: int, group: tuple, function: Callable, arguments: tuple, queue) -> None:
    world, device, threads, port = group
    if world > 1:
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    with ranks(device, threads) as me:
        queue.put((rank, function(me, *arguments)))
