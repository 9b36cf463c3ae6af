"""ReDimNet and ReDimNet2 against the official code's numbers, and how they train."""

import hashlib
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from spknet.config import ConfigError, ModelConfig
from spknet.models import build_model
from spknet.models.redimnet import LAYOUTS
from tests.models.test_front_ends import sounds
from tests.models.test_official_networks import official_facts

REFERENCE = json.loads((Path(__file__).resolve().parents[1] / "reference" / "redimnet.json").read_text())
SMALL = ["ReDimNet-B0", "ReDimNet-B1", "ReDimNet-B4", "ReDimNet2-B0", "ReDimNet2-B6"]  # every kind of block


def config_of(file: str) -> ModelConfig:
    family, size, *gnorm = file.split("-")
    return ModelConfig(family.replace("redimnet", "ReDimNet") + "-" + size.upper(), agg_gnorm=bool(gnorm))


def official_keys(model: torch.nn.Module) -> dict[str, list[int]]:
    """Their names of the parameters and statistics, in their order, and the shapes."""
    keys = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"(backbone\.stage\d+\.\d+\.)(conv\d|bn\d|se|dwconv|norm|pwconv)", r"\1conv_block.\2", name)
        name = name.replace("dwconv.", "dwconvs.0.").replace("excitation", "exitation")
        if not name.endswith("num_batches_tracked"):
            keys[name] = list(value.shape)
    return keys


def made_weights(keys: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The weights that the README of the reference describes."""
    made = {}
    for key, shape in keys.items():
        draws = np.random.default_rng(zlib.crc32(key.encode()))
        if key.endswith("running_var"):
            value = draws.uniform(0.5, 1.5, shape)
        elif key.endswith("running_mean"):
            value = 0.1 * draws.standard_normal(shape)
        elif key.endswith(".w"):
            value = draws.standard_normal(shape)
        elif len(shape) <= 1:
            value = draws.uniform(0.5, 1.5, shape) if key.endswith(".weight") else 0.1 * draws.standard_normal(shape)
        else:
            value = draws.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        made[key] = torch.from_numpy(np.asarray(value, np.float32))
    return made


@pytest.mark.parametrize("file", REFERENCE)
def test_embeddings_equal_the_official_code_s(file):
    facts, model = REFERENCE[file], build_model(config_of(file)).eval()
    keys = official_keys(model)
    listed = "\n".join(f"{key} {shape}" for key, shape in keys.items())
    assert hashlib.sha256(listed.encode()).hexdigest() == facts["keys_sha256"]
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    left_out = model.load_state_dict(model.from_official(made_weights(keys)), strict=False)
    assert all(key.endswith("num_batches_tracked") for key in left_out.missing_keys)
    model.double()
    whole = {one["input"]: one["output_float64"] for one in (official_facts(file) or {"inputs": []})["inputs"]}
    with torch.no_grad():
        for name, expected in facts["inputs"].items():
            if name == "waves(2, 48240)":
                found, allowed = model(sounds(2, 48240)), 1e-4
            else:
                shape = tuple(map(int, re.findall(r"\d+", name)))
                features = np.random.default_rng(9).standard_normal(shape).astype(np.float32)
                found, allowed = model.embed_features(torch.from_numpy(features).double()), 1e-8
            difference = found[:, ::24] - torch.tensor(expected["output_float64"], dtype=torch.float64)
            assert difference.abs().max() / expected["largest_value"] < allowed
            if whole:
                difference = found - torch.tensor(whole[name], dtype=torch.float64)
                assert difference.abs().max() / expected["largest_value"] < allowed


def test_parameters_of_every_size_are_the_published_ones():
    first = [1004251, 2126937, 5067057, 3225021, 6441521, 7659761, 15015473]
    second = [1115220, 2161488, 3677760, 4181576, 6659744, 8959272, 12394784]
    with_norms = [1127316, 2177616, 3697920, 4205768, 6692000, 9007656, 12459296]
    with torch.device("meta"):
        for name, plain, normed in zip(LAYOUTS, first + second, first + with_norms):
            for group_norms, expected in ((False, plain), (True, normed)):
                model = build_model(ModelConfig(name, agg_gnorm=group_norms))
                assert sum(p.numel() for p in model.parameters()) == expected


def small(name: str, **options) -> torch.nn.Module:
    return build_model(ModelConfig(name, width=0.2, embedding_size=8, **options))


@pytest.mark.parametrize("name", SMALL)
def test_every_pooling_and_precision_gives_a_finite_gradient(name):
    waves = torch.randn(2, 8000) * 0.1
    for encoder in build_model(ModelConfig(name)).encoders if name == "ReDimNet2-B0" else ("ASTP-GLOB",):
        model = small(name, encoder=encoder, agg_gnorm=True)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = model(waves)
        assert embeddings.shape == (2, 8) and embeddings.dtype == torch.float32
        embeddings.square().sum().backward()
        used = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in used)
        assert len(used) == len(list(model.parameters())) - 1  # stage 0 sums one map: its weight means nothing
        assert model.double()(waves.double()).dtype == torch.float64


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_of_one_and_short_and_long_input_give_embeddings(name):
    model = small(name).eval()
    with torch.no_grad():
        for samples in (300, 4800, 320000):
            assert model(torch.randn(1, samples) * 0.1).isfinite().all()
        three = torch.randn(3, 8000) * 0.1
        torch.testing.assert_close(model(three[1:2]), model(three)[1:2], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="at least two utterances"):
        model.train()(torch.randn(1, 8000))


def test_redimnet2_leaves_out_frames_beyond_a_multiple_of_four_and_repeats_fewer_than_four():
    model, features = small("ReDimNet2-B0").eval().double(), torch.randn(2, 43, 72, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model.embed_features(features), model.embed_features(features[:, :40]))
        one = features[:, :1]
        assert torch.equal(model.embed_features(one), model.embed_features(one.repeat(1, 4, 1)))


def test_bands_that_the_strides_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="model.n_mels 80: ReDimNet2-B2 divides its bands by 12"):
        build_model(ModelConfig("ReDimNet2-B2", n_mels=80))
