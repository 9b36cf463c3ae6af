"""Embeddings of utterances, the same whatever the number of ranks.

Rounding in a matrix product depends on the batch it is done in. So batches are cut before ranks are considered: utterances
of exactly the same length share a batch of at most `batch_seconds` (nothing is padded, so nothing leaks from a neighbour),
an utterance with its crops never leaves its batch, and whole batches are dealt to ranks, longest first to the rank with
the least to do. Rank 0 gathers the embeddings as tensors, block by block.

Crops follow voxceleb_trainer: `crops` starts spread evenly, `linspace(0, length - crop, crops)` truncated; an utterance no
longer than the crop is first repeated until it is one sample longer (`zeros`: padded on both sides, as in 2020).

    rows = embed(model, sources, places, Crops(16000 * 4, 10), device=device)  # (utterances, crops, dimensions) on rank 0
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from spknet.config import ConfigError
from spknet.evaluate.utterances import Places, Sources
from spknet.parallel.gather import rank, world_size

SHORTEST_SECONDS = 0.5  # shorter utterances are repeated to this length: networks need a few dozen frames
GATHERED = 4096  # rows of a rank that travel at a time
READERS = 2  # threads that read and decode ahead of the network


@dataclass(frozen=True)
class Crops:
    """What of an utterance is embedded: `count` crops of `samples` PCM samples, or with samples 0 all of it, once."""

    samples: int = 0
    count: int = 1
    padding: str = "repeat"  # of short utterances: repeat, or zeros
    shortest: int = 8000  # samples that whole utterances are repeated to

    def __post_init__(self):
        if self.count < 1 or (self.samples == 0 and self.count != 1):
            raise ConfigError(
                f"{self.count} crops of {self.samples} samples: several crops want eval.crop_seconds above 0"
            )

    def cut(self, audio: np.ndarray) -> np.ndarray:
        """(samples,) int16 -> (count, crop) int16."""
        if self.samples == 0:
            return np.resize(audio, max(len(audio), self.shortest))[None]
        if len(audio) <= self.samples:
            if self.padding == "zeros":
                side = (self.samples - len(audio) + 1) // 2
                audio = np.pad(audio, (side, side))
            else:
                audio = np.resize(audio, self.samples + 1)
        starts = np.linspace(0, len(audio) - self.samples, self.count).astype(np.int64)
        return np.stack([audio[start : start + self.samples] for start in starts])

    def length(self, samples: np.ndarray) -> np.ndarray:
        """Length of the crops of utterances that are `samples` long."""
        return np.full_like(samples, self.samples) if self.samples else np.maximum(samples, self.shortest)


def plan(samples: np.ndarray, crops: Crops, batch_samples: int) -> list[np.ndarray]:
    """Batches as arrays of utterance indices: equal crop lengths, at most batch_samples of audio unless one alone is more."""
    lengths = crops.length(np.asarray(samples))
    order = np.argsort(lengths, kind="stable")
    batches = []
    for group in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        if len(group):
            size = max(1, int(batch_samples // (lengths[group[0]] * crops.count)))
            batches += [group[a : a + size] for a in range(0, len(group), size)]
    return batches


def deal(costs: list[int], ranks: int) -> list[list[int]]:
    """Indices of batches for each rank: the longest first, each to the rank with the least so far."""
    loads = [(0, r) for r in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, r = heapq.heappop(loads)
        dealt[r].append(i)
        heapq.heappush(loads, (load + costs[i], r))
    return dealt


def embed(
    model: torch.nn.Module,
    sources: Sources,
    places: Places,
    crops: Crops,
    *,
    device: torch.device | str = "cpu",
    batch_seconds: float = 60.0,
    bf16: bool = False,
    what: str = "embedding",
) -> np.ndarray | None:
    """Embeddings (utterances, crops, dimensions), float32 (float64 of a float64 network), on rank 0; None elsewhere.

    sources: at the network's sample rate. Called on all ranks with the same places. The network is put in eval mode and left as it was. A failure on one rank
    (a damaged file) is raised on all.
    """
    batches = plan(places.samples, crops, round(batch_seconds * sources.sample_rate))
    costs = [int(crops.length(places.samples[batch]).sum()) * crops.count for batch in batches]
    dealt = deal(costs, world_size())
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    own, failure = None, None
    try:
        own = _embed_batches(model, sources, places, crops, [batches[i] for i in dealt[rank()]], device, bf16, what)
    except Exception as error:  # raised again below, after the other ranks know
        failure = error
    finally:
        for module, training in modes:
            module.training = training
    _raise_together(failure)
    rows = [np.concatenate([batches[i] for i in share]) if share else np.empty(0, np.int64) for share in dealt]
    return _gather(own, rows, crops.count, device)


def _embed_batches(model, sources, places, crops, batches, device, bf16, what) -> torch.Tensor | None:
    """(own utterances, crops, dimensions) in the order of the batches, on the CPU; None without batches."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    device = torch.device(device)
    done = []
    bar = tqdm(
        total=sum(map(len, batches)), desc=what, unit="utt", delay=3, mininterval=1, disable=rank() != 0, leave=False
    )
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16), bar:
        for batch, audio in zip(batches, _read_ahead(sources, places, crops, batches)):
            waves = torch.from_numpy(audio).to(device).to(dtype) / 32768
            rows = model(waves)  # (batch * crops, dimensions)
            rows = rows.double() if dtype == torch.float64 else rows.float()
            done.append(rows.reshape(len(batch), crops.count, -1).cpu())
            bar.update(len(batch))
    return torch.cat(done) if done else None


