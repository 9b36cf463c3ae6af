"""Networks, their front ends and encoders, against voxceleb_trainer's numbers and against small computations by hand."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from spknet import rng
from spknet.checkpoints import voxceleb_trainer as legacy_state
from spknet.config import ConfigError, FeaturesConfig, ModelConfig
from spknet.errors import run
from spknet.losses import LOSSES, build_loss
from spknet.models import MODELS, build_model
from spknet.models import describe as info
from spknet.models.features import Spectrum, apply_masks
from spknet.models.pooling import ChannelAttention, Maximum, Mean, SelfAttention
from spknet.models.resnet_se import Gate
from spknet.options import RECIPES, parse
from tests.conftest import needed

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
NETWORKS = {
    "ResNetSE34-SAP": ModelConfig(name="ResNetSE34"),
    "ResNetSE34L-SAP": ModelConfig(),
    "ResNetSE34L-ASP": ModelConfig(encoder="ASP", n_mels=64),
    "ResNetSE34L-seed-SAP": ModelConfig(window="hann", input_scale="int16"),
    "ResNetSE34V2-SAP": ModelConfig(name="ResNetSE34V2"),
    "ResNetSE34V2-ASP": ModelConfig(name="ResNetSE34V2", encoder="ASP", n_mels=64),
    "VGGVox-SAP": ModelConfig(name="VGGVox"),
    "VGGVox-TAP": ModelConfig(name="VGGVox", encoder="TAP"),
    "VGGVox-MAX": ModelConfig(name="VGGVox", encoder="MAX"),
    "VGGVox40-seed-SAP": ModelConfig(name="VGGVox40", input_scale="int16"),
    "RawNet3-ECA": ModelConfig(name="RawNet3", encoder="ECA", embedding_size=256),
}
PARAMETERS = {  # of the reference
    "ResNetSE34-SAP": 1437078,
    "ResNetSE34L-SAP": 1437078,
    "ResNetSE34L-ASP": 1502614,
    "ResNetSE34V2-SAP": 6389324,
    "ResNetSE34V2-ASP": 8028492,
    "VGGVox-SAP": 4032448,
    "VGGVox-TAP": 3769280,
    "RawNet3-ECA": 16280322,
}


def reference(name: str) -> dict:
    return json.loads(needed(REFERENCE / f"{name}.json").read_text())


def reference_waves() -> torch.Tensor:
    """Three harmonic sounds with vibrato and noise, as the reference's README makes them: (3, 48240)."""
    noise, t, rows = np.random.default_rng(7), np.arange(48240) / 16000, []
    for i in range(3):
        pitch = 100 + 40 * i + 10 * np.sin(2 * np.pi * (1 + i) * t)
        phase = 2 * np.pi * np.cumsum(pitch) / 16000
        harmonics = sum(np.sin(k * phase) / k * (1 + np.sin(2 * np.pi * 3 * t + k)) for k in range(1, 20))
        rows.append(0.05 * harmonics + 0.01 * noise.standard_normal(48240))
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def made_weights(facts: dict) -> dict[str, torch.Tensor]:
    """The weights that a reference file describes, without those it keeps."""
    made = {}
    for key, shape in facts["keys"].items():
        draws = np.random.default_rng(zlib.crc32((facts["salt"] + key).encode()))
        if key in facts["kept"]:
            continue
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif key.endswith("running_var"):
            value = draws.uniform(0.5, 1.5, shape)
        elif key.endswith("running_mean"):
            value = 0.1 * draws.standard_normal(shape)
        elif len(shape) <= 1:
            value = draws.uniform(0.5, 1.5, shape) if key.endswith(".weight") else 0.1 * draws.standard_normal(shape)
        else:
            value = draws.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        made[key] = torch.from_numpy(np.asarray(value, np.float32))
    return made


def reference_network(name: str, **changes) -> torch.nn.Module:
    """The network of a reference file with its weights, in eval mode."""
    facts = reference(name)
    model = build_model(ModelConfig(**{**NETWORKS[name].__dict__, **changes})).eval()
    found, misfit = legacy_state.fit(model, made_weights(facts))
    kept = {legacy_state.their_name(model, key) for key in ("features.sinc.low", "features.sinc.band")}
    assert not misfit.unexpected and not misfit.misshapen and set(misfit.missing) <= kept
    model.load_state_dict(found, strict=False)
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_embeddings_equal_those_of_voxceleb_trainer(name):
    model, facts = reference_network(name), reference(name)
    with torch.no_grad():
        found = model(reference_waves())
    assert relative(found, torch.tensor(facts["output"])) < 1e-4
    assert info.parameters(model) == facts["parameters"]


