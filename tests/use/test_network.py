"""The front door: the same embeddings as evaluation's, whatever is given and whatever stands beside it."""

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

import spknet
from shards.format import ShardError
from spknet.errors import UserError
from spknet.evaluate import embed as listed
from spknet.use.audio import WHOLE_SECONDS, WINDOW_SECONDS, AudioError, Samples, pieces
from tests.conftest import voice

ROOT = Path(__file__).resolve().parents[2]


def test_import_is_cheap_and_the_names_are_there():
    code = "import sys, spknet; assert 'torch' not in sys.modules; assert set(spknet.__all__) <= set(dir(spknet)); spknet.nothing"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "module 'spknet' has no attribute 'nothing'" in done.stderr
    assert (ROOT / "spknet" / "py.typed").is_file()


def test_embeddings_are_those_of_spknet_embed(net, run_dir, wavs, corpus, tmp_path):
    (tmp_path / "list").write_text("".join(f"{path}\n" for path in wavs))
    words = ["--checkpoint", str(run_dir), "--list", str(tmp_path / "list"), "--out", str(tmp_path / "out")]
    assert listed.main([*words, "--device", "cpu", "--threads", "1"]) == 0
    rows = np.load(tmp_path / "out" / "embeddings.npy")[:, 0]
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    vectors = net.embed(wavs)
    assert vectors.dtype == np.float32 and vectors.shape == (5, 16)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_what_stands_beside_a_recording_changes_nothing(net, wavs):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    together = net.embed(wavs * 3)
    torch.set_num_threads(2)
    in_two_threads = net.embed(iter(wavs * 3))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    alone = np.concatenate([net.embed(Path(path)) for path in wavs * 3])
    torch.set_num_threads(before)
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(in_two_threads, alone)


def test_arrays_and_tensors_give_what_the_file_gives(net, wavs):
    expected = net.embed(wavs[0])
    samples, rate = soundfile.read(wavs[0], dtype="int16")
    floats = samples / 32768
    for given in (
        samples,
        floats,
        floats.astype(np.float32),
        torch.from_numpy(floats),
        torch.from_numpy(samples),
        samples.astype(np.int32) * 65536,
        floats[:, None].repeat(3, axis=1),  # (samples, channels)
        torch.from_numpy(floats[None].repeat(2, axis=0)).float(),  # (channels, samples)
    ):
        np.testing.assert_array_equal(net.embed(given, rate=rate), expected)
    np.testing.assert_array_equal(net.embed([samples, wavs[1]], rate=rate), net.embed(wavs[:2]))
    assert net.embed([]).shape == (0, 16)


def test_another_rate_is_resampled_like_a_file_of_it(net, wavs, tmp_path):
    samples, _ = soundfile.read(wavs[0])
    high = soxr.resample(samples, 16000, 44100, quality="VHQ")
    soundfile.write(tmp_path / "high.wav", high, 44100, subtype="DOUBLE")
    vectors = net.embed([high, str(tmp_path / "high.wav")], rate=44100)
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert vectors[0] @ net.embed(wavs[0])[0] > 0.9999


@pytest.mark.parametrize(
    "given, rate, message",
    [
        (np.zeros(100), None, "array 0: an array does not say its sample rate"),
        (np.zeros(100), 10, "array 0: rate=10, expected 1000 to 768000 Hz"),
        (np.zeros((2, 3, 4)), 16000, r"float64 of shape \(2, 3, 4\); expected numbers of shape \(samples,\)"),
        (np.array(["a"]), 16000, "expected numbers of shape"),
        (7, None, "int given for audio 0; expected a path, a numpy array or a torch tensor"),
        ([np.full(99, 0.1), np.array([0.1, np.inf])], 16000, "array 1: 1 samples are NaN or infinite, the first at 1"),
        (np.array([0.5, 300.0]), 16000, "array 0: samples reach 300, expected -1 to 1"),
        (np.zeros(0), 16000, r"array 0: no audio in it \(0 samples\)"),
    ],
)
def test_what_is_no_audio_is_named(net, given, rate, message):
    with pytest.raises((AudioError, ShardError), match=message):
        net.embed(given, rate=rate)


