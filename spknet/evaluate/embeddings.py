"""Embeddings on disk, so that scoring again costs no extraction.

FOLDER/embeddings.npy        (utterances, crops, dimensions)
FOLDER/embeddings.txt        `name samples` a line, in the order of the rows
FOLDER/cohort.npy            (speakers, dimensions), where a cohort was used
FOLDER/embeddings.json       what made them: checkpoint, step, crops, how they are scored

keep("out", embedded, {"checkpoint": "runs/a"}); embedded, cohort, facts = load("out")
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from shards.format import atomic_write
from spknet.evaluate.systems import Embedded
from spknet.evaluate.trials import TrialError, open_text


def keep(folder: str | Path, embedded: Embedded, facts: dict, cohort: np.ndarray | None = None) -> None:
    """Writes embeddings; the array last, so that a folder with an array is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(embedded.rows, key=embedded.rows.__getitem__)
    with atomic_write(folder / "embeddings.txt") as file:
        file.write("".join(f"{name} {n}\n" for name, n in zip(names, embedded.samples)).encode())
    with atomic_write(folder / "embeddings.json") as file:
        file.write(json.dumps(facts, indent=1).encode())
    if cohort is None:
        (folder / "cohort.npy").unlink(missing_ok=True)  # of another network, perhaps
    else:
        with atomic_write(folder / "cohort.npy") as file:
            np.save(file, cohort, allow_pickle=False)
    with atomic_write(folder / "embeddings.npy") as file:
        np.save(file, embedded.embeddings, allow_pickle=False)


def load(folder: str | Path) -> tuple[Embedded, np.ndarray | None, dict]:
    """(embeddings, cohort or None, facts). Raises TrialError where files are missing or do not fit each other."""
    folder = Path(folder)
    if not (folder / "embeddings.npy").is_file():
        raise TrialError(
            f"{folder} holds no embeddings.npy; make it with `python -m spknet.evaluate --keep_embeddings`"
        )
    array = np.load(folder / "embeddings.npy", allow_pickle=False)
    lines = [line.split() for _, line in open_text(folder / "embeddings.txt")]
    if len(lines) != len(array):
        raise TrialError(f"{folder}: {len(array)} embeddings, but embeddings.txt has {len(lines)} lines; make it again")
    rows = {name: i for i, (name, _) in enumerate(lines)}
    cohort = np.load(folder / "cohort.npy", allow_pickle=False) if (folder / "cohort.npy").is_file() else None
    facts = json.loads((folder / "embeddings.json").read_text())
    return Embedded(array, rows, np.array([int(n) for _, n in lines]), facts.get("sample_rate", 16000)), cohort, facts
