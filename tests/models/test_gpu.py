"""What a GPU would be given, without one: fake tensors that say `cuda` go through augmentation, networks and losses.

torch refuses an operation of tensors on two devices, so one that was left on the CPU is an error, and so is whatever asks for a value
or for a shape that depends on values. Numbers are not computed. Autograd's engine would look for the device, so the nodes of its graph
are called one by one.
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


def gradients_of(loss: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """leaf -> what loss.backward() would leave in its .grad."""
    order, seen, stack = [], {None}, [(loss.grad_fn, False)]
    while stack:  # each node after all that it hands gradients to
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((after, False) for after, _ in node.next_functions)]
    given, leaves = {(loss.grad_fn, 0): torch.ones_like(loss)}, {}
    for node in reversed(order):
        gradients = [given.pop((node, i), None) for i in range(len(node._input_metadata))]
        if hasattr(node, "variable"):
            leaves[node.variable] = gradients[0]
            continue
        if all(gradient is None for gradient in gradients):
            continue
        found = node(*gradients)
        for place, gradient in zip(node.next_functions, found if isinstance(found, tuple) else (found,)):
            if place[0] is not None and gradient is not None:
                gradient = gradient.sum_to_size(place[0]._input_metadata[place[1]].shape)  # what was broadcast
                given[place] = given[place] + gradient if place in given else gradient
    return leaves


def test_the_graph_is_walked_as_autograd_walks_it():
    config = ModelConfig(name="ResNet18", embedding_size=16, width=0.125)
    model, loss = build_model(config).double(), build_loss(LossConfig(), 16, 1, 2).double()
    embeddings = model(torch.randn(4, 8000, dtype=torch.float64)).unflatten(0, (2, 2))
    value, _ = loss(embeddings, torch.arange(2), torch.rand(2, 2, dtype=torch.float64))
    found = gradients_of(value)
    value.backward()
    for parameter in [*model.parameters(), *loss.parameters()]:
        torch.testing.assert_close(found[parameter], parameter.grad)


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
        gradients = gradients_of(loss)
        assert {p for p in model.parameters() if p.requires_grad} <= set(gradients)
        assert {(gradient.device.type, gradient.shape == leaf.shape) for leaf, gradient in gradients.items()} == {
            ("cuda", True)
        }
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
        embeddings = torch.randn(5, 2, 32, device="cuda", requires_grad=True)
        found = loss(embeddings, labels, draws)
        assert [value.device.type for value in found] == ["cuda", "cuda"]
        assert gradients_of(found[0])[embeddings].device.type == "cuda"


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
