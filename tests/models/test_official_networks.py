"""Networks against what the official code computes with the same weights, in float64, and against the published sizes.

tests/reference/networks.json holds every eighth part of the outputs (values 0, D/8, 2 D/8, ...) of
../shared/reference/modern, and a digest of the names and shapes that the weights are made from; where that folder is,
all of it is compared.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spknet.config import ConfigError, ModelConfig
from spknet.models import build_model
from tests.models.test_models import made_weights, reference_waves

HERE = Path(__file__).resolve().parents[1] / "reference"
OFFICIAL = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "modern"
NETWORKS = {
    "ws-ResNet34-TSTP-256": ModelConfig(name="ResNet34"),
    "ws-ResNet34-TSTP-256-two": ModelConfig(name="ResNet34", two_emb_layer=True),
    "3ds-ResNet34-two-256": ModelConfig(name="ResNet34", variant="3dspeaker"),
    "ws-ResNet50-TSTP-256": ModelConfig(name="ResNet50"),
    "ws-ResNet221-TSTP-256": ModelConfig(name="ResNet221"),
    "ws-ECAPA-GLOB-c512-192": ModelConfig(name="ECAPA-512"),
    "ws-ECAPA-GLOB-c1024-192": ModelConfig(name="ECAPA-1024"),
    "sb-ECAPA-512-192": ModelConfig(name="ECAPA-512", variant="speechbrain"),
    "ws-CAMPP-512": ModelConfig(name="CAM++"),
    "3ds-CAMPP-192": ModelConfig(name="CAM++", variant="3dspeaker", embedding_size=192),
    "ws-Gemini60-256": ModelConfig(name="DF-ResNet60"),
    "ws-SimAM34-ASP-32-256": ModelConfig(name="SimAM-ResNet34", width=0.5),
    "ws-Res2Net34-256": ModelConfig(name="Res2Net34"),
    "3ds-ERes2NetV2-192": ModelConfig(name="ERes2NetV2"),
}
# Our names of parameters -> the official ones, where they differ: the inverse of the networks' `renames`, written apart from it.
ECAPA_BLOCK = {"0.conv.": "tdnn1.conv.conv.", "0.bn.": "tdnn1.norm.norm.", "2.conv.": "tdnn2.conv.conv."}
ECAPA_BLOCK |= {"2.bn.": "tdnn2.norm.norm.", "3.linear1.": "se_block.conv1.conv.", "3.linear2.": "se_block.conv2.conv."}
ECAPA_BLOCK |= {f"1.convs.{i}.": f"res2net_block.blocks.{i}.conv.conv." for i in range(7)}
ECAPA_BLOCK |= {f"1.bns.{i}.": f"res2net_block.blocks.{i}.norm.norm." for i in range(7)}
SPEECHBRAIN = {
    "layer1.conv.": "blocks.0.conv.conv.",
    "layer1.bn.": "blocks.0.norm.norm.",
    **{f"layer{n + 1}.se_res2block.{a}": f"blocks.{n}.{b}" for n in (1, 2, 3) for a, b in ECAPA_BLOCK.items()},
    "conv.": "mfa.conv.conv.",
    "conv_bn.": "mfa.norm.norm.",
    "pool.linear1.": "asp.tdnn.conv.conv.",
    "pool.norm.": "asp.tdnn.norm.norm.",
    "pool.linear2.": "asp.conv.conv.",
    "bn.": "asp_bn.norm.",
    "linear.": "fc.conv.",
}
SIMAM = {"pool.squeeze.": "pooling.attention.0.", "pool.norm.": "pooling.attention.2."}
SIMAM |= {
    "pool.expand.": "pooling.attention.3.",
    "seg_1.": "bottleneck.",
    "conv1.": "front.conv1.",
    "bn1.": "front.bn1.",
}
SIMAM |= {f"layer{i}.": f"front.layer{i}." for i in (1, 2, 3, 4)}
PREFIXES = {"sb-ECAPA-512-192": SPEECHBRAIN, "ws-SimAM34-ASP-32-256": SIMAM}


def official_keys(name: str, model: torch.nn.Module) -> dict[str, list[int]]:
    """Names and shapes of the official state dict, made from our own."""
    keys, prefixes = {}, PREFIXES.get(name, {})
    for key, value in model.state_dict().items():
        if key.startswith("features.") or key.endswith("num_batches_tracked"):
            continue
        ours = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        theirs, shape = prefixes.get(ours, "") + key.removeprefix(ours), list(value.shape)
        if name.startswith("sb-") and len(shape) == 2:  # SpeechBrain's linear layers are 1x1 convolutions
            shape.append(1)
        keys[theirs.replace(".shortcut.", ".downsample.") if name.startswith("ws-SimAM") else theirs] = shape
    return keys


def official_facts(name: str) -> dict | None:
    """All that the official code gave; None where that is not at hand, which CI does not allow."""
    path = OFFICIAL / f"{name}.json"
    assert path.is_file() or not os.environ.get("CI"), f"{path} is not there; tests/reference alone proves only a part"
    return json.loads(path.read_text()) if path.is_file() else None


def features(batch: int, frames: int, bands: int) -> torch.Tensor:
    x = np.random.default_rng(9).standard_normal((batch, frames, bands)).astype(np.float32)
    return torch.from_numpy(x).double()


def with_weights(model: torch.nn.Module, keys: dict[str, list[int]], salt: str = "") -> torch.nn.Module:
    """The network with the weights of the rule, loaded under the official names, in float64 and eval mode."""
    state = model.from_official(made_weights({"keys": keys, "salt": salt, "kept": []}))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("features.") or key.endswith("num_batches_tracked") for key in missing)
    return model.double().eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_embeddings_equal_those_of_the_official_code(name):
    trimmed = json.loads((HERE / "networks.json").read_text())[name]
    model = build_model(NETWORKS[name])
    assert sum(p.numel() for p in model.parameters()) == trimmed["parameters"]
    keys = official_keys(name, model)
    lines = "\n".join(f"{key} {shape}" for key, shape in sorted(keys.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == trimmed["keys_sha256"]
    model = with_weights(model, keys)
    full = {i["input"]: i["output_float64"] for i in (official_facts(name) or {"inputs": []})["inputs"]}
    for what, part in trimmed["inputs"].items():
        with torch.no_grad():
            if what.startswith("waves"):  # through its own front end, whose reference is in float32
                found, tolerance = model.float()(reference_waves()[:2]).numpy(), 1e-5
            else:
                lengths = [torch.tensor([1.0, 0.6])] if "relative lengths" in what else []
                found = model.double().embed_features(features(2, int(what.split(",")[1]), 80), *lengths).numpy()
                tolerance = 1e-8
        largest = np.abs(found).max()
        np.testing.assert_allclose(found[:, :: found.shape[1] // 8], part, rtol=0, atol=tolerance * largest)
        if full:
            np.testing.assert_allclose(found, full[what], rtol=0, atol=tolerance * largest)


def test_every_network_of_the_reference_is_compared():
    compared = {*NETWORKS, *json.loads((HERE / "redimnet.json").read_text())}
    assert len(compared) == 22  # the files that name a network
    if OFFICIAL.is_dir():
        assert compared == {p.stem for p in OFFICIAL.glob("*.json") if "model" in json.loads(p.read_text())}


PARAMETERS = {  # networks.md, A.0: official classes instantiated
    "ResNet18": 4105440,
    "ResNet34": 6634336,
    "ResNet50": 11131360,
    "ResNet101": 15892448,
    "ResNet152": 19814880,
    "ResNet221": 23792224,
    "ResNet293": 28626016,
    "ECAPA-512": 6190720,
    "ECAPA-1024": 14657088,
    "CAM++": 7176224,
    "ERes2NetV2": 17859632,
    "Res2Net34": 4689024,
    "DF-ResNet60": 4047840,
    "DF-ResNet114": 6531552,
    "DF-ResNet183": 9196384,
    "DF-ResNet237": 11680096,
    "SimAM-ResNet34": 25213760,
    "SimAM-ResNet100": 50232896,
}
OTHER_PARAMETERS = [
    (6700128, ModelConfig(name="ResNet34", variant="3dspeaker")),
    (6343648, ModelConfig(name="ResNet34", variant="3dspeaker", embedding_size=192)),
    (5797504, ModelConfig(name="ECAPA-512", encoder="ASTP")),
    (14263872, ModelConfig(name="ECAPA-1024", encoder="ASTP")),
    (20767552, ModelConfig(name="ECAPA-1024", variant="speechbrain")),
    (6194048, ModelConfig(name="ECAPA-512", variant="speechbrain")),
    (15444544, ModelConfig(name="ECAPA-1024", variant="taoruijie")),  # its README: 14.73 M, divided by 1024^2
    (6848544, ModelConfig(name="CAM++", embedding_size=192)),
    (53513632, ModelConfig(name="ERes2NetV2", variant="w24s4e4")),
    (7292640, ModelConfig(name="SimAM-ResNet34", width=0.5)),
]


@pytest.mark.parametrize(
    "parameters, config", [(n, ModelConfig(name=name)) for name, n in PARAMETERS.items()] + OTHER_PARAMETERS
)
def test_every_size_has_the_published_parameters(parameters, config):
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def taoruijie(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """TaoRuijie's ECAPA-TDNN from its description (networks.md, A.2): features (batch, bands, frames) -> embeddings."""

    def norm(name, y):
        mean, variance, scale, shift = (w[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, variance, scale, shift)

    def conv(name, y, **options):
        return F.conv1d(y, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def block(name, y, dilation):
        groups = norm(f"{name}.bn1", conv(f"{name}.conv1", y).relu()).chunk(8, 1)
        done = []
        for i in range(7):
            seen = groups[i] + done[-1] if done else groups[i]
            z = conv(f"{name}.convs.{i}", seen, padding=dilation, dilation=dilation).relu()
            done.append(norm(f"{name}.bns.{i}", z))
        z = norm(f"{name}.bn3", conv(f"{name}.conv3", torch.cat([*done, groups[7]], 1)).relu())
        gate = conv(f"{name}.se.se.3", conv(f"{name}.se.se.1", z.mean(2, keepdim=True)).relu()).sigmoid()
        return z * gate + y

    x = norm("bn1", conv("conv1", x, padding=2).relu())
    x1 = block("layer1", x, 2)
    x2 = block("layer2", x + x1, 3)
    x3 = block("layer3", x + x1 + x2, 4)
    x = conv("layer4", torch.cat([x1, x2, x3], 1)).relu()
    seen = torch.cat([x, x.mean(2, True).expand_as(x), x.var(2, keepdim=True).clamp(min=1e-4).sqrt().expand_as(x)], 1)
    hidden = norm("attention.2", conv("attention.0", seen).relu()).tanh()
    weights = conv("attention.4", hidden).softmax(2)
    mean = (x * weights).sum(2)
    deviation = ((x**2 * weights).sum(2) - mean**2).clamp(min=1e-4).sqrt()
    pooled = norm("bn5", torch.cat([mean, deviation], 1))
    return norm("bn6", F.linear(pooled, w["fc6.weight"], w["fc6.bias"]))


def taoruijie_keys(channels: int, bands: int, size: int, wide: int) -> dict[str, list[int]]:
    keys = {"conv1": [channels, bands, 5], "bn1": [channels], "layer4": [wide, 3 * channels, 1], "bn5": [2 * wide]}
    keys |= {"attention.0": [256, 3 * wide, 1], "attention.2": [256], "attention.4": [wide, 256, 1]}
    keys |= {"fc6": [size, 2 * wide], "bn6": [size]}
    for n in (1, 2, 3):
        one = {"conv1": [channels, channels, 1], "bn1": [channels], "conv3": [channels, channels, 1], "bn3": [channels]}
        one |= {"se.se.1": [128, channels, 1], "se.se.3": [channels, 128, 1]}
        one |= {f"convs.{i}": [channels // 8, channels // 8, 3] for i in range(7)}
        one |= {f"bns.{i}": [channels // 8] for i in range(7)}
        keys |= {f"layer{n}.{key}": shape for key, shape in one.items()}
    full = {}
    for key, shape in keys.items():
        full |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
        if len(shape) == 1:
            full |= {f"{key}.running_mean": shape, f"{key}.running_var": shape}
    return full


def test_taoruijies_ecapa_equals_its_description():
    model = build_model(ModelConfig(name="ECAPA-512", variant="taoruijie", width=0.25))
    keys = taoruijie_keys(128, 80, 192, 384)
    model = with_weights(model, keys)
    weights = {k: v.double() for k, v in made_weights({"keys": keys, "salt": "", "kept": []}).items()}
    x = features(2, 60, 80)
    with torch.no_grad():
        torch.testing.assert_close(model.embed_features(x), taoruijie(weights, x.mT), rtol=1e-10, atol=1e-12)


def test_no_model_of_another_variant_is_built():
    with pytest.raises(ConfigError, match="model.variant speechbrain: ResNet34 has no such variant; it has wespeaker"):
        build_model(ModelConfig(name="ResNet34", variant="speechbrain"))
