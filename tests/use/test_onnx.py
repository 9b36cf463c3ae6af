"""Networks as ONNX and .pt2 answer what torch answers, at any length and batch; and in 8-bit integers nearly so."""

import io
import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from spknet import cli, rng
from spknet.config import FeaturesConfig, LossConfig, ModelConfig
from spknet.models import MODELS, build_model, campplus, dfresnet, resnet_se
from spknet.use import export, int8, onnx_file
from spknet.use.onnx_file import ExportError, OnnxNetwork
from tests.checkpoints.test_voxceleb_trainer import own_checkpoint

# One of each family, narrow, and of as few blocks a stage as its code allows.
FAMILIES = {
    "resnet": ModelConfig(name="ResNet34", width=0.25, embedding_size=32, variant="3dspeaker"),
    "resnet_se": ModelConfig(name="ResNetSE34L", width=0.5, embedding_size=32),
    "ecapa": ModelConfig(name="ECAPA-512", width=0.125, embedding_size=32, variant="speechbrain"),
    "campplus": ModelConfig(name="CAM++", width=0.25, embedding_size=32),
    "eres2netv2": ModelConfig(name="ERes2NetV2", width=0.125, embedding_size=32),
    "dfresnet": ModelConfig(name="DF-ResNet60", width=0.25, embedding_size=32),
    "simam": ModelConfig(name="SimAM-ResNet34", width=0.125, embedding_size=32),
    "res2net": ModelConfig(name="Res2Net34", width=0.25, embedding_size=32),
    "redimnet": ModelConfig(name="ReDimNet-B0", width=0.5, embedding_size=32),
    "redimnet2": ModelConfig(name="ReDimNet2-B0", embedding_size=32, agg_gnorm=True),
    "rawnet3": ModelConfig(name="RawNet3", width=0.125, embedding_size=32, encoder="ECA"),
    "vggvox": ModelConfig(name="VGGVox", width=0.125, embedding_size=32),
    "lstm": ModelConfig(name="GE2E-LSTM", width=0.25, embedding_size=32),
}

NO_PT2 = ("lstm", "rawnet3", "vggvox")  # their graphs depend on the length


@pytest.fixture
def shallow(monkeypatch):
    monkeypatch.setattr(resnet_se, "BLOCKS", (1, 1, 1, 1))
    monkeypatch.setattr(campplus, "BLOCKS", ((2, 1), (2, 2), (2, 2)))
    monkeypatch.setattr(dfresnet.DFResNet60, "depths", (1, 1, 1, 1))
    for name in ("ResNet34", "ERes2NetV2", "SimAM-ResNet34", "Res2Net34"):
        monkeypatch.setattr(MODELS[name], "blocks", (1, 1, 1, 1))


def network_of(config: ModelConfig) -> torch.nn.Module:
    """Initialised, with BatchNorm's statistics of a second of noise."""
    network = build_model(config)
    rng.initialize(network, 1)
    with torch.no_grad():
        network(0.1 * torch.randn(8, 16000, generator=torch.Generator().manual_seed(0)))
    return network.eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_network_of_each_family_answers_the_same_as_onnx_and_pt2(family, shallow):
    network = network_of(FAMILIES[family])
    program = onnx_file.graph(network)
    made = OnnxNetwork(onnx_file.to_onnx(program, {"sample_rate": "16000"}), 1)
    rows = onnx_file.check(network, made, 16000)
    assert [seconds for seconds, _, _ in rows] == [0.5, 2.0, 7.3, 30.0]
    assert min(cosine for _, cosine, _ in rows) > 0.99999 and max(difference for _, _, difference in rows) < 1e-4
    waves = 0.1 * torch.randn(5, 4001, generator=torch.Generator().manual_seed(1))  # a quarter of a second
    others = [made]
    if family not in NO_PT2:
        pt2 = io.BytesIO()
        torch.export.save(program, pt2)
        pt2.seek(0)
        others.append(torch.export.load(pt2).module())
    with torch.no_grad():
        for found in (other(waves) for other in others):  # another batch than the example's
            torch.testing.assert_close(found, network(waves), rtol=1e-3, atol=1e-4 * float(network(waves).norm()))


def test_a_graph_that_is_not_for_every_length_is_no_pt2(tmp_path):
    network = network_of(FAMILIES["vggvox"])
    with pytest.raises(ExportError, match="not for every length; no file is written: export it as .onnx"):
        export.write_pt2(onnx_file.graph(network), network, str(tmp_path / "a.pt2"), {})
    assert not list(tmp_path.iterdir())


def test_no_family_is_left_out():
    assert {network.__module__ for network in MODELS.values()} == {
        MODELS[config.name].__module__ for config in FAMILIES.values()
    }


