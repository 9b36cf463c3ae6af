"""Embeddings on disk, so that scoring again costs no extraction.

FOLDER/embeddings.npy        (utterances, crops, dimensions)
FOLDER/embeddings.txt        `name samples` a line, in the order of the rows
FOLDER/cohort.npy            (speakers, dimensions), where a cohort was used
FOLDER/embeddings.json       what made them: checkpoint and its digest, step, crops, how they are scored; SHA-256 of the files above

embeddings.json goes first when a folder is written over and comes last, so a folder that has it is whole.

keep("out", embedded, identity(meta)); embedded, cohort, facts = load("out")
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from shards.format import atomic_write, sha256_file, write_file
from spknet.evaluate.scoring import Embedded
from spknet.evaluate.trials import TrialError, open_text

SAMPLE_RATE = 16000  # Hz, where embeddings.json says nothing
FILES = ("embeddings.npy", "embeddings.txt", "cohort.npy")
AGAIN = "make it again with `spknet evaluate --keep_embeddings` or `spknet embed`"


def identity(meta: dict) -> dict:
    """Which network it was: path, step and epoch of spknet.checkpoints.network.load_network, and the file's digest."""
    facts = {name: meta.get(name) for name in ("path", "step", "epoch")}
    return facts | {"checkpoint_sha256": sha256_file(meta["path"])}


def keep(folder: str | Path, embedded: Embedded, facts: dict, cohort: np.ndarray | None = None) -> None:
    """Writes embeddings with what made them; embeddings.json last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("embeddings.json", "cohort.npy"):  # of another network, perhaps
        (folder / name).unlink(missing_ok=True)
    names = sorted(embedded.rows, key=embedded.rows.__getitem__)
    write_file(folder / "embeddings.txt", "".join(f"{name} {n}\n" for name, n in zip(names, embedded.samples)))
    for name, array in (("embeddings.npy", embedded.embeddings), ("cohort.npy", cohort)):
        if array is not None:
            with atomic_write(folder / name) as file:
                np.save(file, array, allow_pickle=False)
    sums = {name: sha256_file(folder / name) for name in FILES if (folder / name).is_file()}
    rate = {} if embedded.sample_rate == SAMPLE_RATE else {"sample_rate": embedded.sample_rate}
    write_file(folder / "embeddings.json", json.dumps(rate | facts | {"sha256": sums}, indent=1))


def load(folder: str | Path) -> tuple[Embedded, np.ndarray | None, dict]:
    """(embeddings, cohort or None, facts). Raises TrialError where files are missing, damaged or do not fit each other."""
    folder = Path(folder)
    if not (folder / "embeddings.npy").is_file():
        raise TrialError(f"{folder} holds no embeddings.npy; {AGAIN}")
    try:
        facts = json.loads((folder / "embeddings.json").read_text())
        array = np.load(folder / "embeddings.npy", allow_pickle=False)
        cohort = np.load(folder / "cohort.npy", allow_pickle=False) if (folder / "cohort.npy").is_file() else None
        lines = [line.rsplit(None, 1) for _, line in open_text(folder / "embeddings.txt")]
        rows, samples = {line[0]: i for i, line in enumerate(lines)}, np.array([int(line[1]) for line in lines])
    except FileNotFoundError as error:
        raise TrialError(f"{error.filename} is missing: the folder was not finished; {AGAIN}") from None
    except (ValueError, IndexError, EOFError) as error:
        raise TrialError(f"{folder}: its embeddings cannot be read ({error}); {AGAIN}") from None
    if len(lines) != len(array):
        raise TrialError(f"{folder}: {len(array)} embeddings, but embeddings.txt has {len(lines)} lines; make it again")
    for name, digest in facts.pop("sha256", {}).items():  # folders of earlier versions have none
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise TrialError(f"{folder / name} is not what was written there: its SHA-256 differs; {AGAIN}")
    return Embedded(array, rows, samples, facts.get("sample_rate", SAMPLE_RATE)), cohort, facts