def test_quiet_input_shows_the_scale_and_the_floor():
    waves = reference_waves()
    with torch.no_grad():
        loud = {
            scale: reference_network("ResNetSE34L-seed-SAP", input_scale=scale)(waves) for scale in ("unit", "int16")
        }
        quiet = {
            scale: reference_network("ResNetSE34L-seed-SAP", input_scale=scale)(1e-4 * waves)
            for scale in ("unit", "int16")
        }
    assert relative(loud["unit"], loud["int16"]) < 1e-5  # the floor of 1e-6 is far below both
    assert relative(quiet["int16"], loud["int16"]) < 0.01  # 3 steps of a 16-bit integer are still far above the floor
    assert relative(quiet["unit"], loud["unit"]) > 0.1  # energies of 1e-8 times the loud ones sink below it


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert info.parameters(build_model(NETWORKS[name])) == PARAMETERS[name]


def front_end_by_numpy(wave: np.ndarray, scale: float, mels: int) -> np.ndarray:
    """Log mel energies, instance-normalised, frame by frame in float64."""
    window = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(400) / 400)
    padded = np.pad(wave.astype(np.float64) * scale, 256, mode="reflect")
    frames = [padded[i * 160 + 56 : i * 160 + 456] * window for i in range(1 + len(wave) // 160)]
    power = np.abs(np.fft.rfft(frames, 512)) ** 2
    hz = np.arange(257) * 8000 / 256
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), mels + 2) / 2595) - 1)
    bank = np.array([np.interp(hz, corners[i : i + 3], [0, 1, 0], left=0, right=0) for i in range(mels)])
    x = np.log(power @ bank.T + 1e-6).T
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("scale, factor", [("unit", 1.0), ("int16", 32768.0)])
def test_log_mel_equals_numpy_also_near_the_floor(scale, factor):
    wave = 1e-4 * reference_waves()[0, :8000].numpy()
    found = Spectrum(n_mels=40, input_scale=scale).double()(torch.from_numpy(wave)[None])[0].numpy()
    np.testing.assert_allclose(found, front_end_by_numpy(wave, factor, 40), atol=1e-4)


def test_front_end_is_float32_under_autocast_and_float64_in_float64():
    waves, spectrum = torch.randn(2, 8000) * 0.1, Spectrum(n_mels=40)
    plain = spectrum(waves)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spectrum(waves), plain)
    assert spectrum.double()(waves.double()).dtype == torch.float64


def test_magnitude_spectrum_finds_a_tone():
    t = torch.arange(16000) / 16000
    tone = torch.sin(2 * torch.pi * 1000 * t) * (
        1 + 0.5 * torch.sin(2 * torch.pi * 3 * t)
    )  # varies, or its norm is 0/0
    spectrum = Spectrum(window="hann")
    assert spectrum.bands == 257
    assert spectrum.magnitude(tone[None]).mean(dim=1).argmax() == 32  # 1000 Hz / 31.25 Hz
    assert spectrum(tone[None]).shape == (1, 257, 97)  # whole windows of 512: 1 + (16000 - 512) // 160


def test_masks_cut_bands_and_frames_to_the_mean():
    features = torch.ones(2, 10, 20)
    masks = torch.tensor([[[0.0, 0.2], [0.5, 0.6], [0.25, 0.5], [0, 0]], [[0.0, 0.0]] * 4])
    masked = apply_masks(features, masks)
    expected = torch.ones(10, 20)
    expected[[0, 1, 5]] = 0
    expected[:, 5:10] = 0
    assert torch.equal(masked[0], expected) and torch.equal(masked[1], features[1])


def test_masks_change_an_embedding_and_empty_masks_do_not():
    waves = torch.randn(1, 8000) * 0.1
    for name in ("ResNetSE34L", "RawNet3"):
        encoder = MODELS[name].encoders[0]
        model = build_model(ModelConfig(name=name, encoder=encoder, width=0.25, embedding_size=8)).eval()
        with torch.no_grad():
            plain = model(waves)
            assert torch.equal(model(waves, torch.zeros(1, 4, 2)), plain)
            assert not torch.allclose(model(waves, torch.tensor([[[0.0, 0.5]] * 4])), plain)


