"""Everything a run needs to continue, in one file of tensors and plain values.

    RUN/checkpoints/step-00001200.pt = {"format": "spknet checkpoint 1", "step", "epoch", "config", "model", "loss",
        "averaging", "optimizer", "scheduler", "scaler", "speakers", "labels", "data_fingerprint", "versions", "facts",
        "window", "best", "seconds", "sample_rate",
        "head": the index of a head in pieces (spknet.checkpoints.pieces), whose rows lie beside it in a folder}

Written to a temporary name, synced, renamed: a file under its final name is whole. `torch.load(weights_only=True)` reads it. It
is a zip archive whose comment holds the CRC-32 of all bytes before it, its seal: torch does not look at all of its own sums, and
some bytes of an archive have none. Files of earlier versions, and of others, lack the seal; their members' sums are checked.

    save(run_dir, state, keep=3); path, state = newest(run_dir, warn=print)
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from shards.format import atomic_write, remove_leftovers
from spknet.errors import UserError, of_system

FORMAT = "spknet checkpoint 1"
SEAL = b"spknet crc32 %08x"
SEAL_BYTES = len(SEAL % 0)
TAIL_BYTES = 8192  # of a file, in which a seal is looked for that does not stand at the end
NO_COMMENT = b"\0\0"  # the last two bytes of an archive without one: its length
# First bytes of what is often found in a checkpoint's place.
IMPOSTORS = {
    b"version https://git-lfs": "it is a git-lfs pointer, not the file itself; fetch that with `git lfs pull`",
    b"<": "it is a web page (HTML or XML), as a server sends in place of a file that needs a login; download it anew",
    b"\x1f\x8b": "it is a gzip archive; unpack it first",
}


class CheckpointError(UserError):
    """A checkpoint cannot be written, read or continued from; the message says what to do."""


def folder_of(path: str | Path) -> Path:
    """Where the rows of a head in pieces lie that belongs to a checkpoint file (spknet.checkpoints.pieces)."""
    return Path(path).with_suffix("")


def path_of(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}.pt"


def save(
    run_dir: str | Path,
    state: dict[str, Any],
    keep: int,
    best_step: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Writes the checkpoint of state["step"] and removes all but the `keep` newest and the best one.

    check: called when it is written and not yet in place; what it raises (a folder that is another run's by now) leaves things
    as they were. Raises CheckpointError where it cannot be written (a full disk); earlier checkpoints are then untouched.
    """
    path = path_of(run_dir, state["step"])
    try:
        with told_as_unwritten(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                dump({"format": FORMAT, **state}, file)
                check()
    except CheckpointError:
        remove_rows(path)
        raise
    for old in steps(run_dir)[keep:] if keep > 0 else []:
        if old not in (state["step"], best_step):
            path_of(run_dir, old).unlink(missing_ok=True)
    remove_orphans(run_dir)
    return path


def remove_rows(path: Path) -> None:
    """Deletes the rows of a checkpoint that could not be written: a full disk has other uses for the room."""
    if not path.exists():
        shutil.rmtree(folder_of(path), ignore_errors=True)


def remove_orphans(run_dir: str | Path) -> None:
    """Deletes rows of heads whose checkpoint file is gone, or was never written by a run that was killed."""
    for folder in (p for p in (Path(run_dir) / "checkpoints").glob("step-*") if p.is_dir()):
        if folder.with_suffix(".pt").exists():
            remove_leftovers(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


class _Summed:
    """A file that torch.save writes into, and the CRC-32 of what it wrote."""

    def __init__(self, file):
        self.file, self.crc, self.flush = file, 0, file.flush
        self.failure: OSError | None = None  # torch says only that some position is wrong

    def write(self, content) -> int:
        self.crc = zlib.crc32(content, self.crc)
        try:
            return self.file.write(content)
        except OSError as error:
            self.failure = error
            raise


def dump(state: dict[str, Any], file) -> None:
    """torch.save(state, file) for a file that is empty and open for writing, with the seal."""
    summed = _Summed(file)
    try:
        torch.save(state, summed)
    except RuntimeError as error:
        raise summed.failure or error from None
    file.seek(-len(NO_COMMENT), 2)
    file.write(SEAL_BYTES.to_bytes(2, "little") + SEAL % summed.crc)


@contextlib.contextmanager
def told_as_unwritten(path: Path) -> Iterator[None]:
    """What keeps a checkpoint, or the rows of its head, from being written becomes a CheckpointError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if "DataLoader worker" in str(error):  # torch raises that wherever the program is
            raise
        reason = str(of_system(error)) if isinstance(error, OSError) else str(error).split("\n")[0]
        free = shutil.disk_usage(path.parents[1]).free
        kept = "earlier checkpoints are intact" if steps(path.parents[1]) else "there is no earlier one"
        raise CheckpointError(
            f"cannot write checkpoint {path}: {reason} ({free / 2**20:.0f} MiB free there); {kept}: make room and start the"
            " same command again"
        ) from error


def steps(run_dir: str | Path) -> list[int]:
    """Steps of the checkpoints that lie there, newest first."""
    found = (re.fullmatch(r"step-(\d+)\.pt", p.name) for p in (Path(run_dir) / "checkpoints").glob("step-*.pt"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read(path: str | Path) -> Any:
    """The content of a checkpoint of any program, on the CPU. Raises CheckpointError where it is missing or damaged.

    Only tensors and plain values are read; a file that wants to run code is refused. Raises UserError where the file cannot be
    read at all (no permission, a disk that fails), which says nothing about its content.
    """
    path = Path(path)
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise CheckpointError(f"{path} is a folder; give a file, or a run folder that holds checkpoints/step-*.pt")
        if not stat.S_ISREG(kind):
            raise CheckpointError(f"{path} is a pipe or a device, not a file")
        check_sums(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path}: no such checkpoint; give a file, or a run folder that holds checkpoints/step-*.pt"
        ) from None
    except OSError as error:
        raise of_system(error) from error
    try:
        with open(path, "rb") as file:  # a name may end in .safetensors, which torch would go by
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file, with advice that is not ours
        raise CheckpointError(_damaged(path, _reason(error))) from error
    return state


def check_sums(path: Path) -> None:
    """Looks at every byte of a file. Raises CheckpointError where the seal, or a member's sum, does not fit, and for what is no checkpoint."""
    with open(path, "rb") as file:
        head = file.read(64)
        if not head.strip():
            raise CheckpointError(_damaged(path, "it is empty" if not head else "it begins with blanks"))
        for beginning, what in IMPOSTORS.items():
            if head.lstrip().startswith(beginning):
                raise CheckpointError(f"{path} is not a checkpoint: {what}")
        sealed = _seal_fits(file)
    if sealed is False:
        raise CheckpointError(f"{path} is damaged: its checksum does not fit; use an earlier checkpoint")
    if sealed is None:
        _check_members(path)


def _seal_fits(file) -> bool | None:
    """None where there is no seal, nor what is left of one."""
    size = file.seek(0, 2)
    file.seek(max(0, size - TAIL_BYTES))
    tail, length = file.read(), SEAL_BYTES.to_bytes(2, "little")
    note = tail[-SEAL_BYTES:]
    if re.fullmatch(rb"spknet crc32 [0-9a-f]{8}", note) and tail[:-SEAL_BYTES].endswith(length):
        return SEAL % _crc(file, size - SEAL_BYTES) == note
    end = tail.rfind(b"PK\5\6")  # the archive's last record: 20 bytes, the comment's length, the comment
    return False if b"spknet crc32" in tail or (end >= 0 and tail[end + 20 : end + 22] == length) else None


def _crc(file, end: int) -> int:
    """CRC-32 of the first `end` bytes, as they were before the comment's length was set."""
    file.seek(0)
    crc, left = 0, end - len(NO_COMMENT)
    while left > 0:
        block = file.read(min(left, 1 << 20))
        crc, left = zlib.crc32(block, crc), left - len(block)
    return zlib.crc32(NO_COMMENT, crc)


def _check_members(path: Path) -> None:
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many types for a damaged file
        # EINVAL: of a seek to a senseless place.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise CheckpointError(_damaged(path, "its zip archive cannot be read")) from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not fit; use an earlier checkpoint")


def _reason(error: Exception) -> str:
    code = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if code:
        return (
            f"it holds a Python object ({code[1]}) and would run code; a checkpoint holds tensors and plain values only"
        )
    return "it ends early" if isinstance(error, EOFError) else "torch cannot read its content"


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged or not a checkpoint: {reason}; use an earlier checkpoint"


def newest(run_dir: str | Path, warn: Callable[[str], None], below: float = math.inf):
    """(path, content) of the newest whole checkpoint of a run, or None where it has none; rows of a head in pieces apart.

    warn: called with a message for each damaged one passed over; below: the step from which on all are known to be damaged.
    Raises CheckpointError where all are damaged.
    """
    found = steps(run_dir)
    for path in (path_of(run_dir, step) for step in found if step < below):
        try:
            return path, read(path)
        except CheckpointError as error:
            warn(f"{error} (using the one before it)")
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {run_dir}/checkpoints can be read; start anew elsewhere"
        )
    return None


def is_ours(state: Any) -> bool:
    """Whether the content of a file is a checkpoint of spknet that this version reads."""
    return isinstance(state, dict) and state.get("format") == FORMAT


def sample_rate(state: dict[str, Any]) -> int:
    """Hz that the network of one of our checkpoints is given. Old ones do not say; their 25 ms window tells."""
    weights = state.get("model")
    window = weights.get("features.window") if isinstance(weights, dict) else None
    return state.get("sample_rate") or (16000 if window is None else 40 * len(window))


def load_weights(module: torch.nn.Module, weights: Any, where: str) -> None:
    """module.load_state_dict(weights), where every tensor has the name, shape and number type that the module wants.

    where: what the weights are, for the message. Raises CheckpointError naming those that do not fit; nothing is converted.
    """
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where} holds {type(weights).__name__} where weights by name are expected")
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    for name in own.keys() & weights.keys():
        want, got = own[name], weights[name]
        if not isinstance(got, torch.Tensor):
            problems.append(f"{name} is {type(got).__name__}, not a tensor")
        elif got.shape != want.shape:
            problems.append(f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
        elif got.dtype != want.dtype:
            problems.append(f"{name} is {str(got.dtype)[6:]}, not {str(want.dtype)[6:]}")
    if problems:
        raise CheckpointError(
            f"{where} does not fit {type(module).__name__}: {few(sorted(problems))}; give the options that it was trained with"
        )
    module.load_state_dict(weights)


def few(problems: list[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"{', '.join(problems[:3])}{more}"
