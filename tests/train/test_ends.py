"""Each way in which a run can end, without and with loader processes: exit status, state.json, what is left, and how soon.

docs/design.md shows these rows ("How a start ends"); a rank among others: test_failures.py.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from spknet.train.run_folder import read_state
from tests.ranks import exit_statuses
from tests.train.test_failures import _patched

GONE_SECONDS = 10.0  # until no process of the run is left; torch's loaders look for their parent every 5 s

ENDS = {  # place: exit status, state
    "none": (0, "done"),
    "SIGTERM": (75, "requeue"),
    "SIGKILL": (-9, "running"),
    "options": (2, None),  # which may not even name the folder
    "data": (2, "failed"),
    "network": (1, "failed"),
    "checkpoint": (2, "done"),  # of a finished run, which is left as it was
    "loader": (2, "failed"),
    "step": (1, "failed"),
    "saving": (2, "failed"),
    "evaluation": (1, "failed"),
}


def _run(_rank: int, place: str, words: list[str]) -> int:
    """spknet.train in a session of its own, to which its loaders belong."""
    os.setsid()
    Path(os.environ["SESSION"]).write_text(str(os.getpid()))
    if not place.startswith("SIG"):
        return _patched(0, place, 0, words)
    from spknet.train import trainer

    real = trainer.prepare

    def signalled(*arguments):
        Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
        os.kill(os.getpid(), getattr(signal, place))
        return real(*arguments)

    trainer.prepare = signalled
    return _patched(0, "none", -1, words)


def left_of(session: int) -> list[str]:
    """Names of the living processes of a session."""
    names = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = stat.read_text().rsplit(")", 1)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields.split()[3] == str(session) and fields.split()[0] not in "ZX":
            names.append(name)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("place", ENDS)
def test_each_end_has_its_status_and_state_and_leaves_no_process(
    place, workers, options, corpus, tmp_path, monkeypatch
):
    run, failed_at, session = tmp_path / "run", tmp_path / "failed", tmp_path / "session"
    monkeypatch.setenv("FAILED_AT", str(failed_at))
    monkeypatch.setenv("SESSION", str(session))
    words = [*options, "--data.workers", workers, "--train.max_steps", "2", "--run_dir", str(run)]
    if place == "evaluation":
        words += ["--eval.trials", f"{corpus}/test_list.txt", "--eval.root", str(corpus)]
    if place == "checkpoint":
        assert exit_statuses(1, _run, "none", words) == [0]
        words += ["--train.epochs", "9"]
    status, state = ENDS[place]
    assert exit_statuses(1, _run, place, words) == [status]
    assert (read_state(run) or {}).get("state") == state
    began = float(failed_at.read_text()) if failed_at.exists() else read_state(run)["time"]
    while left_of(int(session.read_text())):
        assert time.time() - began < GONE_SECONDS, left_of(int(session.read_text()))
        time.sleep(0.1)
    print(f"\n| {place} | {workers} | {status} | {state} | {time.time() - began:.1f} |")