def test_encoders_by_hand():
    x = torch.tensor([[[1.0, 3.0, 2.0]]])  # one channel, three frames
    assert Mean()(x).item() == 2 and Maximum()(x).item() == 3
    attention = SelfAttention(1, deviation=True)
    with torch.no_grad():
        attention.linear.weight.fill_(0.5)
        attention.linear.bias.zero_()
        attention.vector.fill_(2.0)
    weights = np.exp(2 * np.tanh([0.5, 1.5, 1.0]))
    weights /= weights.sum()
    mean = weights @ [1, 3, 2]
    deviation = np.sqrt(weights @ [1, 9, 4] - mean**2)
    np.testing.assert_allclose(attention(x).detach().numpy(), [[mean, deviation]], rtol=1e-5)
    attention.deviation = False
    np.testing.assert_allclose(attention(x).detach().numpy(), [[mean]], rtol=1e-5)


def test_equal_attention_gives_plain_mean_and_deviation():
    x = torch.randn(2, 6, 30)
    pool = ChannelAttention(6, deviation=True, context=True, low=1e-4, high=1e4).eval()
    torch.nn.init.zeros_(pool.expand.weight)
    expected = torch.cat([x.mean(2), x.std(2, correction=0)], dim=1)
    torch.testing.assert_close(pool(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, encoder", [(n, e) for n, kind in MODELS.items() for e in kind.encoders])
def test_every_encoder_trains_in_bfloat16_and_in_float64(name, encoder):
    config = ModelConfig(name=name, encoder=encoder, width=0.25, embedding_size=12)
    model, waves = build_model(config), torch.randn(2, 8000) * 0.1
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model(waves)
    assert embeddings.shape == (2, 12) and embeddings.dtype == torch.float32
    embeddings.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.double()(waves.double()).dtype == torch.float64


def test_initial_weights_depend_on_the_seed_only():
    def weights(seed, noise):
        torch.manual_seed(noise)
        model = build_model(ModelConfig(width=0.5))
        rng.initialize(model, seed)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(1, 0), weights(1, 5))
    assert not torch.equal(weights(1, 0), weights(2, 0))


def test_rawnet3_filters_are_band_passes():
    bank = build_model(ModelConfig(name="RawNet3", encoder="ECA", width=0.25)).features.sinc
    low = 50 + bank.low.detach().abs()
    high = low + 50 + bank.band.detach().abs()
    gains = torch.fft.rfft(bank.filters().detach()[:, 0], 16000).abs()  # bins of 1 Hz
    peaks = gains.argmax(dim=1).view(2, -1)  # Hz, of the cosine and of the sine filters
    assert ((low[:, 0] - 60 < peaks) & (peaks < high[:, 0] + 60)).all()


def test_a_network_at_another_sample_rate():
    model = build_model(ModelConfig(width=0.25), sample_rate=8000)
    assert model(torch.randn(2, 8000)).shape == (2, 512)
    assert model.features.n_fft == 256 and model.features.hop == 80


def test_vggvox_repeats_crops_that_its_poolings_would_swallow():
    model, waves = build_model(ModelConfig(name="VGGVox", width=0.25)).eval(), torch.randn(2, 5000) * 0.1
    with torch.no_grad():
        assert torch.equal(model(waves), model(waves.repeat(1, 2)[:, : 62 * 160]))
        assert model(waves.repeat(1, 2)).shape == (2, 512)


def test_errors_name_what_would_fit():
    with pytest.raises(ConfigError, match="model.name RawNet: no such network; did you mean RawNet3"):
        build_model(ModelConfig(name="RawNet"))
    with pytest.raises(
        ConfigError, match="model.encoder ECA: ResNetSE34L has no such encoder; it takes SAP, TAP, MAX, ASP"
    ):
        build_model(ModelConfig(encoder="ECA"))
    with pytest.raises(ConfigError, match="model.encoder SAP: RawNet3 .* it takes ECA, ASP"):
        build_model(ModelConfig(name="RawNet3"))
    with pytest.raises(ConfigError, match="model.n_mels 64: VGGVox takes 40"):
        build_model(ModelConfig(name="VGGVox", n_mels=64))


def test_multiply_adds_of_a_small_network_by_hand():
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(1, 4, 10, stride=10, groups=1)
            self.fc = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.conv(x[:, None]).mean(2))

    assert info.multiply_adds(Small(), seconds=0.1) == 4 * 160 * 10 + 4 * 3


