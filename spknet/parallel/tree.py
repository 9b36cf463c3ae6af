"""Sums with the same bits on any number of ranks: P fixed pieces, added in one binary tree whoever holds them.

Floating-point addition is not associative, and all_reduce(SUM) adds in an order that depends on the ranks and on the
algorithm. So the work is cut into P pieces, P a power of two and the same for every run, and a rank owns consecutive ones:

    rank r of W owns pieces [r P / W, (r + 1) P / W)        piece p's partial sum does not depend on W
    ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7))        is the one order in which partial sums are added (P = 8)

Small partial sums are gathered and added by every rank (`tree_sum`). Large ones are first added inside the rank as far as
the tree allows: the pieces of a rank are a few whole subtrees (one, where W is a power of two up to P), and only those sums
travel (`Tree`, `sum_for_owners`).

    total = tree_sum(gather_pieces(own, pieces=64))  # own: (pieces of this rank, ...)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from spknet.parallel import gather


def owned(pieces: int, rank: int | None = None) -> range:
    """The pieces of a rank (of this one)."""
    rank, world = gather.rank() if rank is None else rank, gather.world_size()
    return range(rank * pieces // world, (rank + 1) * pieces // world)


def gather_pieces(own: Tensor, pieces: int) -> Tensor:
    """Every piece's value on every rank: own (pieces of this rank, ...) -> (pieces, ...), without gradient."""
    world = gather.world_size()
    if world == 1:
        return own
    counts = [len(owned(pieces, rank)) for rank in range(world)]
    padded = own.new_zeros((max(counts), *own.shape[1:]))
    padded[: len(own)] = own
    every = gather.gather_detached(padded).unflatten(0, (world, -1))
    return torch.cat([part[:count] for part, count in zip(every, counts)])


def exchange_pieces(own: Tensor, pieces: int) -> Tensor:
    """Every piece's value for this rank's rows, own (pieces of this rank, k, rows of all ranks, ...) ->
    (pieces, k, own rows, ...).

    One all-to-all. What is then combined row by row, and gathered, moves W times fewer bytes than with `gather_pieces`.
    """
    world = gather.world_size()
    if world == 1:
        return own
    counts = [len(owned(pieces, rank)) for rank in range(world)]
    by_rank = own.unflatten(2, (world, -1)).movedim(2, 0)
    sent = own.new_zeros((world, max(counts), *by_rank.shape[2:]))
    sent[:, : len(own)] = by_rank
    received = torch.empty_like(sent)
    with gather.exchange:
        dist.all_to_all_single(received, sent)
    return torch.cat([part[:count] for part, count in zip(received, counts)])


def tree_sum(parts: Tensor) -> Tensor:
    """Sum over the first axis, a power of two long, in the order above."""
    while len(parts) > 1:
        parts = parts[0::2] + parts[1::2]
    return parts[0]


class Tree:
    """Adds the values of consecutive pieces in the order above, as they come; at most log2 P + 1 sums are kept.

    nodes: (first piece, number of pieces, sum) of the whole subtrees so far. Values are changed in place.
    """

    def __init__(self):
        self.nodes: list[tuple[int, int, Tensor]] = []

    def add(self, first: int, size: int, value: Tensor | None) -> None:
        self.nodes.append((first, size, value))
        while len(self.nodes) > 1:
            (a, m, left), (_, n, right) = self.nodes[-2:]
            if m != n or a % (2 * m):
                return
            self.nodes[-2:] = [(a, 2 * m, None if left is None else left.add_(right))]


def subtrees(pieces: range) -> list[tuple[int, int]]:
    """(first piece, number of pieces) of the whole subtrees that these pieces make up."""
    tree = Tree()
    for piece in pieces:
        tree.add(piece, 1, None)
    return [(first, size) for first, size, _ in tree.nodes]


def sum_for_owners(tree: Tree, pieces: int, like: Tensor) -> Tensor:
    """The sum over all pieces of (rows of all ranks, ...), each rank its own rows: a reduce-scatter with fixed order.

    tree: holds this rank's pieces, each value (W * n, ...) with the rows of rank r at [r n, (r + 1) n) -> (n, ...); like:
    a tensor of that shape (a rank may own no piece). One all-to-all: a rank sends and receives as many bytes as in a reduce-scatter where W is a power of two.
    """
    world = gather.world_size()
    if world == 1:
        return tree.nodes[0][2]
    layouts = [subtrees(owned(pieces, rank)) for rank in range(world)]
    most = max(map(len, layouts))
    sent = like.new_zeros((world, most, *like.shape))
    for k, (_, _, value) in enumerate(tree.nodes):
        sent[:, k] = value.unflatten(0, (world, -1))
    received = torch.empty_like(sent)
    with gather.exchange:
        dist.all_to_all_single(received, sent)
    whole = Tree()
    for theirs, layout in zip(received, layouts):
        for value, (first, size) in zip(theirs, layout):
            whole.add(first, size, value)
    return whole.nodes[0][2]
