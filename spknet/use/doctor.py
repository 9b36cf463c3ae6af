"""Is this machine fit for spknet? Everything that runs have failed for, looked at or tried, each with its remedy.

    spknet doctor             a line for each finding; exit status 1 where something would stop a run, else 0
    spknet doctor --json      [{"name", "state": "ok" | "warning" | "error", "found", "remedy"}, ...]

A warning costs something that not everybody needs (GPUs, SLURM, ffmpeg). The all-reduces are real ones: two processes over gloo,
and a process on each of the first two GPUs over NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from shards.commands import Parser
from spknet.errors import run

TORCH, TORCH_BELOW, TORCHAUDIO = (2, 11), (2, 15), "2.11"  # setup.cfg's
FEWEST_FILES = 4096  # a loader process keeps every shard of a data set open
LEAST_SHM, LEAST_DISK = 2**30, 10 * 2**30  # bytes
PATIENCE = 180.0  # seconds for an all-reduce, most of which is the import of torch


@dataclass(frozen=True)
class Finding:
    """state: ok, warning or error. remedy: what to do; empty where all is well."""

    name: str
    state: str
    found: str
    remedy: str = ""


def python() -> Finding:
    version = platform.python_version()
    if tuple(map(int, version.split(".")[:2])) < (3, 10):
        return Finding("python", "error", version, "install Python 3.10 or later and make the environment anew")
    return Finding("python", "ok", f"{version}, {sys.executable}")


def torch_version() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("torch", "error", str(error), "pip install 'torch>=2.11,<2.15'")
    parts = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not TORCH <= parts < TORCH_BELOW:
        return Finding("torch", "error", torch.__version__, "pip install 'torch>=2.11,<2.15'")
    return Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")


def torchaudio_version() -> Finding:
    """Of the version that goes with torch, and built for the same CUDA: otherwise its import fails, or its kernels do."""
    remedy = "install both from one index: pip install 'torch>=2.11,<2.15' 'torchaudio==2.11.*'"
    try:
        import torch
        import torchaudio
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("torchaudio", "error", str(error).splitlines()[0], remedy)
    return audio_fits(torchaudio.__version__, torch.version.cuda, remedy)


def audio_fits(version: str, cuda: str | None, remedy: str) -> Finding:
    """version: of torchaudio, such as 2.11.0+cu130. cuda: torch's, such as 13.0."""
    number, _, build = version.partition("+")
    if not number.startswith(TORCHAUDIO + "."):
        return Finding("torchaudio", "error", f"{version}; expected {TORCHAUDIO}", remedy)
    built = f"{build[2:-1]}.{build[-1]}" if build.startswith("cu") else None
    if build and built != cuda:
        return Finding("torchaudio", "error", f"{version} is for CUDA {built}, torch for {cuda}", remedy)
    return Finding("torchaudio", "ok", version)


def gpus() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPUs", "ok", ", ".join(names))
    if not Path("/proc/driver/nvidia/version").exists():
        return Finding("GPUs", "warning", "none", "none needed for small corpora; VoxCeleb wants one")
    remedy = "update the driver to what torch's CUDA wants, or look at CUDA_VISIBLE_DEVICES and the container's --gpus"
    return Finding("GPUs", "error", f"a driver is there, but torch {torch.__version__} sees no GPU", remedy)


def gloo() -> Finding:
    remedy = "name the network interface: export GLOO_SOCKET_IFNAME=lo (or eth0, see `ip link`); look at /etc/hosts"
    return all_reduce("gloo", 2, remedy)


def nccl() -> Finding:
    import torch

    count = min(2, torch.cuda.device_count())
    if count == 0:
        return Finding("nccl", "ok", "not tried: no GPU")
    remedy = "run again under NCCL_DEBUG=INFO; in a container give --shm-size 8g; try NCCL_P2P_DISABLE=1"
    return all_reduce("nccl", count, remedy)


