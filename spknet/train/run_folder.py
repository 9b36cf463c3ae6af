"""The files that say what a run is and how it stands; RUN/lock (lock.py) says who may write them.

RUN/state.json   {"state": running | requeue | done | failed, "step", "reason", "time", "run"}: what launchers act on
RUN/record.json  git revision, command, hosts, package versions, GPUs: what a reader of the results wants to know
RUN/config.yaml  every option of the run
RUN/before-1/    what stood there when a run was begun anew in a folder that was used

Nothing is written before every check has passed, so that a refused command leaves a run as it was:

    with hold(run_dir) as owner: ...checks...; notes = begin(owner, options, record(devices, hosts), step)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from shards.format import write_file
from spknet.train.lock import Owner, may_write

PACKAGES = ("spknet", "torch", "torchaudio", "numpy", "soundfile", "webdataset", "pydantic")
STATES = ("running", "requeue", "done", "failed")
REASON_CHARACTERS = 1000
GIT_SECONDS = 20.0  # a file server that hangs must not hold up a run for a note


def write_json(path: Path, value) -> None:
    write_file(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where there is none or it is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        return json.loads(path.read_bytes())
    return None


def read_state(run_dir: str | Path) -> dict | None:
    """RUN/state.json, or None where there is none. A damaged one reads as the state `unreadable`."""
    path = Path(run_dir) / "state.json"
    said = read_json(path)
    if isinstance(said, dict) and said.get("state") in STATES and isinstance(said.get("step"), int):
        return {"reason": "", "time": 0.0, **said}
    if not path.exists():
        return None
    return {
        "state": "unreadable",
        "step": 0,
        "reason": f"{path} is damaged; the next start writes it anew",
        "time": 0.0,
    }


def write_state(run_dir: str | Path, state: str, step: int, reason: str = "", token: str | None = None) -> bool:
    """Sets RUN/state.json; False where that is not this process's to say (see may_write), and nothing is written then.

    The first `failed` of a run stands: what other ranks meet because of it is not the reason.
    """
    with may_write(run_dir, token) as (allowed, run):
        before = read_state(run_dir) or {}
        if not allowed or (run is not None and before.get("state") == "failed" and before.get("run") == run):
            return False
        path = Path(run_dir) / "state.json"
        value = {"state": state, "step": step, "reason": reason[:REASON_CHARACTERS], "time": time.time(), "run": run}
        try:
            write_json(path, value)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
                raise
            _overwrite(path, json.dumps(value, indent=1).encode() + b"\n")
    return True


def _overwrite(path: Path, content: bytes) -> None:
    # On a full disk: the few bytes fit into the block that the old ones have.
    with open(path, "r+b", buffering=0) as file:
        file.write(content)
        file.truncate(len(content))
        os.fsync(file.fileno())


def begin(owner: Owner, options: dict[str, Any], about: dict[str, Any], step: int) -> list[str]:
    """Puts a start on record, once every check has passed: config.yaml, record.json and the state `running`.

    options: nested, of config.yaml; about: of record(). Returns what there is to say: a config.yaml that somebody has
    edited is kept under another name.
    """
    owner.check()
    notes, path = [], owner.run_dir / "config.yaml"
    text = yaml.safe_dump(options, sort_keys=False).encode()
    if _is_edited(path, text):
        aside = _unused(owner.run_dir, "config.yaml.edited-")
        os.replace(path, aside)
        notes.append(
            f"{path} was edited; it tells what a run was started with and is not read. Your edit is kept as {aside.name}:"
            " give it with --config to use it"
        )
    write_file(path, text)
    write_json(owner.run_dir / "record.json", {**about, "config_sha256": _digest(text)})
    write_state(owner.run_dir, "running", step, "", owner.token)
    return notes


def _is_edited(path: Path, text: bytes) -> bool:
    """Whether config.yaml is neither what a run of ours wrote nor what is written now."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    recorded = (read_json(path.with_name("record.json")) or {}).get("config_sha256")
    if recorded is not None:
        return _digest(content) != recorded and content != text
    try:  # of a version that kept no digest: ours is laid out as safe_dump does it
        return yaml.safe_dump(yaml.safe_load(content), sort_keys=False).encode() != content
    except (yaml.YAMLError, UnicodeDecodeError):
        return True


