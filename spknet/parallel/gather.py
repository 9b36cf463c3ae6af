"""Tensors of all ranks on every rank, with the gradient that makes W ranks equal to one.

Each rank r scores its own rows (anchors) against the rows of all ranks. With L_r the mean loss over the rank's own rows,
equally many on each rank, the loss of the global batch is L = 1/W sum_r L_r. What AveragedGradients leaves is the
mean over ranks of each rank's gradient, so it is enough that the backward passes together compute sum_r dL_r/dtheta:

    x_q, embedded on rank q, enters every L_r through the gathered tensor, so   d(sum_r L_r)/dx_q = sum_r dL_r/dgather_q.

Rank r holds dL_r/dgather_q for all q; summing over ranks and giving each rank its own slice is a reduce-scatter with SUM:
that is `gather_rows`' backward. Each rank then pushes d(sum_r L_r)/dx_q through its own network, gradients are averaged over ranks,
and the result is 1/W sum_q (d sum_r L_r/dx_q)(dx_q/dtheta) = dL/dtheta: the gradient one rank would have computed from the
whole batch. Parameters of the loss itself (w, b, class weights) enter each L_r directly and the mean is right for them.

Where the denominator depends on the data (semi-hard triplet, contrastive), the mean over own rows is not the global
mean; there L_r = W * local_sum / global_count, with the count from `all_reduce_sum`, so that 1/W sum_r L_r is the ratio of
the global sums.

    every = gather_rows(embeddings)  # (W * rows, ...), this rank's rows at [rank * rows, (rank + 1) * rows)
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist


class _Clock:
    """Seconds that this process has spent in collectives that block it: on CPUs all but the gradients' own way."""

    seconds = 0.0

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.seconds += time.perf_counter() - self.begun


exchange = _Clock()


def world_size() -> int:
    """Ranks of the run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        return gather_detached(rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        # A sum followed by a slice: gloo has no reduce-scatter of its own, and NCCL's differs only in traffic.
        if dist.get_backend() == "nccl":
            own = gradient.new_empty((gradient.shape[0] // world_size(), *gradient.shape[1:]))
            _reduce_scatter(own, gradient.contiguous())
            return own
        total = gradient.contiguous().clone()
        with exchange:
            dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


# torch 2.14 has renamed both; 2.11 has only the older names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_detached(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks in rank order, (W * n, ...), without gradient."""
    out = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    with exchange:
        _all_gather(out, rows.contiguous())
    return out


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks in rank order, with gradient (see above).

    rows: (n, ...), the same shape on every rank -> (W * n, ...). With one rank, `rows` itself.
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows) if rows.requires_grad else gather_detached(rows)


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over ranks of a tensor, without gradient. With one rank, the value itself (detached)."""
    value = value.detach().clone()
    if world_size() > 1:
        with exchange:
            dist.all_reduce(value)
    return value
