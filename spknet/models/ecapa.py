"""ECAPA-TDNN (Desplanques et al., 2020, arXiv 2005.07143) in the three versions that people have weights of.

512 or 1024 channels C; frames stay 10 ms apart.

    layer1    convolution over 5 frames, bands -> C
    layer2-4  SE-Res2 blocks, dilations 2, 3, 4: 1x1 · Res2 over 8 groups of C/8 · 1x1 · squeeze and excitation · + input
    conv      1x1 of the three blocks' outputs, 3C -> 1536, ReLU
    pool      attentive statistics with global context · norm · Linear 192

With `model.pool_input` the features and their differences over two frames are further channels of the pooling (ours).
Their means and deviations are the averaged cepstra that tell speakers of few data apart, and the last layer weighs them.

Every layer is convolution with bias, ReLU, norm. In Res2 each group but one goes through a convolution over 3 frames
of its own that also sees the group before it.

    model.variant              wespeaker            speechbrain                    taoruijie
    input of blocks 2, 3       the block before     the block before               the sum of layer1 and all blocks before
    group left as it is        the last             the first                      the last
    before the pooling         1536                 1536 (3072 with C = 1024), norm   1536
    attention                  128, tanh            128, ReLU, norm, tanh          256, ReLU, norm, tanh
    floor of variances         1e-7                 1e-12, biased                  clamped at 1e-4
    after the last layer       -                    -                              norm
    padding                    zeros                reflection                     zeros

`speechbrain` leaves padding out of means, deviations and attention when it is given `lengths`; convolutions still see
it, so that the embedding of a padded row is near the one it has alone, not equal. Names of parameters are
WeSpeaker's; `renames` has the others'.

    ECAPA1024(ModelConfig(name="ECAPA-1024"))(waves)  # (batch, samples) -> (batch, 192)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spknet.config import ModelConfig
from spknet.models.network import Network
from spknet.models.pooling import POOLINGS, AttentiveStatistics, build_pooling

GROUPS = 8
FROM_SPEECHBRAIN = [
    (r"(conv|norm)\.\1\.", r"\1."),
    (r"^blocks\.0\.", "layer1."),
    (r"^blocks\.1\.", "layer2.se_res2block."),
    (r"^blocks\.2\.", "layer3.se_res2block."),
    (r"^blocks\.3\.", "layer4.se_res2block."),
    (r"\.tdnn1\.", ".0."),
    (r"\.res2net_block\.blocks\.(\d)\.conv\.", r".1.convs.\1."),
    (r"\.res2net_block\.blocks\.(\d)\.norm\.", r".1.bns.\1."),
    (r"\.tdnn2\.", ".2."),
    (r"\.se_block\.conv(\d)\.conv\.", r".3.linear\1."),
    (r"^asp\.tdnn\.conv\.", "pool.linear1."),
    (r"^asp\.tdnn\.norm\.", "pool.norm."),
    (r"^asp\.conv\.", "pool.linear2."),
    (r"^asp_bn\.norm\.", "bn."),
    (r"^mfa\.conv\.", "conv."),
    (r"^mfa\.norm\.", "conv_bn."),
    (r"^fc\.conv\.", "linear."),
    (r"(layer\d(?:\.se_res2block\.[02])?)\.norm\.", r"\1.bn."),
]
FROM_TAORUIJIE = [
    (r"^layer4\.", "conv."),
    (r"^layer3\.", "layer4.se_res2block."),
    (r"^layer2\.", "layer3.se_res2block."),
    (r"^layer1\.", "layer2.se_res2block."),
    (r"\.(conv|bn)1\.", r".0.\1."),
    (r"\.(convs|bns)\.", r".1.\1."),
    (r"\.(conv|bn)3\.", r".2.\1."),
    (r"\.se\.se\.1\.", ".3.linear1."),
    (r"\.se\.se\.3\.", ".3.linear2."),
    (r"^(conv|bn)1\.", r"layer1.\1."),
    (r"^attention\.0\.", "pool.linear1."),
    (r"^attention\.2\.", "pool.norm."),
    (r"^attention\.4\.", "pool.linear2."),
    (r"^bn5\.", "bn."),
    (r"^fc6\.", "linear."),
    (r"^bn6\.", "bn2."),
]


class ConvReluNorm(nn.Module):
    """(batch, inputs, frames) -> (batch, outputs, frames)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, padding_mode: str = "zeros"):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, padding_mode=padding_mode)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).relu())


class Res2(nn.Module):
    """Channels in 8 groups, one of them left as it is (Gao et al., 2021): (batch, channels, frames) -> the same shape."""

    def __init__(self, channels: int, dilation: int, padding_mode: str, first_untouched: bool):
        super().__init__()
        width, self.first_untouched = channels // GROUPS, first_untouched
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation, padding_mode=padding_mode)
            for _ in range(GROUPS - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(GROUPS - 1))

    def forward(self, x: Tensor) -> Tensor:
        groups = list(x.chunk(GROUPS, dim=1))
        untouched = groups.pop(0 if self.first_untouched else -1)
        done: list[Tensor] = []
        for group, conv, bn in zip(groups, self.convs, self.bns):
            seen = done[-1] + group if done else group
            done.append(bn(conv(seen).relu()))
        return torch.cat([untouched, *done] if self.first_untouched else [*done, untouched], dim=1)


