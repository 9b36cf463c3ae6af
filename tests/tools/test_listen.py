"""tools.listen writes what goes into the network, and says what was drawn."""

import numpy as np
import pytest
import soundfile
import torch
from matplotlib import image

from spknet.data.batches import Steps
from spknet.data.corpus import Corpus
from spknet.data.mixing import mix
from spknet.errors import run
from spknet.options import parse
from spknet.parallel.ranks import Ranks
from tools.listen import main


@pytest.fixture
def words(options, noise_and_rir):
    noise, rir = noise_and_rir
    return [
        *options,
        "--augment.noise_shards",
        str(noise),
        "--augment.rir_shards",
        str(rir),
        "--augment.preset",
        "kaldi",
    ]


def test_wavs_are_the_waves_of_the_batch_and_lines_say_what_was_drawn(words, tmp_path, capsys):
    words = [*words, "--augment.probability", "1", "--augment.speed", "[0.9, 1.1]", "--augment.spec_augment", "true"]
    assert main([*words, "--out", str(tmp_path), "--number", "5", "--step", "3"]) == 0
    lines = (tmp_path / "drawn.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines and len(lines) == 5
    c = parse(words)
    steps = Steps(c, Corpus.open(c.data, 0, c.augment), Ranks())
    batch = steps[3]
    crops, augment, labels, _ = batch.to(torch.device("cpu"))
    waves = mix(crops, augment, steps.samples, torch.float32).numpy()
    for i, line in enumerate(lines):
        samples, rate = soundfile.read(tmp_path / f"{i:03d}.wav", dtype="int16")
        assert rate == 16000 and np.abs(samples - (waves[i] * 32768).round().clip(-32768, 32767)).max() == 0
        clean, _ = soundfile.read(tmp_path / f"{i:03d}-clean.wav", dtype="int16")
        assert np.array_equal(clean, crops[i, : steps.samples].numpy())
        key = steps.corpus.utterances.key(batch.rows[i])
        assert line.startswith(f"{i:03d}.wav  {key}  class {labels[i // 2]}  speed {augment['speed'][i] / 100:g}; ")
        place = np.flatnonzero(augment["noise_of"].numpy() == i)
        if len(place):
            assert f"at {augment['noise_snr'][place[0]]:.1f} dB" in line
        assert ("reverberation rir/" in line) == (i in augment["rir_of"].tolist()) and "4 masks" in line
    picture = image.imread(tmp_path / "spectrograms.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1000 and picture[..., :3].std() > 0.1


@pytest.mark.parametrize(
    ("more", "expected"),
    [(["--augment.rir_shards", "null"], "give augment.rir_shards"), (["--nonsense", "1"], "unknown option --nonsense")],
)
def test_a_wrong_option_is_one_line(words, tmp_path, capsys, more, expected):
    assert run(main, [*words, *more, "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and expected in said and said.count("\n") == 1
