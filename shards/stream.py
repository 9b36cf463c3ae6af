"""Sequential reading of packed tars with webdataset, for where there is no random access: pipes, http, object stores.

Prefer `shards.reader` wherever the tars can be opened as files. Reading in order means reading everything: every byte of every
utterance for a crop of it, no plan of the epoch (which utterances are used, and how often, depends on the buffer),
no exact resume, and batches that only mix what the buffer holds. Cut tars look complete to webdataset; with the index at
hand, the utterances of each tar are counted here and a missing one is an error.

Usage: for batch in balanced_batches(utterances(urls, counts), 40, 2): ...  # 40 speakers x 2 (speaker, key, audio)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from shards import audio, index
from shards.format import ShardError


def tars_of(out: str | Path, base_url: str | None = None) -> tuple[list[str], dict[str, int]]:
    """URLs of a data set's tars and how many utterances each has. OUT needs only its index; base_url: where the tars lie instead."""
    meta = index.read_meta(Path(out))
    base = str(out) if base_url is None else base_url.rstrip("/")
    counts = {f"{base}/{entry['url']}": entry["nsamples"] for entry in meta["shardlist"]}
    return list(counts), counts


def utterances(
    urls: Sequence[str],
    counts: dict[str, int] | None = None,
    sample_rate: int = 16000,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(speaker, key, audio) of every utterance in the order of the tars; audio: (samples,) int16.

    urls: files, http(s) URLs or `pipe:COMMAND`, as webdataset takes them; counts: url -> utterances, checked at the end of each tar;
    part (i, n): only the urls i, i + n, ..., for a rank or a worker. Raises ShardError for a short tar or damaged audio.
    """
    import webdataset  # 0.4 s of imports that random access does not need

    for url in list(urls)[part[0] :: part[1]]:
        found = 0
        for sample in webdataset.WebDataset([url], shardshuffle=False, nodesplitter=None, workersplitter=None):
            yield _decoded(sample, url, sample_rate)
            found += 1
        if counts is not None and found != counts[url]:
            raise ShardError(
                f"{url}: found {found} utterances, expected {counts[url]}: the tar is cut or damaged; get it again"
            )


def _decoded(sample: dict, url: str, sample_rate: int) -> tuple[str, str, np.ndarray]:
    key = sample["__key__"]
    codec = next((codec for codec in ("wav", "flac") if codec in sample), None)
    if codec is None or "spk" not in sample:
        raise ShardError(
            f"{url}: {key} has {sorted(sample)}, expected spk and wav or flac: damaged, or not packed by shards.pack"
        )
    pcm = audio.decode(sample[codec], f"{url}: {key}.{codec}", sample_rate).pcm
    return sample["spk"].decode(), key, np.frombuffer(pcm, "<i2").astype(np.int16, copy=False)


def balanced_batches(
    source: Iterable[tuple[str, str, np.ndarray]],
    speakers_per_batch: int,
    utterances_per_speaker: int,
    buffer: int = 4096,
    seed: int = 0,
) -> Iterator[list[list[tuple[str, str, np.ndarray]]]]:
    """Batches of N distinct speakers x M utterances, drawn from a buffer of utterances that is refilled as it empties.

    buffer: utterances held, each whole in memory (about 260 KB at 8 s). What is left at the end without N speakers of M is dropped.
    Raises ShardError where a full buffer does not hold N speakers with M utterances.
    """
    n, m = speakers_per_batch, utterances_per_speaker
    if buffer < n * m:
        raise ShardError(f"a buffer of {buffer} utterances cannot hold a batch of {n} x {m}; give at least {4 * n * m}")
    rng = np.random.Generator(np.random.Philox(seed))
    held, size = defaultdict(list), 0
    for item in source:
        held[item[0]].append(item)
        size += 1
        if size == buffer:
            batch = _draw(held, n, m, rng)
            if batch is None:
                able = sum(len(items) >= m for items in held.values())
                raise ShardError(
                    f"a buffer of {buffer} utterances holds {able} speakers with {m} utterances, {n} are wanted: "
                    "enlarge the buffer, or read by random access (shards.reader)"
                )
            size -= n * m
            yield batch
    while batch := _draw(held, n, m, rng):
        yield batch


def _draw(held: dict[str, list], n: int, m: int, rng: np.random.Generator) -> list | None:
    """Takes n speakers with m utterances each out of the buffer; speakers with much are as likely as those with little."""
    able = [speaker for speaker, items in held.items() if len(items) >= m]
    if len(able) < n:
        return None
    batch = []
    for i in rng.choice(len(able), n, replace=False).tolist():
        items = held[able[i]]
        batch.append([items.pop(int(rng.integers(len(items)))) for _ in range(m)])
        if not items:
            del held[able[i]]
    return batch
