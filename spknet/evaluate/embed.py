"""Embeddings of utterances, the same whatever the number of ranks.

Rounding in a matrix product depends on the batch it is done in. So batches are cut before ranks are considered: utterances
of exactly the same length share a batch of at most `batch_seconds` (nothing is padded, so nothing leaks from a neighbour),
an utterance with its crops never leaves its batch, and whole batches are dealt to ranks, longest first to the rank with
the least to do. Rank 0 gathers the embeddings as tensors, block by block, into its host's memory.

On a GPU a batch takes as much audio as fits in half of the free memory (a power of 2 of seconds, the least of all ranks), so
the numbers are the same on any number of GPUs of one kind. Files are read by threads, batches copied on a stream of their own,
and embeddings fetched while the next batch is computed.

    rows = embed(model, sources, places, Embedding(Crops(16000 * 4, 10)))  # (utterances, crops, dimensions) on rank 0
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from spknet.checkpoints.network import load_network
from spknet.errors import run
from spknet.evaluate import embeddings as kept
from spknet.evaluate.commands import Parser, at_least, check_writable
from spknet.evaluate.scoring import Embedded
from spknet.evaluate.trials import TrialError, open_text
from spknet.evaluate.utterances import Crops, Places, Sources
from spknet.messages import Progress
from spknet.parallel.gather import rank, world_size
from spknet.parallel.ranks import ranks
from spknet.parallel.together import gather_objects, on_first, raise_together, together

GATHERED = 2**26  # bytes of all ranks that travel at a time
READERS = 2, 8  # threads that read and decode ahead of the network: as many as it has itself, within these limits
CPU_SECONDS = 60.0  # audio in one forward pass on a CPU
PROBE_SECONDS = 8.0  # audio whose memory on a GPU is measured


BATCH_HELP = "audio in one forward pass, seconds; 0: half of the GPU's memory, 60 on a CPU"


class Stopped(Exception):
    """Embedding was asked to stop (Embedding.stop said so on some rank); raised on every rank."""


@dataclass(frozen=True)
class Embedding:
    """How utterances are embedded."""

    crops: Crops = Crops()
    batch_seconds: float = 0.0  # audio in one forward pass; 0: what the GPU's memory takes, or CPU_SECONDS
    bf16: bool = False
    stop: Callable[[], bool] | None = None  # asked between batches on each rank; where it says yes, Stopped is raised


def fitting(free: int, each_second: float) -> float:
    """Seconds of audio in one forward pass: the largest power of 2 (1 to 4096) that half of the free memory takes.

    free: bytes; each_second: bytes of the network's maps for a second of audio.
    """
    return 2.0 ** min(12, max(0, int(math.log2(max(1.0, free / 2 / each_second)))))


def batch_seconds(model: torch.nn.Module, how: Embedding, sample_rate: int) -> float:
    """Audio in one forward pass, the same on every rank; called on all ranks, with the model in eval mode."""
    device, dtype = _place(model)
    if how.batch_seconds or device.type != "cuda":
        return how.batch_seconds or CPU_SECONDS
    with together("measuring the network's memory"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=how.bf16):
            model(torch.zeros(1, round(PROBE_SECONDS * sample_rate), device=device, dtype=dtype))
        used = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
        seconds = fitting(torch.cuda.mem_get_info(device)[0], used / PROBE_SECONDS)
    return min(gather_objects(seconds))


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
    model: torch.nn.Module, sources: Sources, places: Places, how: Embedding, what: str = "embedding"
) -> np.ndarray | None:
    """Embeddings (utterances, crops, dimensions), float32 (float64 of a float64 network), on rank 0; None elsewhere.

    Called on all ranks with the same places. The network stays where it is; it is put in eval mode and left as it was. A
    failure on one rank (a damaged file) is raised on all; so is Stopped. what: the name on the progress bar.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _embed(model, sources, places, how, what)
    finally:
        for module, training in modes:
            module.training = training


