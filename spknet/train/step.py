"""What is trained: network and loss in one module; and the two ways to its gradient: at once, or chunk by chunk with the same
result. Both leave the mean over ranks in every .grad.

Chunked (GradCache, Gao et al. 2021, arXiv 2101.06983): embed all crops without a graph; take the loss's gradient with
respect to the embeddings; embed chunk by chunk again, with a graph, pushing that gradient through. Memory is that of one
chunk, the gradient is that of the whole batch. Trainable BatchNorm sees chunks in both passes, so its statistics are per
chunk (over all ranks); where BatchNorm is frozen or absent the gradient is exactly the unchunked one.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from spknet.config import ConfigError
from spknet.data.augment import mix
from spknet.data.batches import Batch
from spknet.parallel.gradients import AveragedGradients

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SpeakerTask(nn.Module):
    """Waves -> loss. forward(waves, masks, labels, draws) -> (L_r, accuracy in percent); see spknet.losses."""

    def __init__(self, model: nn.Module, loss: nn.Module, utterances_per_speaker: int, precision: str):
        super().__init__()
        self.model, self.loss = model, loss
        self.utterances_per_speaker, self.half = utterances_per_speaker, AUTOCAST.get(precision)
        self.frozen: list[nn.Module] = []

    def freeze(self, names: str | list[str] | None) -> None:
        """Parts of the network that are not trained, by the beginnings of their names; their BatchNorm stays as it is.

        Raises ConfigError for a name that the network has not.
        """
        for name in [names] if isinstance(names, str) else names or []:
            inside = [p for own, p in self.model.named_parameters() if own == name or own.startswith(name + ".")]
            if not inside:
                parts = ", ".join(own for own, _ in self.model.named_children())
                raise ConfigError(
                    f"train.frozen {name}: the network has no such part; it has {parts}, and parts of these"
                )
            for parameter in inside:
                parameter.requires_grad_(False)
            self.frozen += [part for own, part in self.model.named_modules() if own == name]
        self.train(self.training)

    def train(self, mode: bool = True):
        """As ever, but frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def embed(self, waves: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
        """(n, samples) -> (n, dimensions), at least float32."""
        with torch.autocast(waves.device.type, self.half) if self.half else contextlib.nullcontext():
            embeddings = self.model(waves, masks)
        return embeddings.to(waves.dtype)

    def score(self, embeddings, labels, draws):
        """(n, dimensions), rows speaker by speaker -> (L_r, accuracy)."""
        return self.loss(embeddings.unflatten(0, (-1, self.utterances_per_speaker)), labels, draws)

    def forward(self, waves, masks, labels, draws):
        return self.score(self.embed(waves, masks), labels, draws)


def prepare(batch: Batch, samples: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """The arguments of SpeakerTask.forward: augmented waves (n, samples), masks or None, labels, draws."""
    crops, augment, labels, draws = batch.to(device)
    return mix(crops, augment, samples, dtype), augment.get("masks"), labels, draws


def step_at_once(
    task: SpeakerTask, inputs: tuple, scale, gradients: AveragedGradients, begins=lambda part: None
) -> tuple[Tensor, Tensor]:
    """Forward and backward of the whole share; gradients travel while it goes back.

    scale: loss -> scaled loss (fp16); begins: told which part of the step comes now (spknet.train.meter).
    """
    loss, accuracy = task(*inputs)
    begins("backward")
    scale(loss).backward()
    begins("exchange")
    gradients.average()
    return loss.detach(), accuracy.detach()


def step_in_chunks(
    task: SpeakerTask, inputs: tuple, scale, gradients: AveragedGradients, chunk: int, begins=lambda part: None
) -> tuple[Tensor, Tensor]:
    """The same gradient with the memory of `chunk` utterances. Gradients travel once, at the end."""
    waves, masks, labels, draws = inputs
    parts = list(zip(waves.split(chunk), masks.split(chunk) if masks is not None else [None] * len(waves)))
    with torch.no_grad():
        embeddings = torch.cat([task.embed(*part) for part in parts])
    embeddings.requires_grad_()
    loss, accuracy = task.score(embeddings, labels, draws)
    begins("backward")
    with gradients.collected(), _running_statistics_kept(task.model):
        scale(loss).backward()
        for part, gradient in zip(parts, embeddings.grad.split(chunk)):
            task.embed(*part).backward(gradient)
    begins("exchange")
    gradients.average()
    return loss.detach(), accuracy.detach()


@contextlib.contextmanager
def _running_statistics_kept(model: nn.Module):
    # The first pass has counted these crops already.
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum, layer.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for layer, (momentum, tracked) in zip(layers, before):
            layer.momentum, layer.num_batches_tracked = momentum, tracked


def train_batchnorm(model: nn.Module) -> bool:
    """Whether some BatchNorm of the network uses the statistics of the batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())
