"""What ranks tell each other of a step: loss, accuracy, whether anything is not finite, who asks for a stop or a checkpoint.

It is one tensor, summed over the ranks, that the host reads a step later: by then the device has long computed it and is busy with
the next step, so neither waits for the other. Where a step is logged or saved it is read at once. So a step that went wrong may be
followed by a part of the next one in memory, but nothing of it is ever written.

    told = Told(step, loss, accuracy, [~finite, ~sound], side.asks(), (batch, waves))
    told.sums[3]      # on the device, at once: on how many ranks a gradient is not finite
    told.read()       # on the host: [loss, accuracy, ranks not finite, ranks not sound, asking for a stop, for a checkpoint]
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from spknet.data.batches import Batch
from spknet.parallel.gather import all_reduce_sum
from spknet.parallel.together import gather_objects


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; the message names step, rank and utterances. Every rank raises it."""


class Told:
    """One step's numbers on their way from the ranks' devices to their hosts."""

    def __init__(
        self,
        step: int,
        loss: Tensor,
        accuracy: Tensor,
        flags: list[Tensor],
        asks: list[bool],
        inputs: tuple[Batch, Tensor],
    ):
        self.step, self.loss, self.inputs = step, loss, inputs
        own = torch.stack([value.to(torch.float64) for value in (loss, accuracy, *flags)])
        asked = torch.tensor(asks, dtype=torch.float64, pin_memory=own.is_cuda).to(own.device, non_blocking=True)
        self.sums = all_reduce_sum(torch.cat([own, asked]))
        self.on_host = self.sums.to("cpu", non_blocking=True)  # into pinned memory, where it comes from a GPU
        self.copied = torch.cuda.Event() if own.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    def read(self) -> list[float]:
        """The sums over all ranks; waits for the device where it has not come so far."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.on_host.tolist()

    def raise_non_finite(self, key: Callable[[int], str], saved_step: int) -> None:
        """Raises NonFiniteLoss on every rank, with the rank and the utterances to look at. key: of a row of the data."""
        # A bad crop spoils every rank's loss through BatchNorm and prototypes, so what went in is looked at first.
        batch, waves = self.inputs
        names, loss = [key(row) for row in batch.rows.tolist()], float(self.loss)
        bad = [name for name, good in zip(names, torch.isfinite(waves).all(dim=1).tolist()) if not good]
        every = gather_objects((loss, bad, names))
        kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "nothing was saved yet"
        for rank, (_, spoilt, _) in enumerate(every):
            if spoilt:
                raise NonFiniteLoss(
                    f"step {self.step}: samples that are not finite went into the network on rank {rank}; {kept}. Look at"
                    f" these recordings, and at the noise mixed to them: {' '.join(spoilt)}"
                )
        if all(math.isfinite(value) for value, _, _ in every):
            raise NonFiniteLoss(
                f"the gradient of step {self.step} is not finite, though its loss is ({every[0][0]:g} on rank 0);"
                f" {kept}. Lower --optim.lr, or give --optim.clip_norm"
            )
        rank = next(r for r, (value, _, _) in enumerate(every) if not math.isfinite(value))
        raise NonFiniteLoss(
            f"the loss of step {self.step} is {every[rank][0]} on rank {rank}; {kept}. Its utterances:"
            f" {' '.join(every[rank][2])}. Lower --optim.lr, or look at these recordings"
        )
