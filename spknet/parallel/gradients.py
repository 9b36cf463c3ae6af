"""Gradients averaged over all ranks while the backward pass still runs, in buckets that never change.

DistributedDataParallel lays its buckets out anew after its first step, in the order in which gradients came. A run that goes
on has its first step elsewhere than the one that was never stopped, so its sums run in another order, and on four ranks and
more (a ring adds an element's parts in an order that depends on where the element lies) the bits differ from the second step
on. Here the layout is a function of the parameters alone: their reverse order, cut at BUCKET_BYTES. A bucket leaves as soon
as it and all before it are full, so every rank sends the same buckets in the same order.

    gradients = AveragedGradients(task.parameters())
    gradients.clear(); loss.backward(); gradients.average()     # every p.grad is the mean over ranks
    with gradients.collected(): ...                              # several backward passes, sent at average() only
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from spknet.parallel.gather import world_size

BUCKET_BYTES = 25 * 2**20


class AveragedGradients:
    """The gradients of some parameters; with one rank nothing is sent and nothing is copied."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.buckets: list[Bucket] = []
        self.collecting = False
        if world_size() > 1:
            for share in _shares(self.parameters[::-1]):
                self.buckets.append(Bucket(share))
            for bucket in self.buckets:
                for parameter in bucket.views:
                    parameter.register_post_accumulate_grad_hook(lambda p, b=bucket: self._arrived(p, b))

    def clear(self) -> None:
        """No gradient; call before each step."""
        for parameter in self.parameters:
            parameter.grad = None
        for bucket in self.buckets:
            bucket.clear()

    def _arrived(self, parameter: Tensor, bucket: Bucket) -> None:
        bucket.waiting.discard(parameter)
        if self.collecting:
            return
        for other in self.buckets:
            if not other.sent:
                if other.waiting:
                    return
                other.send()

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Backward passes in here add up; nothing is sent before `average`."""
        self.collecting = True
        try:
            yield
        finally:
            self.collecting = False

    def average(self) -> None:
        """Returns when every gradient is the mean over ranks. A parameter that this rank (like all others) did not use has
        None, so that the optimizer passes it over as with one rank."""
        for bucket in self.buckets:
            if not bucket.sent:
                bucket.send()
        for bucket in self.buckets:
            bucket.receive()


class Bucket:
    """Gradients that travel together, side by side in one tensor."""

    def __init__(self, parameters: list[Tensor]):
        first = parameters[0]
        self.flat = first.new_zeros(sum(p.numel() for p in parameters))
        self.views: dict[Tensor, Tensor] = {}
        start = 0
        for parameter in parameters:
            part = self.flat[start : start + parameter.numel()]
            # The parameter's own layout (channels last, perhaps), so that the optimizer reads both in one order.
            self.views[parameter] = part.as_strided(parameter.shape, _strides(parameter), part.storage_offset())
            start += parameter.numel()
        self.clear()

    def clear(self) -> None:
        self.waiting = set(self.views)
        self.sent, self.work = False, None
        self.flat.zero_()
        for parameter, view in self.views.items():
            parameter.grad = view

    def send(self) -> None:
        self.sent = True
        self.flat.div_(world_size())
        self.work = dist.all_reduce(self.flat, async_op=True)

    def receive(self) -> None:
        self.work.wait()
        for parameter in self.waiting:  # unused: the optimizer must pass it over, as with one rank
            parameter.grad = None


def _strides(parameter: Tensor) -> tuple[int, ...]:
    dense = torch.empty_like(parameter, memory_format=torch.preserve_format, device="meta")
    return dense.stride()


def _shares(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive parameters of one type and device, at most BUCKET_BYTES together unless one alone is more."""
    share: list[Tensor] = []
    size = 0
    for parameter in parameters:
        n = parameter.numel() * parameter.element_size()
        other = share and (share[0].dtype, share[0].device) != (parameter.dtype, parameter.device)
        if share and (other or size + n > BUCKET_BYTES):
            yield share
            share, size = [], 0
        share.append(parameter)
        size += n
    if share:
        yield share
