"""Submit runs again that were cancelled, failed or lost, with the words they were submitted with.

    spknet resubmit runs/a [--hours 48 ...]        spknet resubmit runs/my_sweep

Cluster options (`spknet submit --help`) given here beat those of the first submission. A run goes on from its newest checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch import jobs, submit, sweep
from launch.jobs import read_json
from spknet.errors import UserError, run


class ResubmitError(UserError):
    """The run cannot be submitted again; the message says why."""


def main(argv: list[str] | None = None) -> int:
    """Exit status of launch.submit or launch.sweep; 2 for a folder that neither has made."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    folder, changed = Path(words[0]).absolute(), words[1:]
    again = read_json(folder / "sweep.json").get("command")
    if again:
        os.chdir(again["cwd"])
        return sweep.main([*again["own"], *changed, "--", *again["common"]])
    note = jobs.read_job(folder)
    if "run" not in note:
        raise ResubmitError(
            f"{folder}: job.json has no words of a submission; start it with the command it was started with"
        )
    os.chdir(note["cwd"])
    return submit.main([*note["cluster"], *changed, "--", *note["run"]])


if __name__ == "__main__":
    sys.exit(run(main))