FRONT_ENDS = {
    "log_mel": ("ResNetSE34L", {}),
    "spectrum": ("ResNetSE34", {"encoder": "SAP"}),
    "kaldi, int16": ("ResNet34", {}),
    "kaldi, unit, povey": ("ResNet34", {"variant": "3dspeaker"}),
    "speechbrain": ("ECAPA-512", {"variant": "speechbrain"}),
    "redimnet": ("ReDimNet-B0", {}),
    "tfmel": ("ReDimNet2-B0", {}),
    "ge2e": ("GE2E-LSTM", {}),
}


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_features_are_the_same_as_onnx_down_to_digital_silence(name):
    network, options = FRONT_ENDS[name]
    features = build_model(ModelConfig(name=network, width=0.1, **options), 16000, FeaturesConfig()).features.eval()
    made = OnnxNetwork(onnx_file.to_onnx(onnx_file.graph(features), {"sample_rate": "16000"}), 1)
    generator = torch.Generator().manual_seed(0)
    for batch, samples in ((1, 16000), (3, 4321), (2, 520)):
        waves = 0.1 * torch.randn(batch, samples, generator=generator)
        waves[:, samples // 2 :] = 0  # a floor that an optimiser takes for zero shows here
        with torch.no_grad():
            expected, found = features(waves), made(waves)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < 2e-3, samples


def test_a_wave_shorter_than_a_window_is_repeated_as_in_torch(shallow):
    network = network_of(FAMILIES["resnet"])
    made = OnnxNetwork(onnx_file.to_onnx(onnx_file.graph(network), {"sample_rate": "16000"}), 1)
    for samples in (2, 160, 401):
        waves = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
        with torch.no_grad():
            expected = network(waves)
        torch.testing.assert_close(made(waves), expected, rtol=1e-3, atol=1e-4 * float(expected.norm()))


def test_another_network_is_told_from_the_first():
    a, b = (network_of(ModelConfig(width=0.25, embedding_size=16)) for _ in range(2))
    with torch.no_grad():
        b.head.fc.weight[0] *= 1.01
    with pytest.raises(ExportError, match=r"at 0.5 s the exported network differs: cosine 0\.99.*no file is written"):
        onnx_file.check(a, b, 16000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "a.pt"
    network, _ = own_checkpoint(path, ModelConfig(width=0.25, embedding_size=16), LossConfig(), ["ann", "bob"])
    return path, network.eval()


def test_the_command_writes_a_file_that_needs_nothing_of_ours(checkpoint, corpus, capsys):
    path, network = checkpoint
    out, root = path.with_name("a.onnx"), str(corpus)
    words = ["export", str(path), str(out), "--int8", f"{corpus}/train_list.txt", "--root", root, "--utterances", "4"]
    assert cli.main([*words, "--trials", f"{corpus}/test_list.txt"]) == 0
    said = capsys.readouterr().out
    assert f"{out}: ResNetSE34L of {path}, opset 18" in said and "30 s" in said
    session = onnxruntime.InferenceSession(out)
    waves = 0.1 * torch.randn(3, 8000, generator=torch.Generator().manual_seed(0))
    found = session.run(["embeddings"], {"waves": waves.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, network(waves), atol=1e-4 * float(network(waves).norm()))
    assert str(onnx_file.__file__.rsplit("/", 3)[0]).encode() not in out.read_bytes()  # no paths of this machine
    about = session.get_modelmeta().custom_metadata_map
    assert about["sample_rate"] == "16000" and json.loads(about["network"])["model"]["name"] == "ResNetSE34L"
    small = path.with_name("a.int8.onnx")
    assert f"{small}: int8 " in said and small.stat().st_size < out.stat().st_size
    head, float_row, int8_row = said.strip().splitlines()[-3:]
    assert "EER difference" in head and float_row.split()[1] == "float" and " to " in int8_row.split("int8")[1]


def test_the_command_writes_a_pt2(checkpoint, capsys):
    path, network = checkpoint
    out = path.with_name("a.pt2")
    assert cli.main(["export", str(path), str(out)]) == 0
    waves = 0.1 * torch.randn(3, 12345, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = torch.export.load(out).module()(waves), network(waves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.norm()))


def test_what_does_not_fit_is_said(checkpoint, capsys, monkeypatch):
    path = str(checkpoint[0])
    for words, said in {
        "": "expected CHECKPOINT and OUT",
        "a.tflite": "expected a name in .onnx, .pt2, .model, or --to FORMAT",
        "a.pt2 --int8 list": "--int8 and --trials are for ONNX; a.pt2 is for pt2",
        "a.onnx --trials list": "--trials compares float with int8: give --int8 LIST, too",
    }.items():
        with pytest.raises(SystemExit):
            cli.main(["export", path, *words.split()])
        assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(onnx_file.UserError, match=r"pip install 'spknet\[onnx\]'"):
        OnnxNetwork(b"")


def test_the_better_of_two_ways_is_the_nearer_of_those_faster_than_float():
    took = {"float": 1.0, "static": 0.7, "dynamic": 5.0}
    assert int8.better(took, {"static": 0.99, "dynamic": 0.999}) == "static"
    assert int8.better(took | {"dynamic": 0.9}, {"static": 0.99, "dynamic": 0.999}) == "dynamic"
    assert int8.better(took | {"static": 2.0}, {"static": 0.99, "dynamic": 0.999}) == "dynamic"
