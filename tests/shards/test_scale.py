"""An index of ten million utterances: opened without reading it, shared by workers, searched by key."""

import multiprocessing

import numpy as np
import pytest

from shards.reader import open_shards
from tools.bench.loader import private_bytes, synthetic_index

ROWS = 10_000_000


def use(path, queue) -> None:
    before = private_bytes()
    utterances = open_shards(path)
    opened = private_bytes() - before
    rows = np.random.default_rng(0).integers(0, ROWS, (100, 512))
    speakers = [utterances._rows(batch)["speaker"].tolist() for batch in rows]
    queue.put((opened, private_bytes() - before, speakers == (rows // 182).tolist()))


@pytest.mark.slow
def test_ten_million_rows_open_without_being_read_and_are_found(tmp_path):
    synthetic_index(tmp_path / "out", ROWS)
    utterances = open_shards(tmp_path / "out")
    assert len(utterances) == ROWS and len(utterances.speakers) == -(-ROWS // 182)
    rows = np.random.default_rng(1).integers(0, ROWS, 1000)
    keys = [f"id{row // 182:07d}/abcdefghijk/{row % 182:03d}" for row in rows.tolist()]
    assert utterances.find(keys).tolist() == rows.tolist()
    assert [utterances.key(row) for row in rows[:50].tolist()] == keys[:50]
    bounds = utterances.speaker_rows
    assert np.array_equal(bounds[:-1], np.arange(len(bounds) - 1, dtype=np.uint64) * 182) and bounds[-1] == ROWS
    int(utterances.samples.sum(dtype=np.int64))  # the other workers of the machine have the pages already
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=use, args=(tmp_path / "out", queue))
    child.start()
    opened, used, right = queue.get(timeout=120)
    child.join()
    assert right
    # Rows and keys are 570 MB; a worker that read them, or copied them, would show.
    assert opened < 10e6 and used < 20e6
