"""Files embedded in the list's order, whatever their format; embeddings kept whole; a signal that stops the embedding."""

import json
import subprocess
import types

import numpy as np
import pytest
import soundfile
import torch

from shards.format import ShardError
from spknet import errors, rng
from spknet.evaluate import embed, evaluation
from spknet.evaluate import embeddings as kept
from spknet.evaluate.embed import Embedding, Stopped
from spknet.evaluate.lists import open_lists
from spknet.evaluate.scoring import Embedded
from spknet.evaluate.trials import TrialError
from spknet.evaluate.utterances import Sources
from tests.evaluate.test_evaluate import network, run_dir, settings  # noqa: F401 (a fixture)
from tests.ranks import run_ranks


@pytest.fixture
def words(run_dir, tmp_path):  # noqa: F811
    return ["--checkpoint", str(run_dir), "--out", str(tmp_path / "out"), "--device", "cpu", "--threads", "1"]


def names_of(folder):
    return [line.rsplit(None, 1)[0] for line in (folder / "embeddings.txt").read_text().splitlines()]


def test_files_are_embedded_from_the_command_line(words, corpus, tmp_path, capsys):
    words += ["--root", str(corpus)]
    assert embed.main([*words, "--list", str(corpus / "train_list.txt")]) == 0
    assert np.load(tmp_path / "out" / "embeddings.npy").shape == (60, 1, 16)
    (tmp_path / "list").write_text("id0/nowhere.wav\n")
    assert errors.run(embed.main, [*words, "--list", str(tmp_path / "list")]) == 2
    assert "id0/nowhere.wav not found in" in capsys.readouterr().err


def test_rows_stand_in_the_lists_order_and_names_may_be_absolute_or_hold_spaces(words, corpus, tmp_path):
    folder = tmp_path / "my talk"
    folder.mkdir()
    files = [corpus / f"id0000{s}/session0/00000.wav" for s in (3, 1, 2)]
    for number, path in enumerate(files):
        (folder / f"{number} take.wav").write_bytes(path.read_bytes())
    order = [2, 0, 1]
    (tmp_path / "list").write_text("".join(f"{folder}/{i} take.wav\n" for i in order))
    assert embed.main([*words, "--list", str(tmp_path / "list")]) == 0
    assert names_of(tmp_path / "out") == [f"{folder}/{i} take.wav" for i in order]
    rows = np.load(tmp_path / "out" / "embeddings.npy")
    (tmp_path / "speakers").write_text("".join(f"anna my talk/{i} take.wav\n" for i in order))
    assert embed.main([*words, "--list", str(tmp_path / "speakers"), "--root", str(tmp_path)]) == 0
    assert names_of(tmp_path / "out") == [f"my talk/{i} take.wav" for i in order]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "embeddings.npy"), rows)