def all_reduce(backend: str, ranks: int, remedy: str) -> Finding:
    """Starts processes that add 1, 2, ... together."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        words = [sys.executable, "-c", RANK, backend, str(ranks), f"{folder}/store"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        processes = [subprocess.Popen([*words, str(rank)], **pipes) for rank in range(ranks)]
        try:
            said = [p.communicate(timeout=max(1, start + PATIENCE - time.monotonic()))[1] for p in processes]
        except subprocess.TimeoutExpired:
            return Finding(backend, "error", f"{ranks} ranks have not met within {PATIENCE:g} s", remedy)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    failed = [text.strip().splitlines()[-1:] for text, p in zip(said, processes) if p.returncode]
    if failed:
        return Finding(backend, "error", " ".join(failed[0]) or "a rank died without a word", remedy)
    return Finding(backend, "ok", f"an all-reduce of {ranks} ranks")


RANK = """
import datetime, sys, torch, torch.distributed as dist
backend, ranks, store, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
wait = datetime.timedelta(seconds=150)
dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=wait)
value = torch.tensor([rank + 1.0], device=f"cuda:{rank}" if backend == "nccl" else "cpu")
dist.all_reduce(value)
total = ranks * (ranks + 1) / 2
sys.exit(0 if value.item() == total else f"the all-reduce gave {value.item()} instead of {total}")
"""


def shared_memory(path: str = "/dev/shm", least: int = LEAST_SHM) -> Finding:
    remedy = "enlarge it (docker run --shm-size 8g; mount -o remount,size=8g /dev/shm), or give --data.workers 0"
    return room(path, least, path, remedy)


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEWEST_FILES:
        return Finding(
            "open files", "warning", f"at most {soft}", f"ulimit -n {FEWEST_FILES} (the hard limit is {hard})"
        )
    return Finding("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")


def git() -> Finding:
    return program("git", ["--version"], "install git: without it a run's record does not say which code it ran")


def ffmpeg() -> Finding:
    remedy = (
        "install ffmpeg (Debian: package ffmpeg): without it m4a, webm, wma and amr cannot be read; wav, flac, mp3 can"
    )
    return program("ffmpeg", ["-version"], remedy)


def slurm() -> Finding:
    found = program(
        "sbatch", ["--version"], "none needed on one machine; on a cluster load its module (module load slurm)"
    )
    if found.state != "ok":
        return Finding("SLURM", found.state, found.found, found.remedy)
    try:
        return Finding("SLURM", "ok", f"{found.found}, submitit {metadata.version('submitit')}")
    except metadata.PackageNotFoundError:
        remedy = "pip install 'spknet[launch]' for spknet submit and sweep"
        return Finding("SLURM", "warning", f"{found.found}, without submitit", remedy)


def program(name: str, words: list[str], remedy: str) -> Finding:
    """A program on the PATH that answers."""
    path = shutil.which(name)
    if path is None:
        return Finding(name, "warning", "not on the PATH", remedy)
    try:
        done = subprocess.run([path, *words], capture_output=True, text=True, timeout=30, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, "warning", f"{path} does not run: {error}", remedy)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
        return Finding(name, "warning", f"{path} does not work: {said}", remedy)
    return Finding(name, "ok", " ".join(done.stdout.split()[:3]))


def disk(path: str = ".", least: int = LEAST_DISK) -> Finding:
    found = room(path, least, "disk", "make room, or start where there is some: a checkpoint is four times the network")
    if found.state == "ok" and not os.access(path, os.W_OK):
        return Finding("disk", "warning", f"{Path(path).resolve()} is not writable", "start in a folder of yours")
    return found


def room(path: str, least: int, name: str, remedy: str) -> Finding:
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding(name, "warning", f"{path}: {error.strerror}", remedy)
    found = f"{free / 2**30:.1f} GiB free in {Path(path).resolve()}"
    return Finding(name, "ok", found) if free >= least else Finding(name, "warning", found, remedy)


CHECKS = [
    python,
    torch_version,
    torchaudio_version,
    gpus,
    gloo,
    nccl,
    shared_memory,
    open_files,
    git,
    slurm,
    ffmpeg,
    disk,
]
OF_TORCH = [torchaudio_version, gpus, gloo, nccl]  # what nothing can be said of without torch


def examine() -> list[Finding]:
    """Every finding, in order. A check that fails itself is an error."""
    found, left_out = [], []
    for check in CHECKS:
        if check in left_out:
            continue
        try:
            found.append(check())
        except Exception as error:  # a broken machine is what this command is for
            remedy = "unexpected; report it with the output of `spknet doctor --json`"
            found.append(Finding(check.__name__, "error", f"{type(error).__name__}: {error}", remedy))
        if check is torch_version and found[-1].state == "error":
            left_out = OF_TORCH
    return found


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where a finding is an error, else 0."""
    parser = Parser(prog="spknet doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print data instead of lines")
    chosen = parser.parse_args(argv)
    findings = examine()
    if chosen.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    for finding in [] if chosen.json else findings:
        print(f"{finding.state:8} {finding.name:11} {finding.found}")
        if finding.remedy:
            print(f"{'':8} {'':11} -> {finding.remedy}")
    return int(any(finding.state == "error" for finding in findings))


if __name__ == "__main__":
    sys.exit(run(main))
