"""Strided 1x1 convolutions of few channels, channels last: oneDNN's own weight gradient damages the process's memory."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from spknet.config import ModelConfig
from spknet.models import MODELS, build_model
from spknet.models.convolution import Conv2d

TRAIN = """
import sys, torch
from spknet.models.convolution import Conv2d
kind = getattr(torch, sys.argv[1])
layer = Conv2d(8, 16, 1, 2, bias=False).to(kind).to(memory_format=torch.channels_last)
x = torch.randn(64, 8, 80, 98).to(kind).contiguous(memory_format=torch.channels_last).requires_grad_()
for _ in range(5):
    y = layer(x)
    y.backward(torch.ones_like(y))
    x.grad = layer.weight.grad = None
"""


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_strided_1x1_convolution_of_few_channels_leaves_memory_alone(kind):
    """With nn.Conv2d in its place each of these processes dies of a segmentation fault or an abort."""
    done = subprocess.run([sys.executable, "-c", TRAIN, kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stride", [2, (2, 1)])
def test_its_output_and_gradients_are_those_of_the_sums_written_out(stride):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, 9, dtype=torch.float64, generator=generator, requires_grad=True)
    layer = Conv2d(5, 4, 1, stride).double()
    down, across = layer.stride
    dy = torch.randn(3, 4, 4, len(range(0, 9, across)), dtype=torch.float64, generator=generator)
    y = layer(x)
    y.backward(dy)
    seen, weight = x.detach()[:, :, ::down, ::across], layer.weight.detach()[:, :, 0, 0]
    expected = torch.einsum("oi,bift->boft", weight, seen) + layer.bias.detach()[:, None, None]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.weight.grad[:, :, 0, 0], torch.einsum("boft,bift->oi", dy, seen))
    torch.testing.assert_close(layer.bias.grad, dy.sum((0, 2, 3)))
    expected = torch.zeros_like(x)
    expected[:, :, ::down, ::across] = torch.einsum("oi,boft->bift", weight, dy)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("name", MODELS)
def test_no_network_has_another_one_of_few_channels(name):
    encoder = MODELS[name].encoders[0]
    for width in (0.125, 0.5):
        with torch.device("meta"):
            try:
                model = build_model(ModelConfig(name=name, encoder=encoder, embedding_size=16, width=width))
            except ValueError:  # of one width only
                continue
        for part in model.modules():
            if isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.stride != (1, 1):
                assert isinstance(part, Conv2d) or part.in_channels >= 16
