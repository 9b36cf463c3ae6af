"""Other projects' checkpoints: what each is recognised as, what it gives, and what is refused.

A file is made with the names, shapes and weights of ../shared/reference/modern in the project's wrapping; through the front end
that was recognised it must give the embeddings of the project's own code.
"""

import json
import pickle
import re

import numpy as np
import pytest
import torch
import torchaudio
from torchaudio.compliance.kaldi import get_mel_banks

from spknet.checkpoints import wespeaker
from spknet.checkpoints.file import CheckpointError
from spknet.checkpoints.network import load_network
from tests.models.test_models import reference_waves
from tests.models.test_redimnet import made_weights

WESPEAKER = """
model: {model}
model_args: {{feat_dim: 80, embed_dim: {size}, pooling_func: {pooling}}}
dataset_args:
  fbank_args: {{num_mel_bins: 80, frame_length: 25, frame_shift: 10, dither: 1.0}}
  cmvn_args: {{norm_mean: True, norm_var: False}}
projection_args: {{project_type: arc_margin, scale: 32.0, do_lm: False}}
"""
SPEECHBRAIN = """
sample_rate: 16000
n_mels: 80
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    channels: [512, 512, 512, 512, 1536]
label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder
"""
EXP = """
embedding_model:
  obj: speakerlab.models.resnet.ResNet.ResNet34
  args: {feat_dim: 80, embed_dim: 256}
"""
CLASSES = {  # WeSpeaker's names of the classes in the reference, and their pooling
    "ws-ResNet34-TSTP-256": ("ResNet34", "TSTP"),
    "ws-ResNet34-TSTP-256-two": ("ResNet34", "TSTP"),
    "ws-ResNet50-TSTP-256": ("ResNet50", "TSTP"),
    "ws-ECAPA-GLOB-c512-192": ("ECAPA_TDNN_GLOB_c512", "ASTP"),
    "ws-ECAPA-GLOB-c1024-192": ("ECAPA_TDNN_GLOB_c1024", "ASTP"),
    "ws-CAMPP-512": ("CAMPPlus", "TSTP"),
    "ws-Gemini60-256": ("Gemini_DF_ResNet60", "TSTP"),
    "ws-SimAM34-ASP-32-256": ("SimAM_ResNet34_ASP", "ASP"),
    "ws-Res2Net34-256": ("Res2Net34_Base", "TSTP"),
}
RECOGNIZED = {  # ResNet221 is the class of ResNet50
    **dict.fromkeys(("ws-ResNet34-TSTP-256", "ws-ResNet34-TSTP-256-two"), "WeSpeaker's ResNet34"),
    "ws-ResNet50-TSTP-256": "WeSpeaker's ResNet50",
    "ws-ECAPA-GLOB-c512-192": "WeSpeaker's ECAPA-512",
    "ws-ECAPA-GLOB-c1024-192": "WeSpeaker's ECAPA-1024",
    "ws-CAMPP-512": "WeSpeaker's CAM++",
    "ws-Gemini60-256": "WeSpeaker's DF-ResNet60",
    "ws-SimAM34-ASP-32-256": "WeSpeaker's SimAM-ResNet34",
    "ws-Res2Net34-256": "WeSpeaker's Res2Net34",
    "3ds-CAMPP-192": "3D-Speaker's CAM++",
    "3ds-ResNet34-two-256": "3D-Speaker's ResNet34",
    "3ds-ERes2NetV2-192": "3D-Speaker's ERes2NetV2",
    "sb-ECAPA-512-192": "SpeechBrain's ECAPA-512",
    "redimnet-b0": "the ReDimNet-B0 of its authors",
    "redimnet-b2": "the ReDimNet-B2 of its authors",
    "redimnet-b5": "the ReDimNet-B5 of its authors",
    "redimnet2-b0": "the ReDimNet2-B0 of its authors",
    "redimnet2-b0-gnorm": "the ReDimNet2-B0 of its authors",
    "redimnet2-b2": "the ReDimNet2-B2 of its authors",
    "redimnet2-b3": "the ReDimNet2-B3 of its authors",
    "redimnet2-b6": "the ReDimNet2-B6 of its authors",
}
SMALL = ["ws-ECAPA-GLOB-c512-192", "3ds-CAMPP-192", "sb-ECAPA-512-192", "redimnet-b0", "redimnet2-b0", "resemblyzer"]