def _embed(model, sources: Sources, places: Places, how: Embedding, what: str) -> np.ndarray | None:
    seconds = batch_seconds(model, how, sources.sample_rate)
    batches = plan(places.samples, how.crops, round(seconds * sources.sample_rate))
    costs = [int(how.crops.length(places.samples[batch]).sum()) * how.crops.count for batch in batches]
    dealt = deal(costs, world_size())
    mine = [batches[i] for i in dealt[rank()]]
    own, failure = None, None
    try:
        with Progress(sum(map(len, mine)), unit=f"{what}: utterance", shown=rank() == 0) as progress:
            own = _embed_batches(model, _read_ahead(sources, places, how.crops, mine), how, progress)
    except torch.OutOfMemoryError:
        full = f"the GPU's memory is full with {seconds:g} s of audio"
        failure = TrialError(f"{full}; give --batch_seconds {seconds / 4:g}")
    except Exception as error:  # raised again below, after the other ranks know
        failure = error
    if any(gather_objects(isinstance(failure, Stopped))):
        raise Stopped(f"asked to stop: {what}")
    raise_together(failure, what)
    rows = [np.concatenate([batches[i] for i in share]) if share else np.empty(0, np.int64) for share in dealt]
    return _gather(own, rows, how.crops.count, _place(model)[0])


