"""What packing did to the audio: converted, clipped, silent, cancelled, shorter than the crop, left out. Nothing of it is silent.

    converted (2)
      id1/a/0    44100 Hz to 16000 Hz, mean of 2 channels
    ...
    total: 118 utterances of 12 speakers; converted 2, ... , left out 1

Everything stands in the part files, so the report of a data set can be made at any time, without packing again.

Usage: spknet pack ... --report report.txt --report-crop 2      (and report.json beside it)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards import audio, format, index, parts, plan
from shards.format import ShardError

KINDS = (*audio.NOTES, "shorter than the crop", "left out")


@dataclass
class PackReport:
    """lines: kind -> (key, detail) in the order of keys; unknown: tars of older packs, which kept no notes."""

    utterances: int
    speakers: int
    lines: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    unknown: int = 0

    def totals(self) -> str:
        counts = ", ".join(f"{kind} {len(self.lines[kind])}" for kind in self.lines)
        line = f"total: {self.utterances} utterances of {self.speakers} speakers; {counts}"
        return line + (f"; {self.unknown} tars of an older pack, of which this is not known" if self.unknown else "")

    def text(self) -> str:
        made = []
        for kind, lines in self.lines.items():
            made += [f"{kind} ({len(lines)})"] + [f"  {key}\t{printable(detail)}" for key, detail in lines]
        return "\n".join([*made, self.totals(), ""])

    def json(self) -> str:
        lists = {kind: [{"key": key, "detail": detail} for key, detail in lines] for kind, lines in self.lines.items()}
        counts = {kind: len(lines) for kind, lines in self.lines.items()}
        totals = {"utterances": self.utterances, "speakers": self.speakers, "unknown_tars": self.unknown} | counts
        return json.dumps({"lists": lists, "totals": totals}, indent=1) + "\n"


def printable(text: str) -> str:
    """A line of text in which nothing can hide or begin a new line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def collect(out: str | Path, crop_seconds: float = 0.0) -> PackReport:
    """The report of a packed data set; crop_seconds: which utterances are too short (0: not asked). Raises ShardError."""
    out = Path(out)
    opened = index.open_index(out)
    lines: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    unknown = 0
    for record in parts.records(out):
        made = plan.read_record(record)
        for shard in range(made.first_shard, made.first_shard + made.n_shards):
            part = parts.read_part(out, shard)
            unknown += part.notes is None
            for key, kind, detail in part.notes or ():
                lines[kind].append((key, detail))
            lines["left out"] += [(key, reason) for key, _, reason in part.skipped]
    rate = opened.sample_rate
    for row in np.flatnonzero(opened.rows["samples"] < crop_seconds * rate).tolist():
        seconds = int(opened.rows["samples"][row]) / rate
        lines["shorter than the crop"].append(
            (bytes(opened.keys[row]).decode(), f"{seconds:.3f} s of {crop_seconds:g} s")
        )
    lines = {kind: sorted(found) for kind, found in lines.items()}
    if not crop_seconds:
        del lines["shorter than the crop"]
    return PackReport(len(opened.rows), len(opened.speakers), lines, unknown)


def check_paths(path: str | Path, inputs: dict[str, str | Path | None]) -> None:
    """Raises ShardError where the report, or the JSON beside it, would overwrite an input or cannot be written."""
    if Path(path).suffix == ".json":
        raise ShardError(f"--report {path}: the JSON is written beside the text; give a name with another ending")
    for target in (Path(path), Path(path).with_suffix(".json")):
        format.refuse_overwriting(target, inputs)


def write(report: PackReport, path: str | Path) -> None:
    """FILE.txt and FILE.json."""
    for target, text in ((Path(path), report.text()), (Path(path).with_suffix(".json"), report.json())):
        format.write_file(target, text)