def facts_of(shared, name: str) -> dict:
    return json.loads((shared / "reference/modern" / f"{name}.json").read_text())


def tables(name: str, keys: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """What a ReDimNet's file has of its front end, as torchaudio makes it."""
    made = {}
    for key, shape in keys.items():
        if key.endswith("flipped_filter"):
            made[key] = torch.tensor([-0.97, 1.0]).reshape(shape)
        elif key.endswith("spectrogram.window"):
            made[key] = torch.hamming_window(400)
        elif key.endswith("mel_scale.fb"):
            made[key] = torchaudio.functional.melscale_fbanks(257, 20.0, 7600.0, shape[1], 16000)
        elif key.endswith("melbanks_pt"):  # 255 bins 8000/255 Hz apart, and the last, at 8000 Hz, which no filter has
            banks, _ = get_mel_banks(shape[0], 510, 16000.0, 20.0, 7600.0, 100.0, -500.0, 1.0)
            made[key] = torch.nn.functional.pad(banks, (0, 1))[:, :, None]
        elif key.startswith("spec."):
            made[key] = torch.zeros(shape)
    return made


def write(name: str, facts: dict, weights: dict[str, torch.Tensor], folder):
    """The checkpoint as the project leaves it; returns its path."""
    weights = dict(weights)
    for key in [key for key in weights if key.endswith("running_var")]:  # integers as trained, floats as averaged
        value = torch.tensor(10.0) if name.startswith("ws-") else torch.tensor(10)
        weights[key.replace("running_var", "num_batches_tracked")] = value
    if name.startswith("ws-"):
        model, pooling = CLASSES[name]
        size = len(facts["inputs"][0]["output"][0])
        weights["projection.weight"] = torch.zeros(3 * 20, size)  # 20 speakers at three speeds
        (folder / "config.yaml").write_text(WESPEAKER.format(model=model, size=size, pooling=pooling))
        path, state = folder / "avg_model.pt", weights
    elif name == "3ds-ResNet34-two-256":  # of a run, from under DistributedDataParallel
        (folder / "config.yaml").write_text(EXP)
        path = folder / "models" / "CKPT-EPOCH-70-00" / "embedding_model.ckpt"
        path.parent.mkdir(parents=True)
        state = {f"module.{key}": value for key, value in weights.items()}
    elif name.startswith("3ds-"):  # as ModelScope has them
        (folder / "configuration.json").write_text('{"framework": "pytorch", "task": "speaker-verification"}')
        path, state = folder / "pretrained.ckpt", weights
    elif name.startswith("sb-"):
        (folder / "hyperparams.yaml").write_text(SPEECHBRAIN)
        path, state = folder / "embedding_model.ckpt", weights
    elif name == "resemblyzer":
        path, state = folder / "pretrained.pt", {"step": 3, "model_state": weights, "optimizer_state": {"state": {}}}
    else:
        weights |= tables(name, facts["keys"])
        path, state = folder / "released.pt", {"model_config": facts["options"], "state_dict": weights}
    torch.save(state, path)
    return path


@pytest.mark.parametrize("name", RECOGNIZED)
def test_each_project_s_file_gives_the_embeddings_of_its_own_code(name, shared, tmp_path, caplog):
    facts = facts_of(shared, name)
    path = write(name, facts, made_weights(facts["keys"]), tmp_path)
    network, config, meta = load_network(path.parent if path.name in ("avg_model.pt", "embedding_model.ckpt") else path)
    assert meta["kind"] == RECOGNIZED[name] and meta["sample_rate"] == 16000
    assert sum(p.numel() for p in network.parameters()) == facts["parameters"]
    waves = next(i for i in facts["inputs"] if i["input"].startswith("waves"))
    with torch.no_grad():
        found = network(reference_waves()[:2]).numpy()
    largest = np.abs(waves["output_float64"]).max()
    np.testing.assert_allclose(found, waves["output_float64"], rtol=0, atol=1e-4 * largest)
    assert config.model.embedding_size == found.shape[1] and not network.training


def cheap(name: str, shared) -> tuple[dict, dict[str, torch.Tensor]]:
    """A kind's facts, and weights of its shapes that take no room in a file."""
    if name == "resemblyzer":
        keys = {
            f"lstm.weight_{kind}_l{i}": [1024, 40 if kind == "ih" and not i else 256]
            for kind in ("ih", "hh")
            for i in range(3)
        }
        keys |= {f"lstm.bias_{kind}_l{i}": [1024] for kind in ("ih", "hh") for i in range(3)}
        keys |= {"linear.weight": [256, 256], "linear.bias": [256], "similarity_weight": [1], "similarity_bias": [1]}
        facts = {"keys": keys}
    else:
        facts = facts_of(shared, name)
    return facts, {k: torch.ones(1).expand(shape) for k, shape in facts["keys"].items() if not k.startswith("spec.")}


@pytest.mark.parametrize("name", SMALL)
def test_an_entry_missing_one_too_many_and_one_of_another_shape_are_each_named(name, shared, tmp_path):
    facts, weights = cheap(name, shared)
    (tmp_path / "whole").mkdir()
    load_network(write(name, facts, weights, tmp_path / "whole"))
    matrices = [key for key in weights if weights[key].dim() > 1 and key.replace("weight", "bias") in weights]
    key = matrices[1] if matrices else "linear.weight"
    changes = {
        f"{key} is missing": {k: v for k, v in weights.items() if k != key},
        "surplus.weight is unknown": weights | {"surplus.weight": torch.zeros(2)},
        f"{key} has shape": weights | {key: torch.zeros(*weights[key].shape[:-1], weights[key].shape[-1] + 1)},
    }
    if name == "resemblyzer":  # one kind will do: the check is the same for all
        changes |= {
            f"{key} is int64, not float32": weights | {key: torch.ones(1024, 256, dtype=torch.int64)},
            f"{key} holds values that are not finite": weights | {key: torch.full((1024, 256), torch.nan)},
        }
    for number, (problem, changed) in enumerate(changes.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write(name, facts, changed, folder)
        with pytest.raises(CheckpointError) as error:
            load_network(path)
        assert problem in str(error.value) and str(path) in str(error.value), (problem, str(error.value))
        assert "weights_only" not in str(error.value)


class Opens:
    """What runs code where it is unpickled."""

    def __reduce__(self):
        return (open, ("/tmp/never", "w"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f1d\nsize 26534656\n"
IMPOSTORS = {
    "it holds a Python object": pickle.dumps({"conv1.weight": Opens()}, protocol=2),
    "it is a git-lfs pointer": POINTER,
    "it is a web page": b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>",
    "it is empty": b"",
}


@pytest.mark.parametrize("problem", IMPOSTORS)
@pytest.mark.parametrize("name", ["avg_model.pt", "embedding_model.ckpt", "pretrained.pt", "b2.pt", "a.safetensors"])
def test_what_lies_in_a_checkpoint_s_place_is_named_and_safety_never_lowered(name, problem, tmp_path):
    path = tmp_path / name
    path.write_bytes(IMPOSTORS[problem])
    with pytest.raises(CheckpointError) as error:
        load_network(path)
    said = str(error.value)
    assert problem in said and str(path) in said
    assert not re.search("weights_only|unsafe|trust|allow", said)


def test_a_zip_of_torch_that_would_run_code_is_refused(tmp_path):
    torch.save({"model_state": {"linear.weight": Opens()}}, tmp_path / "pretrained.pt")
    with pytest.raises(CheckpointError, match=r"it holds a Python object \(io.open\) and would run code"):
        load_network(tmp_path / "pretrained.pt")


def wespeaker_file(folder, config: str, shared, name: str = "ws-ECAPA-GLOB-c512-192"):
    facts, weights = cheap(name, shared)
    path = write(name, facts, weights, folder)
    (folder / "config.yaml").write_text(config)
    return path


def test_wespeaker_s_networks_and_features_that_are_not_here_are_named(shared, tmp_path):
    path = wespeaker_file(tmp_path, "model: XVEC\nmodel_args: {feat_dim: 80}\n", shared)
    torch.save({"layer1.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="recognised as WeSpeaker's XVEC by its config.yaml; spknet has no such"):
        load_network(path)
    for words, problem in (
        ("{frontend: whisper}", "frontend whisper"),
        ("{cmvn_args: {norm_var: true}}", "cmvn_args.norm_var true"),
        ("{fbank_args: {frame_length: 20}}", "fbank_args.frame_length 20"),
        ("{resample_rate: many}", "resample_rate many"),
    ):
        path = wespeaker_file(tmp_path, f"model: ECAPA\nmodel_args: {{}}\ndataset_args: {words}\n", shared)
        with pytest.raises(CheckpointError, match=f"its config.yaml asks for {problem}, which spknet has not"):
            load_network(path)
    for text in ("model: [\n", "[" * 5000):
        path = wespeaker_file(tmp_path, text, shared)
        with pytest.raises(CheckpointError, match="config.yaml, which belongs to .*avg_model.pt, cannot be read"):
            load_network(path)


def test_wespeaker_s_configuration_sets_rate_hop_and_pooling(shared, tmp_path):
    said = "model: X\nmodel_args: {feat_dim: 80}\ndataset_args: {resample_rate: 8000, fbank_args: {frame_shift: 12.5}, cmvn: false}\n"
    network, config, meta = load_network(wespeaker_file(tmp_path, said, shared))
    assert network.sample_rate == meta["sample_rate"] == 8000 and network.features.hop == 100
    assert config.features.remove_mean is False


def test_redimnet2_in_wespeaker_s_wrapping_has_the_front_end_of_its_configuration(shared, tmp_path):
    facts = facts_of(shared, "redimnet2-b0")
    weights = {k: v for k, v in made_weights(facts["keys"]).items() if not k.startswith("spec.")}
    weights |= {f"frontend.{key}": table for key, table in tables("redimnet2-b0", facts["keys"]).items()}
    torch.save(
        weights | {"projection.weight": torch.zeros(60, 192), "projection.bias": torch.zeros(1, 1)},
        tmp_path / "avg_model.pt",
    )
    said = "model: ReDimNet2B0\nmodel_args: {feat_dim: 72}\ndataset_args: {frontend: %s, cmvn: False, tfmel_args: {norm_signal: %s}}"
    (tmp_path / "config.yaml").write_text(said % ("tfmel", "True"))
    network, _, meta = load_network(tmp_path)
    expected = next(i for i in facts["inputs"] if i["input"].startswith("waves"))["output_float64"]
    with torch.no_grad():
        found = network(reference_waves()[:2]).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert meta["kind"] == "WeSpeaker's ReDimNet2-B0"
    (tmp_path / "config.yaml").write_text(said % ("tfmel", "False"))
    assert load_network(tmp_path)[0].features.normalize is False
    (tmp_path / "config.yaml").write_text(said % ("fbank", "True"))
    features = load_network(tmp_path)[0].features
    assert (type(features).__name__, features.scale, features.remove_mean) == ("Kaldi", 32768.0, False)


def test_cam_of_192_dimensions_in_wespeaker_s_wrapping_gets_3d_speaker_s_features(shared, tmp_path):
    facts, weights = cheap("3ds-CAMPP-192", shared)
    torch.save(weights, tmp_path / "avg_model.pt")
    (tmp_path / "config.yaml").write_text("model: CAMPPlus\nmodel_args: {feat_dim: 80, embed_dim: 192}\n")
    found = wespeaker.recognize(weights, tmp_path / "avg_model.pt")
    assert found.what == "WeSpeaker's CAM++" and found.model.variant == "3dspeaker"
    network, _, _ = load_network(tmp_path)
    assert network.features.scale == 1.0 and network.pool.floor == 0.0


def test_a_bare_file_of_a_network_that_two_projects_have_says_whose_it_is_taken_for(shared, tmp_path, capfd):
    _, cam = cheap("3ds-CAMPP-192", shared)
    _, resnet = cheap("ws-ResNet34-TSTP-256", shared)
    for weights, what in ((cam, "3D-Speaker's CAM++"), (resnet, "WeSpeaker's ResNet34")):
        torch.save(weights, tmp_path / "a.bin")
        _, _, meta = load_network(tmp_path / "a.bin")
        assert meta["kind"] == what
        assert re.search(f"a.bin: recognised as {re.escape(what)}; .*taken (for|to be)", capfd.readouterr().err)


def test_3d_speaker_s_ecapa_has_speechbrain_s_names_and_kaldi_s_features(shared, tmp_path):
    facts, weights = cheap("sb-ECAPA-512-192", shared)
    torch.save(weights, tmp_path / "ecapa_tdnn.bin")
    (tmp_path / "configuration.json").write_text('{"task": "speaker-verification"}')
    network, config, meta = load_network(tmp_path / "ecapa_tdnn.bin")
    assert meta["kind"] == "3D-Speaker's ECAPA-512" and network.variant == "speechbrain"
    assert (config.features.name, config.features.window, config.features.scale) == ("kaldi", "povey", "unit")


def test_sizes_and_versions_that_are_not_here_are_named(shared, tmp_path):
    _, resnet = cheap("ws-ResNet34-TSTP-256", shared)
    more = {key.replace("layer3.5.", "layer3.6."): value for key, value in resnet.items() if "layer3.5." in key}
    old = {"layer1.0.conv1.weight": torch.ones(1), "layer4.0.conv1.weight": torch.ones(1), "seg_1.bias": torch.ones(1)}
    cases = {
        r"a ResNet \(bottlenecks, blocks of the third stage\) of size \(False, 7\); spknet has ResNet18, ": resnet | more,
        "an ERes2Net of the first version": old | {"fuse_mode12.local_att.0.weight": torch.ones(1)},
        "WeSpeaker's own ReDimNet": {k: torch.ones(1) for k in ("backbone.stage0.0", "backbone.inputs_weights.0", "pool.x")},
        "a ReDimNet of 13 channels; spknet has 10, 12, ": {
            "backbone.stage0.0.w": torch.ones(1), "backbone.stem.1.weight": torch.ones(13), "pool.x": torch.ones(1)
        },
    }  # fmt: skip
    for problem, weights in cases.items():
        torch.save(weights, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=f"a.pt: it holds {problem}"):
            load_network(tmp_path / "a.pt")


def test_a_redimnet_of_other_filters_or_features_is_refused(shared, tmp_path):
    facts, weights = cheap("redimnet-b0", shared)
    path = write("redimnet-b0", facts, weights, tmp_path)
    state = torch.load(path)
    key = "spec.torchfbank.2.mel_scale.fb"
    state["state_dict"][key] = torchaudio.functional.melscale_fbanks(257, 50.0, 7600.0, 60, 16000)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=f"its front end's {key} is another than that of ReDimNet-B0 here"):
        load_network(path)
    facts["options"]["spec_params"] = {"do_preemph": False}
    path = write("redimnet-b0", facts, weights, tmp_path)
    with pytest.raises(CheckpointError, match="its model_config asks for feat_type pt, .*do_preemph"):
        load_network(path)


def test_a_configuration_is_read_without_running_anything(shared, tmp_path):
    facts, weights = cheap("sb-ECAPA-512-192", shared)
    path = write("sb-ECAPA-512-192", facts, weights, tmp_path)
    touched = tmp_path / "touched"
    evil = f"n_mels: 80\nx: !!python/object/apply:os.system ['touch {touched}']\ny: !apply:os.mkdir ['{touched}']\n"
    (tmp_path / "hyperparams.yaml").write_text(evil)
    with pytest.raises(
        CheckpointError, match=r"hyperparams.yaml, which belongs to .*, cannot be read: could not determine"
    ):
        load_network(path)
    (tmp_path / "hyperparams.yaml").write_text("n_mels: 60\ny: !apply:os.mkdir ['" + str(touched) + "']\n")
    with pytest.raises(CheckpointError, match="takes 80 mel bands; its hyperparams.yaml says 60"):
        load_network(path)
    assert not touched.exists()


@pytest.mark.parametrize("said", ["{feat_dim: eighty}", "{feat_dim: -3}", "[80]", "{feat_dim: {a: 1}}"])
def test_a_configuration_of_nonsense_is_one_sentence(said, shared, tmp_path):
    path = wespeaker_file(tmp_path, f"model: ECAPA_TDNN_GLOB_c512\nmodel_args: {said}\n", shared)
    with pytest.raises(CheckpointError, match="avg_model.pt: .*configuration"):
        load_network(path)


def test_shapes_of_nonsense_are_one_sentence(shared, tmp_path):
    _, weights = cheap("ws-ECAPA-GLOB-c512-192", shared)
    for shape in ((), (0,), (3, 0), (2, 2, 2, 2)):
        for part in ("linear.", "layer1.bn.", "conv."):
            broken = {k: torch.zeros(shape) if k.startswith(part) else v for k, v in weights.items()}
            torch.save(broken, tmp_path / "a.pt")
            with pytest.raises(CheckpointError, match="a.pt"):
                load_network(tmp_path / "a.pt")
    torch.save({"encoder.weight": torch.zeros(2), "encoder.bias": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match="a.pt: none of the networks .*: found encoder.weight, encoder.bias, ..., and"
    ):
        load_network(tmp_path / "a.pt")


def test_a_folder_without_any_network_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        CheckpointError, match="holds no checkpoints/step-.*.pt, nor avg_model.pt or embedding_model.ckpt"
    ):
        load_network(tmp_path)