def note_before_begin(run_dir: str | Path, state: str, reason: str, token: str | None = None) -> None:
    """Notes why a start ended before begin(). A mistake only in a folder that has no state yet: any other stays as it was.
    A lost rank (`requeue`) in that of a run that was interrupted, too: it goes on when it is started again."""
    said = read_state(run_dir)
    if said is None or (state == "requeue" and said["state"] in ("running", "requeue")):
        write_state(run_dir, state, said["step"] if said else 0, reason, token)


def job_folder(run_dir: str | Path) -> Path:
    """RUN/jobs/JOB: where a start's logs and dumps go."""
    return Path(run_dir) / "jobs" / job_id()


def job_id() -> str:
    """The job's id as submitit writes it: 12, or 12_3 for an array's element, or the local controller's; `none` without one."""
    place = os.environ
    if "SLURM_ARRAY_TASK_ID" in place:
        return f"{place['SLURM_ARRAY_JOB_ID']}_{place['SLURM_ARRAY_TASK_ID']}"
    return place.get("SLURM_JOB_ID") or place.get("SUBMITIT_LOCAL_JOB_ID", "none")


def carries_on(run_dir: str | Path) -> bool:
    """Whether this start goes on with one that was interrupted: then train.resume PATH and never mean the newest checkpoint.

    So it is for a job that SLURM has requeued, for a group that torchrun has started again, and for the same words again.
    """
    said, about = read_state(run_dir) or {}, read_json(Path(run_dir) / "record.json") or {}
    if said.get("state") not in ("running", "requeue", "failed"):
        return False
    job = os.environ.get("SLURM_JOB_ID")
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    same = (job is not None and about.get("job") == job) or about.get("command", [None, None])[1:] == sys.argv[1:]
    return again or same


def set_aside(owner: Owner, keep: Path | None = None) -> list[str]:
    """Moves what an earlier run left in the folder to RUN/before-1 (2, ...), where this start does not go on from its newest
    checkpoint: the next start would take that one for its own. Returns what there is to say.

    keep: the checkpoint of this folder that is gone on from; it stays, with its rows, the logs and the evaluations.
    """
    owner.check()
    folder = owner.run_dir
    paths = [path for path in (folder / "checkpoints").glob("step-*") if keep is None or path.stem > keep.stem]
    if not paths:
        return []
    if keep is None:
        logs = [folder / name for name in ("metrics.jsonl", "tensorboard", "eval", "profile", "card.json", "card.md")]
        paths += [path for path in logs if path.exists()]
    aside = _unused(folder, "before-")
    for path in paths:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    what = "begun anew" if keep is None else f"gone on from {keep.name}"
    return [f"{what} in {folder}; what stood there is kept in {aside}"]


def _unused(folder: Path, prefix: str) -> Path:
    """PREFIX1, or the first number that is free."""
    number = 1
    while (folder / f"{prefix}{number}").exists():
        number += 1
    return folder / f"{prefix}{number}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def record(devices: list[str], hosts: list[str]) -> dict:
    """What made this run: revision, command, hosts, versions, devices."""
    return {
        "git_revision": git_revision(Path(__file__).resolve().parents[2]),
        "command": sys.argv,
        "hosts": hosts,
        "devices": devices,
        "python": platform.python_version(),
        "packages": versions(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_revision(folder: Path) -> str | None:
    """Revision of the checkout that `folder` is the top of, with `-modified` where tracked files have changed.

    None where it is not one: installed, without git, or lying inside another repository.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or not Path(top).is_dir() or not folder.samefile(top):
        return None
    if _git(folder, "ls-files", "--error-unmatch", "spknet/errors.py") is None:
        return None
    revision = _git(folder, "rev-parse", "--verify", "HEAD")
    changed = _git(folder, "status", "--porcelain", "-uno")
    return revision and revision + ("-modified" if changed else "")


def _git(folder: Path, *words: str) -> str | None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Versions of the packages that shape a run's numbers."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def code_digest() -> str:
    """Digest of the source files that a rank runs: all ranks must have the same."""
    digest = hashlib.sha256()
    here = Path(__file__).parents[1]
    for path in sorted([*here.rglob("*.py"), *(here.parent / "shards").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