def test_m4a_mp3_and_44_khz_stereo_are_converted_and_counted(words, corpus, tmp_path, capsys):
    audio, _ = soundfile.read(corpus / "id00000/session0/00000.wav")
    high = np.repeat(audio, 3)[:, None].repeat(2, axis=1)  # 48 kHz, two channels
    soundfile.write(tmp_path / "high.wav", high, 48000)
    soundfile.write(tmp_path / "b.mp3", audio, 16000)
    ffmpeg = ["ffmpeg", "-v", "error", "-i", str(corpus / "id00000/session0/00000.wav"), str(tmp_path / "c.m4a")]
    subprocess.run(ffmpeg, check=True)
    (tmp_path / "list").write_text("high.wav\nb.mp3\nc.m4a\n")
    assert embed.main([*words, "--list", str(tmp_path / "list"), "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "note: 1 files converted: mean of 2 channels, 48000 Hz to 16000 Hz (first: high.wav)" in said
    samples = [int(line.split()[1]) for line in (tmp_path / "out" / "embeddings.txt").read_text().splitlines()]
    assert samples[0] == len(audio) and all(abs(n - len(audio)) < 4000 for n in samples[1:])  # codecs pad
    soundfile.write(tmp_path / "low.wav", audio[::2], 8000)
    sources = Sources(roots=str(tmp_path))
    with pytest.raises(ShardError, match="low.wav: 8000 Hz, expected 16000 Hz or more"):
        sources.measure(sources.locate(["low.wav"]))


def test_nothing_outside_a_root_is_read(corpus, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out.wav"
    inside.mkdir()
    audio, _ = soundfile.read(corpus / "id00000/session0/00000.wav", dtype="int16")
    for path in (inside / "a.wav", outside):
        soundfile.write(path, audio, 16000, subtype="PCM_16")
    sources = Sources(roots=str(inside))
    names = ["a.wav", str(inside / "a.wav"), "../out.wav", str(outside), "../in/a.wav"]
    assert [place is not None for place in sources.locate(names).where] == [True, True, False, False, True]
    assert Sources().locate([str(outside)]).where == [str(outside)]  # without roots an absolute name says it all
    for name in ("../out.wav", str(outside)):
        (tmp_path / "list.txt").write_text(f"1 a.wav a.wav\n0 a.wav {name}\n")
        with pytest.raises(TrialError, match=rf"line 2: {name} not found in .*in, outside of which nothing is read"):
            open_lists(tmp_path / "list.txt", root=str(inside))
    assert Sources(roots=[str(inside), "/"]).locate([str(outside)]).where == [str(outside)]


def make_kept(folder):
    rows = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    kept.keep(folder, Embedded(rows, {"a b": 0, "c": 1, "d": 2}, np.array([5, 6, 7])), {"step": 3}, cohort=rows[0])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def swap_lines(path):
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize(
    "file, damage",
    [
        ("embeddings.npy", flip),
        ("cohort.npy", flip),
        ("embeddings.txt", swap_lines),
        ("embeddings.npy", lambda path: path.write_bytes(path.read_bytes()[:100])),
        ("embeddings.npy", lambda path: path.write_bytes(b"")),
        ("embeddings.json", lambda path: path.write_text("{")),
        ("embeddings.json", lambda path: path.unlink()),
        ("cohort.npy", lambda path: path.unlink()),
        ("embeddings.txt", lambda path: path.write_text("a\nb\nc\n")),
    ],
)
def test_damaged_kept_embeddings_are_refused(tmp_path, file, damage):
    make_kept(tmp_path)
    assert kept.load(tmp_path)[0].rows == {"a b": 0, "c": 1, "d": 2}
    damage(tmp_path / file)
    with pytest.raises(TrialError, match="make it again|cannot read"):
        kept.load(tmp_path)


def test_a_kill_while_embeddings_are_written_over_leaves_a_folder_that_is_refused(tmp_path, monkeypatch):
    make_kept(tmp_path)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.np, "save", full)
    with pytest.raises(OSError):
        make_kept(tmp_path)
    monkeypatch.undo()
    with pytest.raises(TrialError, match="embeddings.json is missing: the folder was not finished"):
        kept.load(tmp_path)


def test_kept_embeddings_of_earlier_versions_are_still_read(tmp_path):
    make_kept(tmp_path)
    facts = json.loads((tmp_path / "embeddings.json").read_text())
    (tmp_path / "embeddings.json").write_text(json.dumps({"step": facts["step"]}))
    assert kept.load(tmp_path)[2] == {"step": 3} and kept.load(tmp_path)[0].sample_rate == 16000


def _stopped(rank, world_size, options):
    lists = evaluation.check(settings(eval=options)) if rank == 0 else None
    model, asked = network(), []

    def stop():
        asked.append(rank)
        return rank == world_size - 1 and len(asked) == 3  # the last rank alone gets the signal, at its third batch

    model.train()
    with pytest.raises(Stopped):
        evaluation.evaluate(model, lists, how=Embedding(batch_seconds=1.0, stop=stop))
    assert model.training and not torch.is_autocast_enabled("cpu")
    return len(asked)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_one_rank_stops_the_embedding_on_all(ranks, corpus):
    options = {"trials": str(corpus / "test_list.txt"), "root": str(corpus)}
    assert run_ranks(ranks, _stopped, options)[-1] == 3


class Noted(torch.nn.Linear):
    """A layer that notes when it is brought to the CPU and when its weights are drawn."""

    done: list[str] = []

    def cpu(self):
        self.done.append("on the CPU")
        return super().cpu()

    def reset_parameters(self):
        self.done.append("drawn")
        super().reset_parameters()


def test_an_untrained_network_is_drawn_on_the_cpu_whatever_its_device_is():
    layer = Noted(3, 2)
    rng.initialize(layer, 5)
    drawn = layer.weight.detach().clone()
    torch.nn.init.zeros_(layer.weight)
    Noted.done.clear()
    assert torch.equal(evaluation.untrained(layer, 5).weight, drawn) and not layer.weight.any()
    assert Noted.done == ["on the CPU", "drawn"]  # a GPU's generator draws other numbers


def test_a_batch_takes_the_power_of_two_of_seconds_that_half_of_the_memory_holds():
    assert embed.fitting(80 * 10**9, 50e6) == 512  # 800 s would fill the half
    assert embed.fitting(16 * 10**9, 500e6) == 16
    assert embed.fitting(10**9, 600e6) == 1  # one second at least, whatever it takes
    assert embed.fitting(80 * 10**9, 1.0) == 4096


def _in_pieces(rank, world_size, bytes_at_once):
    embed.GATHERED = bytes_at_once
    model = network().eval()
    samples = np.array([8000, 9000, 8000, 8500, 9000, 8000, 8000])

    class Noise:
        sample_rate = 16000

        def read(self, places, i):
            return (np.random.default_rng(i).standard_normal(samples[i]) * 1000).astype(np.int16)

    places = types.SimpleNamespace(samples=samples)
    return embed.embed(model, Noise(), places, Embedding(batch_seconds=1.0))


def test_rows_gathered_piece_by_piece_and_by_any_number_of_ranks_are_equal():
    whole = run_ranks(1, _in_pieces, 2**26, join=False)[0]
    assert whole.shape == (7, 1, 16)
    for ranks, bytes_at_once in ((2, 2 * 16 * 4), (3, 2**26)):  # one row a rank at a time, and all
        found, *others = run_ranks(ranks, _in_pieces, bytes_at_once)
        np.testing.assert_array_equal(found, whole)
        assert others == [None] * (ranks - 1)
