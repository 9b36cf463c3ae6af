"""What a rank leaves behind where a run stalls: the stack of each of its threads, and NCCL's record of its collectives.

FOLDER/stacks-rank-3.txt      Python's stacks (faulthandler)
FOLDER/nccl-trace-rank-3      NCCL's flight recorder, read by torch's `torchfrtrace` (on GPUs)

record(folder)                before the process group is made: NCCL keeps a record
write(folder, rank=3)
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
from pathlib import Path

import torch
import torch.distributed as dist

NCCL_SECONDS = 5.0  # a device that hangs may not answer


def record(folder: Path) -> None:
    """Lets NCCL keep its record, and write it here where a collective times out; what the user has set stands."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl-trace-rank-"))


def write(folder: Path, rank: int) -> None:
    """Writes this rank's files. Errors are passed over: the run ends for another reason."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"stacks-rank-{rank}.txt", "w") as file:
            faulthandler.dump_traceback(file)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            writer = threading.Thread(target=_write_nccl, args=(rank,), daemon=True)
            writer.start()
            writer.join(NCCL_SECONDS)


def _write_nccl(rank: int) -> None:
    with contextlib.suppress(Exception):
        # There is no public function; torch's page on the flight recorder names this one.
        content = torch._C._distributed_c10d._dump_nccl_trace()
        Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + str(rank)).write_bytes(content)
