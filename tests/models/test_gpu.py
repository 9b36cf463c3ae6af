"""What a GPU would be given, without one: fake tensors that say `cuda` go through augmentation, networks and losses.

torch refuses an operation of tensors on two devices, so one that was left on the CPU is an error, and so is whatever asks for a value
or for a shape that depends on values. Numbers are not computed.
"""

import gc

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from spknet.config import AugmentConfig, LossConfig, ModelConfig
from spknet.data import channel
from spknet.data.augment import Augmenter
from spknet.data.mixing import mix
from spknet.losses import LOSSES, build_loss
from spknet.models import MODELS, build_model

pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")


@pytest.fixture(scope="module")
def fake():
    """The mode in which tensors are fake; one for all tests, since tables are kept from call to call."""
    with torch.backends.cudnn.flags(enabled=False):  # its LSTM would look for the driver
        yield FakeTensorMode()
    for table in (channel.resampler, channel._band_kernel, channel._g711_table):
        table.cache_clear()
    gc.collect()


def on_gpu(module: nn.Module) -> nn.Module:
    """module.cuda() for fake tensors: what it moves, and nothing else."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.detach().to("cuda"), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to("cuda"))
    return module


def network(name: str) -> nn.Module:
    encoder = MODELS[name].encoders[0]
    config = ModelConfig(name=name)
    return on_gpu(build_model(config if config.encoder in MODELS[name].encoders else ModelConfig(name, encoder, 256)))


@pytest.mark.parametrize("name", MODELS)
def test_a_network_trains_and_embeds_on_the_device_of_its_weights(name, fake):
    with fake:
        model = network(name)
        waves, masks = torch.randn(4, 16000, device="cuda"), torch.rand(4, 4, 2, dtype=torch.float64, device="cuda")
        embeddings = model(waves, masks)
        labels, draws = torch.arange(2, device="cuda"), torch.rand(2, 2, dtype=torch.float64, device="cuda")
        loss, accuracy = on_gpu(build_loss(LossConfig(), embeddings.shape[1], 1, 2))(
            embeddings.unflatten(0, (2, 2)), labels, draws
        )
        assert loss.device.type == accuracy.device.type == "cuda"
        assert (embeddings.device.type, len(embeddings)) == ("cuda", 4)
        model.eval()
        with torch.no_grad():
            assert model(torch.randn(2, 23456, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_computed_on_the_device_of_the_embeddings(name, fake):
    options = {"name": name, "top_k": 3, "sub_centers": 2} if name in ("amsoftmax", "aamsoftmax") else {"name": name}
    with fake:
        loss = on_gpu(build_loss(LossConfig(**options), 32, 20, 2))
        labels, draws = torch.arange(5, device="cuda"), torch.rand(5, 2, dtype=torch.float64, device="cuda")
        found = loss(torch.randn(5, 2, 32, device="cuda", requires_grad=True), labels, draws)
        assert [value.device.type for value in found] == ["cuda", "cuda"]


AUGMENT = {
    "preset": "kaldi",
    "probability": 1.0,
    "speed": [0.9, 1.0, 1.1],
    "spec_augment": True,
    "lowpass": 0.5,
    "telephone": 0.5,
    "dither": 1.0,
    "gain_db": [-6.0, 6.0],
}


@pytest.mark.parametrize("rir", ["aligned", "unit_energy"])
@pytest.mark.parametrize("level", ["kept", "power", "peak"])
def test_augmentation_is_mixed_on_the_device_of_the_crops(rir, level, fake, noise_and_rir):
    noise, responses = map(str, noise_and_rir)
    options = {"noise_shards": noise, "rir_shards": responses, "rir": rir, "level": level, "talkers_apart": True}
    augmenter = Augmenter(AugmentConfig(**AUGMENT, **options), 0, 8000, 16000)
    drawn = augmenter.read(0, np.arange(32))
    assert {"speed_of_90", "rir", "noise", "lowpass_of", "telephone_of", "dither", "masks"} <= set(drawn)
    for value in drawn.values():
        assert not isinstance(value, (torch.Tensor, np.ndarray)) or len(value), "nothing of a kind was drawn"
    with fake:
        moved = {
            name: fake.from_tensor(torch.as_tensor(value)).to("cuda")
            if isinstance(value, (torch.Tensor, np.ndarray))
            else value
            for name, value in drawn.items()
        }
        crops = torch.zeros(32, augmenter.read_samples, dtype=torch.int16, device="cuda")
        waves = mix(crops, moved, 8000, torch.float32)
    assert (waves.device.type, waves.shape) == ("cuda", (32, 8000))


class Forgetful(nn.Module):
    """A network with a table that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(8, 8), torch.ones(8)

    def forward(self, x):
        return self.layer(x) * self.table


def test_a_tensor_left_on_the_cpu_is_an_error_here(fake):
    with fake:
        model = on_gpu(Forgetful())
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            model(torch.randn(2, 8, device="cuda"))
        with pytest.raises(DataDependentOutputException):
            torch.randn(2, device="cuda").sum().item()