class SqueezeExcitation(nn.Module):
    """Each channel times a gate made from all channels' means, bottleneck 128 (Hu et al., 2018)."""

    def __init__(self, channels: int, bottleneck: int = 128):
        super().__init__()
        self.linear1 = nn.Linear(channels, bottleneck)
        self.linear2 = nn.Linear(bottleneck, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mean = x.mean(dim=2) if mask is None else (x * mask).sum(dim=2) / mask.sum(dim=2)
        return x * self.linear2(self.linear1(mean).relu()).sigmoid()[:, :, None]


class Block(nn.Module):
    """SE-Res2 block: (batch, channels, frames) -> the same shape. mask (batch, 1, frames): 0 where there is padding."""

    def __init__(self, channels: int, dilation: int, padding_mode: str, first_untouched: bool):
        super().__init__()
        self.se_res2block = nn.ModuleList(
            [
                ConvReluNorm(channels, channels, 1),
                Res2(channels, dilation, padding_mode, first_untouched),
                ConvReluNorm(channels, channels, 1),
                SqueezeExcitation(channels),
            ]
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        before, res2, after, gate = self.se_res2block
        return x + gate(after(res2(before(x))), mask)


class ClampedAttention(AttentiveStatistics):
    """TaoRuijie's: the context's variance is clamped, not raised, at the floor."""

    def spread(self, x: Tensor) -> Tensor:
        return x.var(dim=2, keepdim=True).clamp(min=self.floor).sqrt()


class MaskedAttention(AttentiveStatistics):
    """SpeechBrain's: biased variances, and frames of padding count nowhere."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(x[:1, :1]) if mask is None else mask.to(x.dtype)
        seen = torch.cat([x, *(s.expand_as(x) for s in self.moments(x, mask / mask.sum(dim=2, keepdim=True)))], dim=1)
        weights = self.weights(seen).masked_fill(mask == 0, -torch.inf).softmax(dim=2)
        return torch.cat(self.moments(x, weights), dim=1)[:, :, 0]

    def moments(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean and deviation, (batch, channels, 1) each."""
        mean = (x * weights).sum(dim=2, keepdim=True)
        variance = ((x - mean).square() * weights).sum(dim=2, keepdim=True)
        return mean, variance.clamp(min=self.floor).sqrt()


class ECAPA(Network):
    """waves (batch, samples) -> (batch, embedding_size); see spknet.models.network."""

    variants = ("wespeaker", "speechbrain", "taoruijie")
    renames = {"speechbrain": FROM_SPEECHBRAIN, "taoruijie": FROM_TAORUIJIE}
    norm_after_pooling = True
    channels: int

    def build(self, config: ModelConfig) -> None:
        speechbrain = self.variant == "speechbrain"
        padding = "reflect" if speechbrain else "zeros"
        channels = GROUPS * max(1, round(self.channels * config.width / GROUPS))
        wide = 3 * channels if speechbrain else max(8, round(1536 * config.width))
        self.layer1 = ConvReluNorm(self.bands, channels, 5, padding)
        self.layer2 = Block(channels, 2, padding, speechbrain)
        self.layer3 = Block(channels, 3, padding, speechbrain)
        self.layer4 = Block(channels, 4, padding, speechbrain)
        self.conv = nn.Conv1d(3 * channels, wide, 1)
        self.conv_bn = nn.BatchNorm1d(wide) if speechbrain else None
        self.pool_input = config.pool_input
        wide += 2 * self.bands * self.pool_input
        self.pool = self.build_pool(config.encoder, wide)
        self.bn = nn.BatchNorm1d(POOLINGS[config.encoder] * wide)
        self.linear = nn.Linear(POOLINGS[config.encoder] * wide, config.embedding_size)
        self.bn2 = nn.BatchNorm1d(config.embedding_size) if self.variant == "taoruijie" else None
        self.takes_lengths = isinstance(self.pool, MaskedAttention)
        if speechbrain:  # reflection by 4 frames, the dilation of the last block, needs a fifth
            self.fewest_frames = max(self.fewest_frames, 5)

    def build_pool(self, encoder: str, channels: int) -> nn.Module:
        if encoder == "ASTP-GLOB" and self.variant == "speechbrain":
            return MaskedAttention(channels, context=True, norm=True, floor=1e-12)
        if encoder == "ASTP-GLOB" and self.variant == "taoruijie":
            return ClampedAttention(channels, context=True, bottleneck=256, norm=True, floor=1e-4)
        return build_pooling(encoder, channels)

    def frames(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        mask = None if lengths is None else length_mask(lengths, x.shape[2])
        x1 = self.layer1(x)
        x2 = self.layer2(x1, mask)
        sums = self.variant == "taoruijie"
        x3 = self.layer3(x1 + x2 if sums else x2, mask)
        x4 = self.layer4(x1 + x2 + x3 if sums else x3, mask)
        y = self.conv(torch.cat([x2, x3, x4], dim=1)).relu()
        y = y if self.conv_bn is None else self.conv_bn(y)
        return torch.cat([y, x, differences(x)], dim=1) if self.pool_input else y

    def embed_frames(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        pooled = self.pool(x) if lengths is None else self.pool(x, length_mask(lengths, x.shape[2]))
        y = self.linear(self.bn(pooled))
        return y if self.bn2 is None else self.bn2(y)


def differences(x: Tensor) -> Tensor:
    """The frame after less the frame before, ends repeated: (batch, bands, frames) -> the same shape."""
    x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
    return x[:, :, 2:] - x[:, :, :-2]


def length_mask(lengths: Tensor, frames: int) -> Tensor:
    """(batch,) parts of `frames` in (0, 1] -> (batch, 1, frames), 1 where a frame is no padding.

    In float32 as SpeechBrain's, where 0.6 * 100 is a little more than 60 and lets frame 61 in.
    """
    return (torch.arange(frames, device=lengths.device) < lengths.float()[:, None] * frames).float()[:, None]


class ECAPA512(ECAPA):
    channels = 512


class ECAPA1024(ECAPA):
    channels = 1024
