"""The made-up corpus: layout, repeatability, and that it is speech in the sense its docstring claims."""

import hashlib

import numpy as np
import pytest
import soundfile

from tools import synth

SMALL = ["--train-speakers", "2", "--test-speakers", "2", "--utterances", "4", "--sessions", "2", "--seconds", "0.5"]


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_corpus_has_the_voxceleb_layout_and_lists_that_name_its_files(tmp_path):
    assert synth.main(["--out", str(tmp_path), *SMALL]) == 0
    waves = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.wav"))
    assert waves == [f"id0000{s}/s0{k}/0000{u}.wav" for s in range(4) for k in range(2) for u in range(2)]
    info = soundfile.info(tmp_path / waves[0])
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (16000, 1, "PCM_16", 8000)
    train = [line.split() for line in (tmp_path / "train_list.txt").read_text().splitlines()]
    assert sorted(path for _, path in train) == waves[:8] and all(path.startswith(name + "/") for name, path in train)
    trials = [line.split() for line in (tmp_path / "test_list.txt").read_text().splitlines()]
    targets = [(a, b) for label, a, b in trials if label == "1"]
    # Two sessions of two files: 2 x 2 pairs across sessions for each of two speakers; 16 pairs of two speakers in all.
    assert len(targets) == 8 and len(trials) == 8 + 16 and len(set(map(tuple, trials))) == 24
    assert all(a[:7] == b[:7] and a[8:11] != b[8:11] for a, b in targets)
    assert all(a[:7] != b[:7] for label, a, b in trials if label == "0")
    assert {path for trial in trials for path in trial[1:]} == set(waves[8:])


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(tmp_path):
    for name, extra in [("a", ["--workers", "1"]), ("b", ["--workers", "2"]), ("c", ["--seed", "1"])]:
        assert synth.main(["--out", str(tmp_path / name), *SMALL, *extra]) == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    changed = {path for path, digest in digests(tmp_path / "a").items() if digests(tmp_path / "c")[path] != digest}
    assert len([path for path in changed if path.endswith(".wav")]) == 16


def test_corpus_made_with_other_options_is_not_mixed_into(tmp_path, capsys):
    assert synth.main(["--out", str(tmp_path), *SMALL]) == 0
    assert synth.main(["--out", str(tmp_path), *SMALL]) == 0
    assert "is there already" in capsys.readouterr().out
    assert synth.main(["--out", str(tmp_path), *SMALL, "--seed", "5"]) == 1
    assert "choose another --out" in capsys.readouterr().err


def test_options_that_leave_no_trials_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        synth.main(["--out", str(tmp_path), "--utterances", "5", "--sessions", "5"])
    assert "more utterances than sessions" in capsys.readouterr().err


def test_source_repeats_at_the_speakers_pitch():
    speaker = synth.draw_speaker(np.random.default_rng(3)) | {"pitch": 125.0, "jitter": 0.0, "breath": 0.0}
    source = synth.glottal_source(speaker, 1.0, 16000, np.random.default_rng(0))[:1600]
    lags = np.arange(80, 200)
    likeness = [np.corrcoef(source[:-lag], source[lag:])[0, 1] for lag in lags]
    # Intonation is three slow sines of 7 % each: within 35 % of 16000 / 125 = 128 samples, and clearly periodic.
    assert abs(lags[np.argmax(likeness)] - 128) < 45 and max(likeness) > 0.8


def test_tract_resonates_at_its_formants():
    speaker = synth.draw_speaker(np.random.default_rng(0)) | {"dips": np.zeros((2, 2)), "bandwidth": 0.5}
    wanted = np.array([500.0, 1500, 2500, 3500, 4500])
    gain = np.abs(synth.tract_response(wanted[None], speaker)[0])
    peaks = synth.BINS[1:-1][(gain[1:-1] > gain[:-2]) & (gain[1:-1] > gain[2:])]
    assert np.abs(peaks - wanted).max() <= 2 * synth.BINS[1] and gain[0] == pytest.approx(1, abs=1e-3)
