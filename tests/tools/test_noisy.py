"""tools.noisy writes the utterances of trial lists with noise at the SNR that is asked for."""

import numpy as np
import pytest
import soundfile

from spknet.errors import run
from tools.noisy import main


@pytest.fixture
def words(tmp_path, noise_and_rir):
    generator = np.random.default_rng(3)
    for name, scale in (("s1/a.wav", 3000), ("s1/b.wav", 300), ("s2/c.flac", 25000)):
        path = tmp_path / "clean" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = generator.standard_normal(12000).clip(-1.3, 1.3) * scale
        soundfile.write(path, wave.astype(np.int16), 16000, subtype="PCM_16")
    trials = tmp_path / "trials.txt"
    trials.write_text("1 s1/a.wav s1/b.wav\n0 s1/a.wav s2/c.flac\n")
    more = ["--augment.noise_shards", str(noise_and_rir[0]), "--augment.probability", "1"]
    more += ["--augment.music", "0", "--augment.babble", "0", "--augment.noise_snr", "5", "5"]
    return ["--trials", str(trials), "--root", str(tmp_path / "clean"), "--out", str(tmp_path / "noisy"), *more]


def test_noise_has_the_snr_asked_for_and_loud_copies_are_not_clipped(words, tmp_path, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out == f"3 utterances written to {tmp_path / 'noisy'}\n"
    for name, loud in (("s1/a", False), ("s1/b", False), ("s2/c", True)):
        ending = "flac" if loud else "wav"
        clean = soundfile.read(tmp_path / "clean" / f"{name}.{ending}", dtype="int16")[0].astype(float)
        heard, rate = soundfile.read(tmp_path / "noisy" / f"{name}.flac", dtype="int16")
        assert rate == 16000 and len(heard) == len(clean)
        # The copy is g (clean + noise). Noise and speech are independent, so projection on the speech gives g.
        gain = heard @ clean / (clean @ clean)
        assert (gain < 0.95 and np.abs(heard).max() == 32767) if loud else abs(gain - 1) < 0.05
        noise = heard / gain - clean
        assert 10 * np.log10((clean @ clean) / (noise @ noise)) == pytest.approx(5, abs=0.3)


def test_what_a_copy_has_does_not_depend_on_chance(words, tmp_path):
    for out in ("one", "two"):
        words[words.index("--out") + 1] = str(tmp_path / out)
        main(words)
    for name in ("s1/a.flac", "s1/b.flac", "s2/c.flac"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--augment.speed", "0.9", "1.1"], "are for training"),
        (["--root", "nowhere"], "s1/a.wav: found nowhere in nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(words, capsys, more, said):
    assert run(main, [*words, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
