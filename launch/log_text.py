"""What the text of a job's log says: without progress bars, of the newest start only, and how ranks ended.

plain(last_life(Path("runs/a/jobs/812/812_0_log.err")))
"""

from __future__ import annotations

import re
from pathlib import Path

BAR = re.compile(r"\d+%\|.*\|\s*[\d.]+\w*/[\d.]+\w*\s*\[|^\s*\d+step \[")  # tqdm's line
EMPTY = re.compile(r"\[rank \d+\]")  # torchrun's prefix before a bar's end
EXIT_CODE = re.compile(r"failed \(exitcode: -(\d+)\)")  # of the rank that ended first on this node
NAMED = re.compile(r"ranks? [\d, ]+\(([^)]+)\) (?:is|are) (?:behind|gone)")  # spknet/parallel/watchdog.py's words
SIGTERM = 15
BEGINNING = "launch: start of"  # written by each start of a task, whose log all starts append to


def plain(text: str) -> list[str]:
    """Lines without progress bars: of a line that was drawn over, what stood there last."""
    lines = (line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n"))
    kept = [line.rstrip() for line in lines if not BAR.search(line) and not EMPTY.fullmatch(line.rstrip())]
    return kept[:-1] if kept and not kept[-1] else kept


def last_life(path: Path) -> str:
    """What the newest start of the job has written into its log, to which every start appends."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    return text[max(text.rfind(BEGINNING), 0) :]


def killed_ranks(path: Path) -> list[int]:
    """Signals by which ranks on this node were killed (not TERM, which torchrun sends to the rest): of each group of ranks
    the one that ended first, since torchrun itself kills what does not end after it."""
    return [n for n in map(int, EXIT_CODE.findall(last_life(path))) if n != SIGTERM]


def blamed_hosts(reason: str) -> list[str]:
    """The hosts whose rank a run's reason names as stalled, dead or silent."""
    match = NAMED.search(reason)
    return match[1].split(", ") if match else []


def error_line(path: Path) -> str:
    """The run's own last `error: ...` in a log, without the word; empty where there is none."""
    found = [m[1] for line in plain(last_life(path)) if (m := re.match(r"(?:\[rank \d+\] )?error: (.+)", line))]
    return found[-1] if found else ""
