"""The host never waits for the device inside a step: what would make it wait is counted in real steps on the CPU."""

import traceback

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spknet.losses import LOSSES
from tests.ranks import run_ranks

T = torch.Tensor
READS = {T.item, T.tolist, T.cpu, T.numpy, T.__bool__, T.__int__, T.__float__, T.__index__, T.__array__}
# Operators whose result's shape or value the host must know before it goes on.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.", "bincount", "one_hot")

# Functions of others and of ours that read tensors which are on the CPU whatever the device is (tests/models/test_gpu.py).
ON_THE_CPU = {
    "_apply_sinc_resample_kernel",  # torchaudio: the length of what it has resampled
    "spans_of",  # filters of a network that is on the CPU, and only of such
}


class Reads(TorchFunctionMode):
    """Counts what Python asks of a tensor: on a CPU tensor `.cpu()` and `.tolist()` reach no operator."""

    def __init__(self, seen):
        self.seen = seen
        super().__init__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copied = function is T.to and "cpu" in args[1:] and not kwargs.get("non_blocking")
        if function in READS or copied:
            _note(self.seen, function.__name__)
        return function(*args, **kwargs)


class Operators(TorchDispatchMode):
    """Counts operators that give their answer to the host, those that C++ calls by itself included."""

    def __init__(self, seen):
        self.seen = seen
        super().__init__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator).removeprefix("aten.")
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name.startswith("index") else []
        lengths = name.startswith("repeat_interleave.Tensor")
        if masks or lengths or name.startswith(WAITS):
            _note(self.seen, name)
        return operator(*args, **(kwargs or {}))


def _note(seen, name) -> None:
    stack = traceback.extract_stack()
    ours = [frame for frame in stack if "/spknet/" in frame.filename]
    if not ON_THE_CPU & {frame.name for frame in stack}:
        seen.append((name, f"{ours[-1].filename.rsplit('/', 1)[-1]}:{ours[-1].name}" if ours else "elsewhere"))


def _steps(rank, world, words, planted=None):
    """Trains; returns (what made the host wait within a step, [(step, steps done when it was read)])."""
    from spknet.train import optim, sidelines, told, trainer
    from spknet.train.__main__ import main

    seen, read, modes, at = [], [], [], {}

    def watch():
        modes.extend([Reads(seen), Operators(seen)])
        for mode in modes:
            mode.__enter__()

    def stop():
        while modes:
            modes.pop().__exit__(None, None, None)

    prepare, after_step, real_read, train = (
        trainer.prepare,
        sidelines.Sidelines.after_step,
        told.Told.read,
        trainer.Trainer.train,
    )

    def watched_prepare(*arguments):
        if at["trainer"].step > 0:  # in its first step a run makes its tables
            watch()
        inputs = prepare(*arguments)
        if planted is not None and modes:
            planted(inputs[0])
        return inputs

    def unwatched(side):
        stop()
        return after_step(side)

    def noted_read(this):  # the one place where the host may wait: for the step before
        inside = bool(modes)
        stop()
        read.append((this.step, at["trainer"].step))
        numbers = real_read(this)
        if inside:
            watch()
        return numbers

    def noted_train(this, side):
        at["trainer"] = this
        return train(this, side)

    trainer.prepare, trainer.Trainer.train = watched_prepare, noted_train
    sidelines.Sidelines.after_step, told.Told.read = unwatched, noted_read
    for name, make in dict(optim.OPTIMIZERS).items():  # as on a GPU: there all of them are fused
        optim.OPTIMIZERS[name] = lambda groups, c, make=make, **how: make(groups, c, **{**how, "fused": True})
    assert main(words) == 0
    return seen, read


@pytest.fixture
def words(options, tmp_path):
    more = ["--train.max_steps", "3", "--log.every_steps", "100", "--run_dir", str(tmp_path / "run")]
    return [*options, *more, "--train.precision", "float32"]


def waits(words, world=1):
    found = run_ranks(world, _steps, words, join=False)
    for _, read in found:
        # Each step is read when the next one is under way, and the last one when it is saved.
        assert read == [(0, 1), (1, 2), (2, 3)]
    return [place for seen, _ in found for place in seen]


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_makes_the_host_wait(loss, words):
    assert waits([*words, "--loss.name", loss]) == []


@pytest.mark.parametrize("loss", ["aamsoftmax", "sphereface2"])
def test_nor_does_a_head_in_pieces_on_two_ranks(loss, words):
    more = ["--loss.sharded", "true", "--optim.clip_norm", "1"]
    more += ["--loss.top_k", "3", "--loss.sample", "0.5"] if loss == "aamsoftmax" else []
    assert waits([*words, "--loss.name", loss, *more], world=2) == []


AUGMENTED = [
    "--augment.preset",
    "kaldi",
    "--augment.probability",
    "1",
    "--augment.speed",
    "[0.9,1.0,1.1]",
    "--augment.spec_augment",
    "true",
    "--augment.lowpass",
    "0.5",
    "--augment.telephone",
    "0.5",
    "--augment.dither",
    "1",
    "--augment.gain_db",
    "[-6,6]",
    "--augment.talkers_apart",
    "true",
    "--augment.level",
    "power",
]


@pytest.mark.parametrize("rir", ["aligned", "unit_energy"])
def test_nor_does_augmentation(rir, words, noise_and_rir):
    noise, responses = map(str, noise_and_rir)
    shards = ["--augment.noise_shards", noise, "--augment.rir_shards", responses, "--augment.rir", rir]
    assert waits([*words, *AUGMENTED, *shards]) == []


@pytest.mark.parametrize(
    "more",
    [
        "--train.precision bf16 --train.channels_last true --train.ema 0.9 --optim.name adamw",
        "--train.precision fp16 --loss.name aamsoftmax --loss.top_k 3 --optim.name sgd --optim.clip_norm 1",
        "--train.chunk 4 --train.frozen stem --optim.clip_norm 1",
    ],
)
def test_nor_do_precisions_averages_clipping_and_chunks(more, words):
    assert waits([*words, *more.split()]) == []


WAYS = {
    "_local_scalar_dense": lambda waves: waves.sum().item(),
    "tolist": lambda waves: waves[0, :3].tolist(),
    "cpu": lambda waves: waves.cpu(),
    "to": lambda waves: waves.to("cpu"),
    "numpy": lambda waves: waves.numpy(),
    "nonzero": lambda waves: waves.nonzero(),
    "__bool__": lambda waves: bool((waves > 2).any()),
    "index.Tensor": lambda waves: waves[waves > 0.5],
    "index_put_": lambda waves: waves.__setitem__(waves > 2, 0.0),
    "masked_select": lambda waves: waves.masked_select(waves > 2),
}


def _all_ways(waves):
    for wait in WAYS.values():
        wait(waves)


def test_every_way_to_wait_is_counted(words):
    ((seen, _),) = run_ranks(1, _steps, [*words, "--train.max_steps", "2"], _all_ways, join=False)
    assert [name for name in WAYS if not any(found.startswith(name) for found, _ in seen)] == []