def test_a_recording_up_to_a_minute_is_one_piece_and_a_longer_one_is_windows():
    def lengths(seconds):
        ramp = np.arange(round(seconds * 1000)) % 30000
        found = list(pieces(Samples(ramp.astype(np.int16), 1000, 1000, "a")))
        assert found[-1][-1] == ramp[-1]  # the end is heard
        return [len(piece) for piece in found]

    assert (WHOLE_SECONDS, WINDOW_SECONDS) == (60, 30)
    assert lengths(60) == [60000]
    assert lengths(60.5) == [30000, 30000, 30000]  # the last from 30.5 s on
    assert lengths(90) == [30000] * 3
    assert lengths(3599) == [30000] * 120


def test_windows_are_averaged_with_length_one(net):
    samples = np.concatenate([voice(1, 0, 40), voice(2, 0, 35)])
    parts = [samples[:480000], samples[480000:960000], samples[-480000:]]
    means = net.embed(parts, rate=16000).mean(axis=0)
    np.testing.assert_allclose(net.embed(samples, rate=16000)[0], means / np.linalg.norm(means), atol=1e-6)


def test_verify_says_score_probability_and_answer(net, wavs):
    same, different = net.verify(wavs[3], wavs[4]), net.verify(wavs[0], wavs[3])
    vectors = net.embed([wavs[0], wavs[3]]).astype(float)
    assert different.score == pytest.approx(vectors[0] @ vectors[1], abs=1e-6)
    a, b = net.card.calibration.weight, net.card.calibration.bias
    assert different.probability == pytest.approx(1 / (1 + math.exp(-(a * different.score + b))))  # the prior is 0.5
    assert different.threshold == pytest.approx(-b / a)
    assert (different.same, same.score > different.score) == (different.score >= different.threshold, True)
    assert net.verify(wavs[0], wavs[3], threshold=-1).same and not net.verify(wavs[0], wavs[3], threshold=1).same
    assert all("too short" in said for said in same.why)  # the corpus is of 0.6 to 1 s
    longer = [np.concatenate([voice(s, u, 0.9) for u in range(3)]) for s in (3, 4)]
    assert net.verify(*longer, rate=16000).why == ()


def test_a_side_may_be_several_recordings(net, wavs):
    mean = net.embed(wavs[:2]).astype(float).mean(axis=0)
    expected = mean / np.linalg.norm(mean) @ net.embed(wavs[3])[0]
    assert net.verify(wavs[:2], wavs[3]).score == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UserError, match="an empty list given to verify"):
        net.verify([], wavs[3])


def test_evaluate_gives_the_report_of_the_command(net, run_dir, corpus, tmp_path):
    report = net.evaluate(str(run_dir.parent / "dev.txt"), root=str(corpus))
    assert report.numbers()["eer"] == pytest.approx(net.card.lists[0].figures["eer"])
    system = spknet.System(top=3, cohort=net.embed(sorted(map(str, corpus.glob("id0000[0-5]/*/00000.wav")))))
    assert list(net.evaluate(str(run_dir.parent / "dev.txt"), root=str(corpus), system=system).lists[0].scores) == [
        "cosine",
        "AS-norm",
    ]


def test_a_device_that_is_none_and_a_threshold_that_is_no_cosine_are_refused(run_dir, net, wavs):
    with pytest.raises(UserError, match="device 'gpu' is none; expected auto, cpu, cuda"):
        spknet.load(run_dir, "gpu")
    with pytest.raises(UserError, match="threshold 5: scores are cosines; expected a number from -1 to 1"):
        net.verify(wavs[0], wavs[1], threshold=5)


def test_a_device_that_is_not_there_is_named(run_dir):
    if torch.cuda.is_available():
        assert spknet.load(run_dir, "cuda").device.type == "cuda"
        return
    with pytest.raises(UserError, match="device cuda: torch sees no GPU here; give cpu"):
        spknet.load(run_dir, "cuda")


def test_help_starts_without_torch():
    begun = time.process_time()
    code = "import sys; from spknet import cli; cli.main([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    assert time.process_time() - begun < 60