def test_info_prints_parameters_and_multiply_adds(capsys):
    assert info.main(["--model.name", "ResNetSE34L", "--seconds", "2"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert "parameters" in head and "mult-adds" in head
    assert "1,437,078" in line
    # The stem alone: 40/2 bands x 201 frames x 16 channels x 49 weights = 0.0032 * 10^9; the whole network about 0.45.
    assert 0.3 < float(line.split()[-1]) < 0.6
    assert run(info.main, ["--model.name", "none"]) == 2
    assert "no such network" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_channels_last_gives_the_same_embeddings():
    waves = torch.randn(2, 8000) * 0.1
    model = build_model(ModelConfig(width=0.5)).eval()
    with torch.no_grad():
        plain = model(waves)
        model.to(memory_format=torch.channels_last)
        model.compile()
        assert relative(model(waves), plain) < 1e-4


def test_recipes_of_the_papers_grid_build():
    recipes = sorted(path.stem for path in RECIPES.glob("loss_*.yaml"))
    assert recipes == sorted(f"loss_{name}" for name in LOSSES)
    for network, name in (("vgg_m_40", "VGGVox"), ("thin_resnet34", "ResNetSE34"), ("fast_resnet34", "ResNetSE34L")):
        model = build_model(parse(["--config", network]).model)
        assert type(model).__name__ == name
        for recipe in recipes:
            c = parse(["--config", network, "--config", recipe])
            assert c.model.name == name and recipe == f"loss_{c.loss.name}"
            assert c.data.crop_seconds == 2.015 and c.eval.crop_seconds == 4.015  # 200 and 400 frames
            build_loss(c.loss, c.model.embedding_size, 10, c.data.utterances_per_speaker)
    balanced = parse(["--config", "balanced"])
    assert (balanced.data.speakers_per_batch, balanced.data.utterances_per_speaker) == (384, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_gated_sum_has_the_value_and_gradients_of_its_formula(layout, frozen):
    gate = Gate(16).double()
    gate.squeeze.requires_grad_(not frozen)
    generator = torch.Generator().manual_seed(0)
    x, shortcut, dy = (
        torch.randn(3, 16, 5, 4, dtype=torch.float64, generator=generator).contiguous(memory_format=layout)
        for _ in range(3)
    )
    found = []
    for formula in (False, True):
        leaves = [value.clone(memory_format=torch.preserve_format).requires_grad_() for value in (x, shortcut)]
        if formula:
            factors = torch.sigmoid(gate.excite(torch.relu(gate.squeeze(leaves[0].mean(dim=(2, 3))))))
            y = torch.relu(leaves[0] * factors[:, :, None, None] + leaves[1])
        else:
            y = gate(*leaves)
        wanted = [*leaves, *(p for p in gate.parameters() if p.requires_grad)]
        found.append([y, *torch.autograd.grad(y, wanted, dy)])
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(gate(x, shortcut), found[0][0])


def test_a_batch_norm_of_the_features_keeps_the_mean_spectrum_and_masks_what_is_normal():
    given = FeaturesConfig(remove_mean=False, batch_norm=True)
    model = build_model(ModelConfig(name="ECAPA-512", width=0.03), features=given)
    waves = torch.randn(4, 8000) * torch.tensor([[0.01], [0.1], [0.5], [1.0]])
    plain = model.features(waves)
    mean = plain.mean(dim=(0, 2), keepdim=True)
    deviation = plain.var(dim=(0, 2), correction=0, keepdim=True).add(1e-5).sqrt()
    expected = (plain - mean) / deviation
    expected[:, :8] = 0  # the lowest tenth of 80 bands
    seen = []
    model.layer1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    masks = torch.tensor([[0.0, 0.1], [0.0, 0.0]]).expand(4, 2, 2)
    model(waves, masks)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)
    assert (expected[3] - expected[0]).mean() > 1  # who is louder stays louder


def test_pool_input_pools_features_and_differences_beside_the_layers():
    model = build_model(ModelConfig(name="ECAPA-512", width=0.03, encoder="TSTP", pool_input=True)).eval()
    x = torch.zeros(1, 5, 80)
    x[0, :, 3] = torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0])
    frames = model.frames(x.mT)
    assert frames.shape == (1, 46 + 160, 5)
    assert frames[0, 46 + 3].tolist() == [0, 1, 4, 9, 16]
    assert frames[0, 46 + 80 + 3].tolist() == [1, 4, 8, 12, 7]
    assert model.embed_features(x).shape == (1, 192)


@pytest.mark.parametrize(
    "name, features, options, said",
    [
        ("ResNetSE34L", {"batch_norm": True}, {}, "features.batch_norm"),
        ("ResNet18", {}, {"pool_input": True}, "pool_input"),
    ],
)
def test_networks_without_these_options_say_so(name, features, options, said):
    with pytest.raises(ConfigError, match=said):
        build_model(ModelConfig(name=name, **options), features=FeaturesConfig(**features))
