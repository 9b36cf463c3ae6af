"""BatchNorm over the global batch, on CPUs too (torch's SyncBatchNorm refuses CPU tensors).

Every rank holds equally many rows. Forward: each rank's mean and variance are gathered (2 C numbers) and combined exactly,

    mean = 1/W sum_r mean_r        var = 1/W sum_r [var_r + (mean_r - mean)^2]                    (Chan et al. 1979)

which, unlike sums of squares, loses nothing where the mean is large; then x is normalised by the fused kernel that
evaluation uses. Backward: with x^ = (x - mean) / sqrt(var + eps) and n rows in all,

    dL/dx = w / sqrt(var + eps) * [dy - 1/n sum(dy) - x^ 1/n sum(dy x^)]                         (Ioffe & Szegedy 2015)

where both sums go over all ranks (2 C numbers, gathered). dw and db are left as this rank's own sums: AveragedGradients averages
them like every other parameter's gradient. A compiler is given both as custom operators, so that they stay in its graph; without
one they are called as they are, which saves a tenth of a millisecond and more each time.

Each layer meets the other ranks twice a step. What costs no meetings (docs/scaling.md says where that matters), and is the same
on any number of ranks too: statistics of each of G fixed groups of the global batch, where the ranks divide G (Hoffer et al.
2017, "ghost batches"), or frozen ones. Running statistics are then the mean over the groups: one meeting a step for all layers.

    model = globalize(model)     # replaces every nn.BatchNorm; names of parameters stay
    model = globalize(model, 8)  # statistics of 8 groups; 0: frozen
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from spknet.config import ConfigError
from spknet.parallel.gather import exchange, gather_detached, world_size


def _normalize(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    variance, mean = _moments(x, weight.dtype)
    if world_size() > 1:
        every = gather_detached(torch.stack([mean, variance])[None])  # (W, 2, channels)
        mean = every[:, 0].mean(0)
        variance = (every[:, 1] + (every[:, 0] - mean).square()).mean(0)
    y = torch.ops.aten.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
    return y, mean, variance


def _moments(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    # The training kernel is the fastest way to this rank's statistics of a channels-last or half-precision tensor; with
    # momentum 1 it leaves them in the running buffers, the variance with Bessel's correction, which is taken back here.
    channels, count = x.shape[1], x.numel() // x.shape[1]
    if count == 1:  # the correction would be 0 times infinity
        mean = x.reshape(channels).to(dtype, copy=True)
        return torch.zeros_like(mean), mean
    mean, variance = x.new_zeros(channels, dtype=dtype), x.new_ones(channels, dtype=dtype)
    torch.ops.aten.batch_norm_update_stats(x, mean, variance, 1.0)
    return variance * ((count - 1) / count), mean


def _backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inverse = torch.rsqrt(variance + eps)
    scale = weight * inverse
    one_type = x.dtype == weight.dtype
    dx, dw, db = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, mean, variance, mean, inverse, False, eps, [not one_type, True, True]
    )
    sums = torch.stack([dw, db])
    if world_size() > 1:  # gloo gathers a few numbers more than twice as fast as it reduces them (0.6 against 1.6 ms)
        sums = gather_detached(sums[None]).sum(0)
    # The part that depends on the sums is linear in x^, so the fused kernel of the forward pass makes it.
    factor = -scale / (world_size() * (x.numel() // x.shape[1]))
    rest = torch.ops.aten.native_batch_norm(x, factor * sums[0], factor * sums[1], mean, variance, False, 0.0, eps)[0]
    if one_type:  # one pass less than adding; where types differ, addcmul on CPU costs ten times as much
        dx = rest.addcmul_(dy, scale.view(-1, *[1] * (x.dim() - 2)))
    else:
        dx.add_(rest)
    return dx, dw, db


def _setup(ctx, inputs, output):
    x, weight, _, eps = inputs
    ctx.save_for_backward(x, weight, output[1], output[2])
    ctx.eps = eps


def _autograd(ctx, dy, _mean, _variance, backward=None):
    x, weight, mean, variance = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last) if _is_channels_last(x) else dy.contiguous()
    return (*(backward or _backward_operator)(dy, x, weight, mean, variance, ctx.eps), None)


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _normalize(*inputs)
        _setup(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return _autograd(ctx, *gradients, _backward)


_operator = torch.library.custom_op("spknet::batch_norm_global", _normalize, mutates_args=())
_backward_operator = torch.library.custom_op("spknet::batch_norm_global_backward", _backward, mutates_args=())
_operator.register_autograd(_autograd, setup_context=_setup)


@_operator.register_fake
def _(x, weight, bias, eps):
    return torch.empty_like(x), weight.new_empty(x.shape[1]), weight.new_empty(x.shape[1])


@_backward_operator.register_fake
def _(dy, x, weight, mean, variance, eps):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


# Ranks meet in both: a compiler may leave no call out, merge no two, and must keep their order. (An older torch cannot be told so.)
for operator in (_operator, _backward_operator):
    if hasattr(operator, "register_effect"):
        operator.register_effect(torch.library.EffectType.ORDERED)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm whose training statistics are those of all ranks' rows. x: (batch, channels, ...)."""

    def _check_input_dim(self, x: torch.Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"BatchNorm wants (batch, channels, ...), found shape {tuple(x.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        weight = self.weight if self.affine else torch.ones_like(self.running_mean)
        bias = self.bias if self.affine else torch.zeros_like(self.running_mean)
        normalize = _operator if torch.compiler.is_compiling() else _Normalize.apply
        y, mean, variance = normalize(x, weight, bias, self.eps)
        if self.track_running_stats and self.momentum:
            n = world_size() * (x.numel() // x.shape[1])
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)
        return y


class GroupBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm with statistics of its own for each of `groups` groups of the global batch; 0: of the running ones alone."""

    groups = 1

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.groups):
            buffers = (self.running_mean, self.running_var, self.weight, self.bias)
            return F.batch_norm(x, *buffers, False, 0.0, self.eps)
        parts, statistics = [], []
        for part in x.unflatten(0, (self.groups // world_size(), -1)).unbind(0):
            found = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
            # With momentum 1 torch leaves the batch's own statistics.
            parts.append(F.batch_norm(part, *found, self.weight, self.bias, True, 1.0, self.eps))
            statistics.append(torch.stack(found))
        mean, variance = torch.stack(statistics).mean(0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@torch.compiler.disable
@torch.no_grad()
def _average_running(model: nn.Module, _inputs, _output) -> None:
    """A hook after the forward pass: running statistics become their mean over ranks. Averages of averages are linear, so
    this is what one rank with all groups would have."""
    layers = [part for part in model.modules() if isinstance(part, GroupBatchNorm) and part.training]
    if not layers or world_size() == 1:
        return
    buffers = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
    every = torch.cat(buffers)
    with exchange:
        dist.all_reduce(every)
    for buffer, mean in zip(buffers, (every / world_size()).split([len(buffer) for buffer in buffers])):
        buffer.copy_(mean)


def check_groups(groups: int, speakers: int) -> None:
    """Raises ConfigError where so many groups (train.batchnorm_groups) cannot be cut from so many speakers by these ranks."""
    if groups > 1 and (speakers % groups or groups % world_size()):
        raise ConfigError(
            f"train.batchnorm_groups {groups}: with {speakers} speakers in a batch and {world_size()} ranks expected a"
            " multiple of the ranks that divides the speakers; or 1, the whole batch"
        )


def globalize(module: nn.Module, groups: int = 1) -> nn.Module:
    """Replaces every nn.BatchNorm in `module`, keeping parameters, buffers and names: by one over the global batch, or
    over each of several groups of it, or (groups 0) with frozen statistics."""
    if groups > 1:
        module.register_forward_hook(_average_running)
    _replace(module, groups)
    return module


def _replace(module: nn.Module, groups: int) -> None:
    kind = GlobalBatchNorm if groups == 1 else GroupBatchNorm
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, kind):
            settings = (child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            new = kind(*settings)
            new.weight, new.bias, new.training, new.groups = child.weight, child.bias, child.training, groups
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(new, buffer, getattr(child, buffer))
            setattr(module, name, new)
        else:
            _replace(child, groups)