def _read_ahead(sources, places, crops, batches) -> Iterator[np.ndarray]:
    """The audio of each batch, (utterances * crops, samples) int16, a few batches ahead of the network."""

    def load(batch):
        return np.concatenate([crops.cut(sources.read(places, i)) for i in batch])

    ahead = 2 * READERS
    with ThreadPoolExecutor(READERS) as pool:
        waiting = [pool.submit(load, batch) for batch in batches[:ahead]]
        try:
            for i in range(len(batches)):
                yield waiting.pop(0).result()
                if i + ahead < len(batches):
                    waiting.append(pool.submit(load, batches[i + ahead]))
        finally:
            for future in waiting:
                future.cancel()


def _raise_together(failure: Exception | None) -> None:
    """Raises this rank's failure, or on the other ranks a RuntimeError that names the rank and the failure."""
    if world_size() > 1:
        messages: list = [None] * world_size()
        dist.all_gather_object(messages, None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is None:
            for other, message in enumerate(messages):
                if message is not None:
                    raise RuntimeError(f"rank {other} failed while embedding: {message}")
    if failure is not None:
        raise failure


def _gather(own: torch.Tensor | None, rows: list[np.ndarray], crops: int, device) -> np.ndarray | None:
    """This rank's embeddings (or None) and the utterances of every rank -> all embeddings in order, on rank 0."""
    if world_size() == 1:
        if own is None:
            return np.empty((0, crops, 0), np.float32)
        out = np.empty(own.shape, own.numpy().dtype)
        out[rows[0]] = own.numpy()
        return out
    carrier = torch.device(device) if dist.get_backend() == "nccl" else torch.device("cpu")
    shapes: list = [None] * world_size()
    dist.all_gather_object(shapes, None if own is None else (own.shape[2], own.dtype))
    known = [shape for shape in shapes if shape is not None]
    if not known:
        return np.empty((0, crops, 0), np.float32) if rank() == 0 else None
    dimensions, dtype = known[0]
    out = torch.empty(sum(map(len, rows)), crops, dimensions, dtype=dtype) if rank() == 0 else None
    for start in range(0, max(map(len, rows)), GATHERED):
        n = min(GATHERED, max(map(len, rows)) - start)
        block = torch.zeros(n, crops, dimensions, dtype=dtype, device=carrier)
        mine = own[start : start + n] if own is not None else None
        if mine is not None:
            block[: len(mine)] = mine
        blocks = [torch.empty_like(block) for _ in range(world_size())] if rank() == 0 else None
        dist.gather(block, blocks, dst=0)
        for r in range(world_size()) if rank() == 0 else ():
            wanted = rows[r][start : start + n]
            out[torch.from_numpy(wanted)] = blocks[r][: len(wanted)].cpu()
    return out.numpy() if rank() == 0 else None


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="spknet embed", description="embeddings of audio files")
    parser.add_argument("--checkpoint", required=True, help="run folder or checkpoint file")
    parser.add_argument("--list", required=True, help="file whose lines end in the name of an utterance")
    parser.add_argument("--root", nargs="+", help="folders that the names start from")
    parser.add_argument("--shards", nargs="+", help="packed data sets that hold the utterances")
    parser.add_argument("--out", required=True, help="folder for embeddings.npy and the names")
    parser.add_argument("--crop_seconds", type=float, default=0.0, help="length of a crop; 0: whole utterances")
    parser.add_argument("--crops", type=int, default=1, help="crops spread evenly over an utterance")
    parser.add_argument("--batch_seconds", type=float, default=60.0, help="audio in one forward pass")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a rank; 0: an equal share of the cores")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """`spknet embed --checkpoint RUN --list FILES --root FOLDER --out FOLDER`: embeddings of audio files.

    The last word of each line names an utterance, so training lists do as they are; alone or under torchrun.
    """
    from shards.format import ShardError
    from spknet.checkpoints.file import CheckpointError
    from spknet.checkpoints.network import load_network
    from spknet.evaluate import embeddings as kept
    from spknet.evaluate.systems import Embedded
    from spknet.evaluate.trials import TrialError, open_text
    from spknet.parallel.ranks import RankError, ranks

    chosen = arguments(argv)
    try:
        names = sorted({line.split()[-1] for _, line in open_text(chosen.list) if line.strip()})
        with ranks(chosen.device, chosen.threads) as me:
            model, config, meta = load_network(chosen.checkpoint, me.device)
            rate = model.sample_rate
            crops = Crops(round(chosen.crop_seconds * rate), chosen.crops, shortest=round(SHORTEST_SECONDS * rate))
            sources = Sources(chosen.shards, chosen.root, rate)
            places = sources.locate(names)
            if places.missing():
                raise TrialError(f"{chosen.list}: {places.missing()[0]} not found in {sources.describe(chosen.shards)}")
            places = sources.measure(places)
            how = {"batch_seconds": chosen.batch_seconds, "bf16": chosen.precision == "bf16"}
            found = embed(model, sources, places, crops, device=me.device, **how)
            if me.first:
                settings = {"score": config.eval.score, "crops": chosen.crops, "crop_seconds": chosen.crop_seconds}
                facts = {"path": meta["path"], "step": meta.get("step"), "loss": config.loss.name, "eval": settings}
                facts["sample_rate"] = rate
                kept.keep(chosen.out, Embedded(found, {n: i for i, n in enumerate(names)}, places.samples, rate), facts)
                print(f"{chosen.out}: {len(names)} utterances, {found.shape[-1]} dimensions")
    except (TrialError, ShardError, CheckpointError, RankError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
