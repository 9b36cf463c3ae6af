"""Batches: what each rank is given, on packed and loose data, and which speakers are kept out."""

import numpy as np
import pytest
import soundfile
import torch

from spknet.config import ConfigError
from spknet.data.batches import Batches, Steps
from spknet.data.corpus import Corpus, dev_speakers
from spknet.options import parse
from spknet.parallel.ranks import Ranks


def parts(corpus, world, words=(), step=3):
    base = f"--data.train_shards {corpus}/shards --data.speakers_per_batch 8 --data.crop_seconds 0.5 --data.workers 0".split()
    c = parse([*base, *words])
    data = Corpus.open(c.data, c.train.seed)
    return data, [Steps(c, data, Ranks(rank, world))[step] for rank in range(world)]


def test_ranks_share_the_global_batch_column_by_column(corpus):
    data, (whole,) = parts(corpus, 1)
    assert whole.crops.shape == (16, 8000) and whole.crops.dtype == torch.int16
    assert len(set(whole.labels.tolist())) == 8
    for world in (2, 4):
        _, shares = parts(corpus, world)
        for name in ("crops", "labels", "rows", "slots", "draws"):
            assert np.array_equal(np.concatenate([getattr(share, name) for share in shares]), getattr(whole, name))


def test_crops_are_stretches_of_their_own_utterance(corpus):
    data, (batch,) = parts(corpus, 1)
    for row, crop, label in zip(batch.rows.tolist(), batch.crops.numpy(), batch.labels.repeat(2).tolist()):
        audio, _ = soundfile.read(corpus / (data.utterances.key(row) + ".wav"), dtype="int16")
        places = np.flatnonzero(audio[: len(audio) - 7999] == crop[0]) if len(audio) >= 8000 else []
        assert any(np.array_equal(audio[p : p + 8000], crop) for p in places)
        assert data.utterances.speakers[label] == data.utterances.key(row).split("/")[0]


def test_loose_files_give_the_same_batches_as_shards(corpus):
    _, (packed,) = parts(corpus, 1)
    c = parse(
        f"--data.train_list {corpus}/train_list.txt --data.train_root {corpus} --data.speakers_per_batch 8"
        " --data.crop_seconds 0.5".split()
    )
    loose = Steps(c, Corpus.open(c.data, 0), Ranks())[3]
    assert torch.equal(loose.crops, packed.crops) and np.array_equal(loose.labels, packed.labels)


def test_the_loader_goes_on_across_epochs_in_order(corpus):
    c = parse(
        f"--data.train_shards {corpus}/shards --data.speakers_per_batch 8 --data.crop_seconds 0.5 --data.workers 2".split()
    )
    data = Corpus.open(c.data, 0)
    assert data.sampler.steps == 3
    again, before = Steps(c, data, Ranks()), []
    with Batches(c, data, Ranks(), 1, 60) as batches:
        for i, batch in enumerate(batches, 1):
            assert batch.step == i
            before = [*before[-1:], batch]  # the consumer may still hold the batch before
            for held in before:
                assert torch.equal(held.crops, again[held.step].crops)
    assert i == 59


def test_short_utterances_are_tiled(corpus):
    _, (batch,) = parts(corpus, 1, ["--data.crop_seconds", "1.5"])
    assert batch.crops.shape == (16, 24000)
    assert (batch.crops[:, 12000:].float().abs().mean(1) > 100).all()


def test_development_speakers_are_kept_out_by_number_or_by_name(corpus, tmp_path):
    names = tmp_path / "dev.txt"
    names.write_text("id00003\nid00007\n")
    data, _ = parts(corpus, 1, ["--data.dev_speakers", str(names)])
    assert [data.utterances.speakers[i] for i in np.flatnonzero(data.kept_out)] == ["id00003", "id00007"]
    assert not {3, 7} & set(
        np.searchsorted(data.utterances.speaker_rows, data.sampler.plan(0), side="right").ravel() - 1
    )
    speakers = [f"s{i}" for i in range(30)]
    chosen = dev_speakers(speakers, 5)
    assert chosen.sum() == 5
    more = dev_speakers([*speakers, "t0", "t1"], 5)  # new speakers displace few
    assert (chosen & more[:30]).sum() >= 3


def test_development_speakers_that_do_not_exist_are_errors(corpus, tmp_path):
    names = tmp_path / "dev.txt"
    names.write_text("id00003\n\nnobody\n")
    with pytest.raises(ConfigError, match="dev.txt, line 3: speaker 'nobody' is not in the training data"):
        parts(corpus, 1, ["--data.dev_speakers", str(names)])
    with pytest.raises(ConfigError, match="dev_speakers=12, but the data have 12 speakers"):
        parts(corpus, 1, ["--data.dev_speakers", "12"])
