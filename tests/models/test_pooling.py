"""Poolings over time against their formulas, computed with numpy."""

import numpy as np
import pytest
import torch

from spknet import rng
from spknet.models.pooling import POOLINGS, AttentiveStatistics, build_pooling, fewest_frames


def frames(channels: int = 16, count: int = 11) -> torch.Tensor:
    return torch.randn(3, channels, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def pooling(name: str, channels: int = 16) -> torch.nn.Module:
    pool = build_pooling(name, channels)
    rng.initialize(pool, 1)
    return pool.double().eval()


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def weighted(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means, then deviations of at least 1e-7: (batch, channels, frames) -> (batch, 2 channels)."""
    mean = (weights * x).sum(-1)
    variance = (weights * (x - mean[..., None]) ** 2).sum(-1)
    return np.concatenate([mean, np.sqrt(np.maximum(variance, 1e-7))], axis=1)


def conv(layer: torch.nn.Conv1d, x: np.ndarray) -> np.ndarray:
    return np.einsum("oi,bit->bot", layer.weight[:, :, 0].numpy(), x) + layer.bias.numpy()[:, None]


def check(pool: torch.nn.Module, x: torch.Tensor, expected: np.ndarray) -> None:
    with torch.no_grad():
        np.testing.assert_allclose(pool(x).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_statistics_are_mean_and_unbiased_deviation():
    x = frames()
    mean, deviation = x.numpy().mean(-1), np.sqrt(x.numpy().var(-1, ddof=1) + 1e-7)
    check(pooling("TSTP"), x, np.concatenate([mean, deviation], axis=1))
    check(pooling("TSDP"), x, deviation)
    check(build_pooling("TSDP", 16, floor=1e-2), x, np.sqrt(x.numpy().var(-1, ddof=1) + 1e-2))


@pytest.mark.parametrize("name", ["ASTP", "ASTP-GLOB"])
@torch.no_grad()
def test_attentive_statistics_weigh_each_channel_and_frame(name):
    x, pool = frames(), pooling(name)
    seen = y = x.numpy()
    if name == "ASTP-GLOB":
        context = [y.mean(-1, keepdims=True), np.sqrt(y.var(-1, ddof=1, keepdims=True) + 1e-7)]
        seen = np.concatenate([y, *(np.broadcast_to(c, y.shape) for c in context)], axis=1)
    weights = softmax(conv(pool.linear2, np.tanh(conv(pool.linear1, seen))))
    check(pool, x, weighted(y, weights))


@torch.no_grad()
def test_attention_with_a_norm_is_relu_norm_tanh():
    x, pool = frames(), AttentiveStatistics(16, context=False, bottleneck=8, norm=True, floor=1e-7).double().eval()
    torch.nn.init.normal_(pool.norm.running_mean, generator=torch.Generator().manual_seed(1))
    hidden = np.maximum(conv(pool.linear1, x.numpy()), 0) - pool.norm.running_mean.numpy()[:, None]
    hidden = hidden / np.sqrt(1 + 1e-5)
    check(pool, x, weighted(x.numpy(), softmax(conv(pool.linear2, np.tanh(hidden)))))


@torch.no_grad()
def test_a_head_of_mqmha_sees_its_own_channels_only():
    x, pool = frames(), pooling("MQMHA")
    parts = []
    for query in pool.queries:
        weights = []
        for head in range(8):  # 2 channels each, bottleneck of 64
            y = x.numpy()[:, 2 * head : 2 * head + 2]
            first, last = slice(64 * head, 64 * head + 64), slice(2 * head, 2 * head + 2)
            hidden = np.einsum("oi,bit->bot", query[0].weight[first, :, 0].numpy(), y)
            hidden = np.tanh(hidden + query[0].bias[first].numpy()[:, None])
            scores = np.einsum("oi,bit->bot", query[2].weight[last, :, 0].numpy(), hidden)
            weights.append(softmax(scores + query[2].bias[last].numpy()[:, None]))
        parts.append(weighted(x.numpy(), np.concatenate(weights, axis=1)))
    check(pool, x, np.concatenate(parts, axis=1))


@pytest.mark.parametrize("name", POOLINGS)
def test_each_makes_as_many_outputs_as_it_says_from_the_fewest_frames_it_takes(name):
    pool, x = pooling(name), frames(count=fewest_frames(name))
    assert pool(x).shape == (3, 16 * POOLINGS[name]) and pool(x).isfinite().all()


@pytest.mark.parametrize("name", POOLINGS)
def test_silence_has_a_finite_gradient(name):
    pool, x = pooling(name), torch.zeros(2, 16, 5, dtype=torch.float64, requires_grad=True)
    pool(x).sum().backward()
    assert x.grad.isfinite().all()
    if name == "TSTP":
        y = torch.zeros(2, 16, 5, requires_grad=True)
        build_pooling(name, 16, floor=0.0)(y).sum().backward()  # 3D-Speaker's CAM++ adds nothing to the variance
        assert y.grad.isfinite().all()