def _place(model: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(model.parameters(), torch.empty(0))
    return first.device, first.dtype


def _embed_batches(model, waves: Iterator[torch.Tensor], how: Embedding, progress: Progress) -> torch.Tensor | None:
    """(own utterances, crops, dimensions) in the order of the batches, on the CPU; None without batches."""
    device, dtype = _place(model)
    done, fetched = [], None
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=how.bf16):
        for audio in _on_device(waves, device):
            if how.stop is not None and how.stop():
                raise Stopped("asked to stop while embedding")
            rows = model(audio.to(dtype) / 32768)  # (batch * crops, dimensions)
            rows = rows.double() if dtype == torch.float64 else rows.float()
            if fetched is not None:  # the batch before, while the device computes this one
                done.append(fetched())
            fetched = _fetch(rows.unflatten(0, (-1, how.crops.count)))
            progress.advance(by=len(audio) // how.crops.count)
    return torch.cat([*done, fetched()]) if fetched is not None else None


def _on_device(waves: Iterator[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """The batches on the device, copied there while it computes."""
    if device.type != "cuda":
        yield from (audio.to(device) for audio in waves)
        return
    stream = torch.cuda.Stream(device)
    for audio in waves:
        with torch.cuda.stream(stream):
            there = audio.to(device, non_blocking=True)
        torch.cuda.current_stream(device).wait_stream(stream)
        there.record_stream(torch.cuda.current_stream(device))
        yield there


def _fetch(rows: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begins to copy rows to the host; what is returned waits for them."""
    if not rows.is_cuda:
        return lambda: rows
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return host.clone()  # pinned memory is short

    return wait


def _read_ahead(sources: Sources, places: Places, crops: Crops, batches: list[np.ndarray]) -> Iterator[torch.Tensor]:
    """The audio of each batch, (utterances * crops, samples) int16, a few batches ahead of the network."""

    def load(batch):
        audio = torch.from_numpy(np.concatenate([crops.cut(sources.read(places, i)) for i in batch]))
        return audio.pin_memory() if torch.cuda.is_available() else audio

    readers = min(max(torch.get_num_threads(), READERS[0]), READERS[1])
    ahead = 2 * readers
    with ThreadPoolExecutor(readers) as pool:
        waiting = [pool.submit(load, batch) for batch in batches[:ahead]]
        try:
            for i in range(len(batches)):
                yield waiting.pop(0).result()
                if i + ahead < len(batches):
                    waiting.append(pool.submit(load, batches[i + ahead]))
        finally:
            for future in waiting:
                future.cancel()


def _gather(own: torch.Tensor | None, rows: list[np.ndarray], crops: int, device) -> np.ndarray | None:
    """This rank's embeddings (or None) and the utterances of every rank -> all embeddings in order, on rank 0."""
    if world_size() == 1:
        if own is None:
            return np.empty((0, crops, 0), np.float32)
        out = np.empty(own.shape, own.numpy().dtype)
        out[rows[0]] = own.numpy()
        return out
    carrier = torch.device(device) if dist.get_backend() == "nccl" else torch.device("cpu")
    shapes = gather_objects(None if own is None else (own.shape[2], own.dtype))
    known = [shape for shape in shapes if shape is not None]
    if not known:
        return np.empty((0, crops, 0), np.float32) if rank() == 0 else None
    dimensions, dtype = known[0]
    out = torch.empty(sum(map(len, rows)), crops, dimensions, dtype=dtype) if rank() == 0 else None
    at_once = max(1, GATHERED // (world_size() * crops * dimensions * dtype.itemsize))
    for start in range(0, max(map(len, rows)), at_once):
        n = min(at_once, max(map(len, rows)) - start)
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


def read_names(path: str, sources: Sources) -> Places:
    """The utterances that the lines of a list name, each once, in its order. Raises TrialError.

    A name is the line's last word, or what follows the first (a training list whose paths hold spaces), or the whole line:
    whichever is found for every line.
    """
    lines = [line.strip() for _, line in open_text(path) if line.strip()]
    if not lines:
        raise TrialError(f"{path}, line 1: the list is empty; expected lines that end in the name of an utterance")
    forms = (lambda line: line.split()[-1], lambda line: line.split(None, 1)[-1], lambda line: line)
    tried = [
        sources.locate(list(dict.fromkeys(map(form, lines)))) for form in forms[: 3 if " " in "".join(lines) else 1]
    ]
    places = min(tried, key=lambda places: len(places.missing()))
    if places.missing():
        first = tried[0].missing()[0]
        line = next(n for n, text in open_text(path) if text.strip().endswith(first))
        raise TrialError(f"{path}, line {line}: {first} not found in {sources.describe(first)}")
    return sources.measure(places)


def main(argv: list[str] | None = None) -> int:
    """`spknet embed --checkpoint RUN --list FILES --root FOLDER --out FOLDER`: embeddings of audio files, in the list's order.

    The last word of each line names an utterance, so training lists do as they are; alone or under torchrun.
    """
    parser = Parser("spknet embed", "embeddings of audio files")
    parser.add("--checkpoint", required=True, help="run folder or checkpoint file")
    parser.add("--list", required=True, help="file whose lines end in the name of an utterance")
    parser.add("--root", nargs="+", help="folders that the names start from; absolute names need none")
    parser.add("--shards", nargs="+", help="packed data sets that hold the utterances")
    parser.add("--out", required=True, help="folder for embeddings.npy and the names")
    parser.add("--crop_seconds", type=at_least(0.0), default=0.0, help="length of a crop; 0: whole utterances")
    parser.add("--crops", type=at_least(1), default=1, help="crops spread evenly over an utterance")
    parser.add("--batch_seconds", type=at_least(0.0), default=0.0, help=BATCH_HELP)
    parser.add("--precision", choices=("float32", "bf16"), default="float32")
    parser.add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add("--threads", type=at_least(0), default=0, help="CPU threads of a rank; 0: an equal share of the cores")
    chosen = parser.parse_args(argv)
    with ranks(chosen.device, chosen.threads) as me:
        model, config, meta = load_network(chosen.checkpoint, me.device)
        crops = Crops.of_seconds(chosen.crop_seconds, chosen.crops, model.sample_rate)
        sources = Sources(chosen.shards, chosen.root, model.sample_rate)
        places = on_first("reading the list", lambda: read_names(chosen.list, sources))
        on_first("looking at --out", lambda: check_writable(chosen.out), share=False)
        how = Embedding(crops, chosen.batch_seconds, chosen.precision == "bf16")
        rows = embed(model, sources, places, how)
        if me.first:
            settings = {"score": config.eval.score, "crops": chosen.crops, "crop_seconds": chosen.crop_seconds}
            facts = kept.identity(meta) | {"loss": config.loss.name, "eval": settings}
            numbers = {name: i for i, name in enumerate(places.names)}
            kept.keep(chosen.out, Embedded(rows, numbers, places.samples, model.sample_rate), facts)
            print(f"{chosen.out}: {len(places.names)} utterances, {rows.shape[-1]} dimensions")
            if places.notes:
                print(f"note: {places.notes}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
