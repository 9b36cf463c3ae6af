"""A head cut over the ranks: any number of classes, and the same bits on any number of ranks.

B utterances in the global batch, N classes, W ranks; P = loss.shards fixed pieces of consecutive classes, piece p holding
[p N / P, (p + 1) N / P). A rank owns consecutive pieces (spknet.parallel.tree), their weights and their optimizer state.

Forward. With l_ij the logit of utterance i and class j, the loss is the mean over i of log sum_j exp(l_ij) - l_iy. Split
the sum by pieces: c_ip = log sum_{j in p} exp(l_ij) is a number that piece p alone can give, and

    log sum_j exp(l_ij) = M_i + log sum_p exp(c_ip - M_i),    M_i = max_p c_ip.

The maximum is exact in any order; the sum over p is taken in the tree's one order; l_iy is known to one piece, and zeros
are added for the others. So all that ranks exchange is the batch's embeddings and labels (each rank needs all B), and four
float64 numbers of each utterance and piece: c, l_iy, and the best logit with its class for the accuracy. They go to the
rank whose utterance it is, which combines them and tells all (a gather to all ranks would be W times as much). (A constant shift s in place of
a maximum per piece would save a pass over the logits, but exp(l - s) leaves float32 for s > 40, and for s = 32 already
where all cosines with large margins are low; a maximum of its own makes each c_ip as good as its logits are.)

Backward. d loss / d l_ij = (exp(l_ij - log sum) - [j = y_i]) / B needs nothing from other pieces. Logits are computed
again, piece by piece, with the same margin code as the whole head, and that gradient is pushed through: piece p gives
dW_p, whole and final, and its part of dE, (B, D). The parts of dE are added in the tree's order, inside the rank as far as
the tree goes, then between ranks, each rank receiving its own rows only. No tensor of (B, N) exists: the largest is (B, N/P).

Every operation has a shape that depends on B, D, N and P alone: hence the same bits on any W, given equal kernels (a CPU's
matrix products depend on its number of threads: keep it equal). Each rank returns the loss of the global batch, L_r = L,
whose mean over ranks is L again; dE of its own rows is multiplied by W, for what each rank pushes through its network is averaged
over ranks (spknet.parallel.gather). Weights of pieces are no parameters of this module, for their gradients are not averaged:
`shards()` lists them, for the optimizer. SphereFace2 has no normaliser: see ShardedSphereFace2. Inter-top-k: each piece
offers its k largest cosines, all ranks choose the same k of P k, and their owners penalise them. A step may compare with a
sample of the classes only: see spknet.losses.sampled.

    loss = build_loss(LossConfig(name="aamsoftmax", sharded=True), 192, n_classes=1_000_000, utterances_per_speaker=2)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from spknet import rng
from spknet.config import LossConfig
from spknet.losses.base import Loss
from spknet.losses.classification import Classifier
from spknet.losses.sampled import rows_only, sample
from spknet.parallel.gather import gather_rows, world_size
from spknet.parallel.tree import Tree, exchange_pieces, gather_pieces, owned, sum_for_owners, tree_sum

BLOCK = 1 << 20  # initial weights drawn at a time


@dataclass
class Piece:
    """Classes [first, last), with weight ((last - first) K, D) and, where the head has biases, bias (last - first,)."""

    number: int
    first: int
    last: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    seen: Tensor | None = None  # with loss.sample: the last step that had each class in its sample, -1 for none
    sample: Tensor | None = None  # classes of a sample, in order: weight and bias then have these rows only
    average: dict[str, Tensor] = field(default_factory=dict)  # of weight and bias (spknet.train.averaging)

    def values(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def parameters(self) -> list[nn.Parameter]:
        return list(self.values().values())

    def columns(self, classes: Tensor) -> Tensor:
        """Columns of these classes in this piece, -1 for those that it has not."""
        if self.sample is None:
            return torch.where((classes >= self.first) & (classes < self.last), classes - self.first, -1)
        place = torch.searchsorted(self.sample, classes).clamp(max=len(self.sample) - 1)
        return torch.where(self.sample[place] == classes, place, -1)

    def classes(self, columns: Tensor) -> Tensor:
        """The classes of these columns."""
        return columns + self.first if self.sample is None else self.sample[columns]


class Sharded(Loss):
    """A classification head in pieces; `rule` is the whole head's class, without weights. See the top.

    kind: Softmax, AMSoftmax or AAMSoftmax. The batch must be shared equally by the ranks.
    """

    def __init__(self, kind: type[Classifier], config: LossConfig, embedding_size: int, n_classes: int):
        super().__init__(config)
        self.rule = kind(config, embedding_size, None)
        self.device = torch.device("cpu")  # of the last batch
        self.n_classes, self.n_pieces = n_classes, config.shards
        self.pieces = []  # of this rank, those without classes left out
        for number in owned(config.shards):
            first, last = (p * n_classes // config.shards for p in (number, number + 1))
            if last > first:
                weight = nn.Parameter(torch.empty((last - first) * self.rule.centers, embedding_size))
                bias = nn.Parameter(torch.empty(last - first)) if self.rule.biased else None
                seen = torch.full((last - first,), -1) if config.sample < 1 else None
                self.pieces.append(Piece(number, first, last, weight, bias, seen))
        self.share, self.seed, self.active = config.sample, 0, self.pieces  # active: what a step compares with
        self.reset_parameters()

    def shards(self) -> list[nn.Parameter]:
        return [parameter for piece in self.pieces for parameter in piece.parameters()]

    def _apply(self, fn, recurse=True):  # torch's way to move a module to a device or a type
        super()._apply(fn, recurse)
        for parameter in self.shards():
            parameter.data = fn(parameter.data)
        for piece in self.pieces:
            piece.seen = None if piece.seen is None else piece.seen.to(piece.weight.device)
        return self

    def updating(self, optimizer: torch.optim.Optimizer):
        return super().updating(optimizer) if self.share == 1 or not self.pieces else rows_only(self, optimizer)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws each weight by its class and column, so that neither ranks nor pieces change it."""
        seed = self.seed = torch.initial_seed()  # rng.initialize sets it
        for piece in self.pieces:
            size, per_class = piece.weight.shape[1], self.rule.centers
            spread = self.rule.spread(self.n_classes * per_class, size)
            draw_(piece.weight, seed, "head", piece.first * per_class * size, spread)
            if piece.bias is not None:
                draw_(piece.bias, seed, "head bias", piece.first, spread)

    def squared_gradient(self) -> Tensor:
        """Sum of squares of all pieces' gradients, the same on every rank: (), float64."""
        own = torch.zeros(len(owned(self.n_pieces)), dtype=torch.float64, device=self.device)
        for piece in self.active:
            gradients = [p.grad.double().square().sum() for p in piece.parameters() if p.grad is not None]
            own[self._place(piece)] = sum(gradients)
        return tree_sum(gather_pieces(own, self.n_pieces))

    def compute(self, x: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        self.rule.margin = self.margin
        own = x.flatten(0, 1)
        targets = gather_rows(labels).repeat_interleave(x.shape[1])
        self.device = x.device
        self.active = self.pieces if self.share == 1 else sample(self, targets)
        parameters = [parameter for piece in self.active for parameter in piece.parameters()]
        return _Head.apply(own, self, targets, *self.rule.parameters(), *parameters)

    def _place(self, piece: Piece) -> int:
        """Where a piece stands among those that the rank owns, empty ones included."""
        return piece.number - owned(self.n_pieces).start

    def logits(self, piece: Piece, leaves: list[Tensor], targets: Tensor, hardest: Tensor | None) -> Tensor:
        """(B, classes of the piece); leaves: embeddings (B, D), the rule's own parameters, the piece's."""
        x, weight = leaves[0], leaves[-1] if piece.bias is None else leaves[-2]
        bias = None if piece.bias is None else leaves[-1]
        chosen = None if hardest is None else piece.columns(hardest)
        return self.rule.logits(x, weight, bias, piece.columns(targets), chosen)

    def hardest(self, x: Tensor, targets: Tensor) -> Tensor | None:
        """(B, k) the classes that inter-top-k penalises, -1 for none; x (B, D), targets (B,). None where it does not."""
        if not getattr(self.rule, "penalises", False):
            return None
        k = self.rule.top_k
        offers = x.new_full((len(owned(self.n_pieces)), 2, len(x), k), -2, dtype=torch.float64)
        for piece in self.active:
            cosines = self.rule.others(x, piece.weight, piece.columns(targets))
            best = cosines.topk(min(k, cosines.shape[1]), dim=1)
            offers[self._place(piece), 0, :, : best.values.shape[1]] = best.values.double()
            offers[self._place(piece), 1, :, : best.values.shape[1]] = piece.classes(best.indices).double()
        cosines, classes = exchange_pieces(offers, self.n_pieces).permute(1, 2, 0, 3).flatten(2)  # each (own rows, P k)
        cosines, order = cosines.sort(dim=1, descending=True, stable=True)
        best = torch.where(cosines > -1.5, classes.gather(1, order).long(), -1)  # -2: the right class, or none
        return gather_rows(best[:, :k].contiguous())

    def statistics(self, piece: Piece, leaves: list[Tensor], targets: Tensor, hardest: Tensor | None) -> Tensor:
        """(4, B) float64: what the piece adds to the loss (two numbers), the best logit, its class."""
        logits = self.logits(piece, leaves, targets, hardest)
        column = piece.columns(targets)
        right = torch.where(column >= 0, logits.gather(1, column.clamp(min=0)[:, None])[:, 0], 0)
        best = logits.max(dim=1)
        told = [logits.logsumexp(dim=1), right, best.values, piece.classes(best.indices)]
        return torch.stack([part.double() for part in told])

    def combine(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """From every piece's two numbers, (P, rows) each: the loss (rows,), and what `pull` needs, (rows,)."""
        highest = first.amax(dim=0)
        total = highest + tree_sum((first - highest).exp()).log()
        return total - tree_sum(second), total

    def pull(self, piece: Piece, leaves: list[Tensor], targets: Tensor, saved: tuple, scale: Tensor) -> list[Tensor]:
        """Gradients of scale * sum of the loss with respect to the leaves, of what goes through this piece."""
        hardest, total = saved
        logits = self.logits(piece, leaves, targets, hardest)
        with torch.no_grad():
            slope = (logits - total[:, None].to(logits.dtype)).exp_()
            column = piece.columns(targets)[:, None]
            slope.scatter_add_(1, column.clamp(min=0), -(column >= 0).to(slope.dtype))
            slope *= scale
        return torch.autograd.grad(logits, leaves, slope)


class ShardedSphereFace2(Sharded):
    """SphereFace2 in pieces: an utterance's loss is a sum over classes, so a piece needs nothing from the others."""

    def statistics(self, piece: Piece, leaves: list[Tensor], targets: Tensor, hardest: Tensor | None) -> Tensor:
        x, offset, weight = leaves
        columns = piece.columns(targets)
        best = self.rule.logits(x, weight, None, columns).max(dim=1)
        terms = self.rule.terms(x, weight, offset, columns)
        told = [terms, torch.zeros_like(terms), best.values, piece.classes(best.indices)]
        return torch.stack([part.double() for part in told])

    def combine(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        loss = tree_sum(first.clamp(min=0))  # a piece without classes said -inf
        return loss, loss

    def pull(self, piece: Piece, leaves: list[Tensor], targets: Tensor, saved: tuple, scale: Tensor) -> list[Tensor]:
        x, offset, weight = leaves
        terms = self.rule.terms(x, weight, offset, piece.columns(targets))
        return torch.autograd.grad(terms, leaves, scale.to(terms.dtype).expand_as(terms))


class _Head(torch.autograd.Function):
    """(own embeddings, head, targets of the whole batch, the rule's parameters, the pieces') -> (loss, accuracy)."""

    @staticmethod
    def forward(ctx, own: Tensor, head: Sharded, targets: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        x = gather_rows(own.detach())
        shared = list(head.rule.parameters())
        hardest = head.hardest(x, targets)
        told = x.new_full((len(owned(head.n_pieces)), 4, len(x)), -torch.inf, dtype=torch.float64)
        told[:, 1] = 0
        for piece in head.active:
            told[head._place(piece)] = head.statistics(piece, [x, *shared, *piece.parameters()], targets, hardest)
        first, second, best, winner = exchange_pieces(told, head.n_pieces).unbind(1)  # each (P, own rows)
        winner = torch.where(best == best.amax(dim=0), winner, torch.inf).amin(dim=0)  # equal logits: the lowest class
        every = gather_rows(torch.stack([*head.combine(first, second), winner], dim=1))
        loss, total, winner = every.unbind(1)  # each (B,)
        ctx.head, ctx.rows = head, own.shape
        ctx.save_for_backward(x, targets, total, *([] if hardest is None else [hardest]))
        accuracy = 100 * (winner == targets).double().mean()
        ctx.mark_non_differentiable(accuracy)
        return loss.mean().to(own.dtype), accuracy

    @staticmethod
    def backward(ctx, slope: Tensor, _):
        head, (x, targets, total, *hardest) = ctx.head, ctx.saved_tensors
        saved, scale = (hardest[0] if hardest else None, total), slope / len(x)
        n_shared = len(list(head.rule.parameters()))
        tree, shared = Tree(), x.new_zeros((len(owned(head.n_pieces)), n_shared))
        gradients, pieces = [], {piece.number: piece for piece in head.active}
        for place, number in enumerate(owned(head.n_pieces)):
            if number not in pieces:
                tree.add(number, 1, torch.zeros_like(x))
                continue
            inputs = [x, *head.rule.parameters(), *pieces[number].parameters()]
            with torch.enable_grad():
                leaves = [value.detach().requires_grad_() for value in inputs]
                for_x, *rest = head.pull(pieces[number], leaves, targets, saved, scale)
            tree.add(number, 1, for_x)
            for k in range(n_shared):
                shared[place, k] = rest[k]
            gradients += rest[n_shared:]
        for_own = sum_for_owners(tree, head.n_pieces, x.new_empty(ctx.rows))
        every = tree_sum(gather_pieces(shared, head.n_pieces)) if n_shared else []
        return world_size() * for_own, None, None, *every, *gradients


def draw_(values: Tensor, seed: int, tag: str, first: int, spread: float) -> None:
    """Fills a tensor with draws number first, first + 1, ... of a bell-shaped distribution of mean 0.

    Sums of four 16-bit numbers out of one hash: integers until the end, so that every machine draws the same. Their
    standard deviation is `spread`, their largest value 3.5 times that.
    """
    flat = values.view(-1)
    for start in range(0, len(flat), BLOCK):
        stop = min(start + BLOCK, len(flat))
        bits = rng.bits(seed, 0, tag, np.arange(first + start, first + stop))
        total = sum((bits >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)).astype(np.float64)
        drawn = (total - 2 * 65535) * (spread * 3**0.5 / 65536)
        flat[start:stop] = torch.from_numpy(drawn).to(flat)
