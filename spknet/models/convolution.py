"""nn.Conv2d without a fault of oneDNN: a strided 1x1 convolution of few channels, channels last, damages the process's memory.

Its weight gradient writes past a workspace that is too small, in float32 and in bfloat16, where the input has fewer
channels than the kernel's block of 16 (github.com/uxlfoundation/oneDNN/issues/6035, open in September 2026). The process dies
then or later, or computes with what was written. Such are the shortcuts of a ResNet with `model.width` below 1 or 0.5.

What a 1x1 convolution skips it never reads, so it may as well be given only the rest: the same output in every bit.

    Conv2d(8, 16, 1, stride=2, bias=False)(x)  # (batch, 8, bands, frames) -> (batch, 16, bands / 2, frames / 2), rounded up
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK = 16  # channels of oneDNN's kernels for AVX-512; AVX2 has 8


class Conv2d(nn.Conv2d):
    """As torch has it."""

    def forward(self, x: Tensor) -> Tensor:
        strided = self.kernel_size == (1, 1) and self.stride != (1, 1) and self.padding == (0, 0)
        if not (strided and self.in_channels < BLOCK and x.device.type == "cpu" and torch.is_grad_enabled()):
            return super().forward(x)
        down, across = self.stride
        return nn.functional.conv2d(x[..., ::down, ::across], self.weight, self.bias, groups=self.groups)
