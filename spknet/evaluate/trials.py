"""Trial lists: pairs of utterances (or of an enrolled model and an utterance) to be scored, with or without the truth.

    VoxCeleb      1 id10270/5r0dWxy17C8/00001.wav id10270/x6uYqmx31kE/00001.wav       1 target, 0 non-target
    unlabelled    id10270/5r0dWxy17C8/00001.wav id10270/x6uYqmx31kE/00001.wav         scored only
    Kaldi         id10270-5r0dWxy17C8-00001 id10270-x6uYqmx31kE-00001 target|nontarget

The first line decides which; `.gz` lists are read as they are. An enrolment list, `model utterance utterance ...` a line,
lets the left side of a trial name a model of several utterances. `spknet trials` makes lists (spknet.evaluate.make_trials).

    trials = read_trials("veri_test.txt"); names = trials.utterances()
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spknet.errors import UserError

KALDI = {"target": 1, "nontarget": 0}
VOXCELEB = {"1": 1, "0": 0}
FORMATS = "`0|1 utterance utterance`, `utterance utterance target|nontarget` or `utterance utterance`"


class TrialError(UserError):
    """A list cannot be used; the message names the list, the line, what was found and what was expected."""


@dataclass(frozen=True)
class Trials:
    """One list. left and right index into `models` and `tests`; order and duplicates are those of the file."""

    name: str  # the file's name without folder and ending
    path: str
    models: list[str]  # distinct names on the left, in order of appearance
    tests: list[str]  # distinct names on the right
    left: np.ndarray  # (n,) int32
    right: np.ndarray  # (n,) int32
    labels: np.ndarray | None  # (n,) int8, 1 target, 0 non-target; None for an unlabelled list
    lines: np.ndarray  # (n,) int32, line of each trial, counted from 1
    enrolment: dict[str, list[str]]  # utterances of the models that are not utterances themselves

    def __len__(self) -> int:
        return len(self.left)

    def utterances_of(self, model: str) -> list[str]:
        """The utterances of a name on the left: those it was enrolled with, or itself."""
        return self.enrolment.get(model, [model])

    def utterances(self) -> list[str]:
        """Every distinct utterance, sorted, so that the order of trials changes nothing downstream."""
        return sorted({u for model in self.models for u in self.utterances_of(model)} | set(self.tests))

    def describe(self, trial: int) -> str:
        """`LIST, line 17 (a b)` for an error message."""
        pair = f"{self.models[self.left[trial]]} {self.tests[self.right[trial]]}"
        return f"{self.path}, line {self.lines[trial]} ({pair})"

    def first_line_of(self, utterances: set[str]) -> tuple[int, str]:
        """The first line that needs one of some utterances, and which."""
        models = np.array([not utterances.isdisjoint(self.utterances_of(m)) for m in self.models])[self.left]
        tests = np.array([t in utterances for t in self.tests])[self.right]
        trial = int(np.argmax(models | tests))
        pair = [*self.utterances_of(self.models[self.left[trial]]), self.tests[self.right[trial]]]
        return int(self.lines[trial]), next(name for name in pair if name in utterances)


def open_text(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a text file, plain or .gz. Raises TrialError where it cannot be read."""
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield from enumerate(file, 1)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TrialError(f"{path}: cannot read this list: {error}") from error


def read_trials(path: str | Path, enrolment: dict[str, list[str]] | None = None) -> Trials:
    """Reads one list. Raises TrialError for a bad label, a missing column, an empty list, or one without both classes."""
    models: dict[str, int] = {}
    tests: dict[str, int] = {}
    left, right, labels, lines = [], [], [], []
    kind = None
    for number, line in open_text(path):
        words = line.split()
        if not words:
            continue
        kind = kind or _kind(words, f"{path}, line {number}")
        a, b, label = _parse(words, kind, f"{path}, line {number}")
        left.append(models.setdefault(a, len(models)))
        right.append(tests.setdefault(b, len(tests)))
        labels.append(label)
        lines.append(number)
    if not lines:
        raise TrialError(f"{path}, line 1: the list is empty; expected {FORMATS}")
    known = None if kind == "unlabelled" else np.array(labels, dtype=np.int8)
    if known is not None and known.min() == known.max():
        found, lacking = ("targets", "non-target") if known[0] else ("non-targets", "target")
        raise TrialError(
            f"{path}, lines {lines[0]} to {lines[-1]}: all {len(lines)} trials are {found}; error rates need at least one {lacking}"
        )
    left, right, lines = (np.array(values, dtype=np.int32) for values in (left, right, lines))
    return Trials(list_name(path), str(path), list(models), list(tests), left, right, known, lines, enrolment or {})


def list_name(path: str | Path) -> str:
    """What a list is called in reports: its file name without .gz and .txt."""
    return Path(path).name.removesuffix(".gz").removesuffix(".txt")


def _kind(words: list[str], where: str) -> str:
    if len(words) == 3:
        if words[2] in KALDI:
            return "kaldi"
        if words[0] in VOXCELEB:
            return "voxceleb"
        raise TrialError(f"{where}: bad label: neither {words[0]!r} nor {words[2]!r} is one; expected {FORMATS}")
    if len(words) == 2 and words[0] not in VOXCELEB and words[1] not in KALDI:
        return "unlabelled"
    problem = "a column is missing" if len(words) < 3 else "too many columns"
    raise TrialError(f"{where}: {problem} ({len(words)} found); expected {FORMATS}")


def _parse(words: list[str], kind: str, where: str) -> tuple[str, str, int]:
    expected = 2 if kind == "unlabelled" else 3
    if len(words) != expected:
        problem = "a column is missing" if len(words) < expected else "too many columns"
        raise TrialError(f"{where}: {problem}: {len(words)} found, {expected} on the lines before")
    if kind == "unlabelled":
        return words[0], words[1], -1
    if kind == "voxceleb":
        label, a, b = VOXCELEB.get(words[0]), words[1], words[2]
    else:
        label, a, b = KALDI.get(words[2]), words[0], words[1]
    if label is None:
        found, allowed = (words[0], "0 or 1") if kind == "voxceleb" else (words[2], "target or nontarget")
        raise TrialError(f"{where}: bad label {found!r}; expected {allowed}, as on the lines before")
    return a, b, label


def read_enrolment(path: str | Path) -> dict[str, list[str]]:
    """Models and their utterances: lines `model utterance ...`; a model may go on over several lines."""
    models: dict[str, list[str]] = {}
    for number, line in open_text(path):
        words = line.split()
        if len(words) == 1:
            raise TrialError(f"{path}, line {number}: a column is missing: model {words[0]!r} has no utterance")
        if words:
            models.setdefault(words[0], []).extend(words[1:])
    if not models:
        raise TrialError(f"{path}, line 1: the list is empty; expected `model utterance ...`")
    return models


def read_speakers(path: str | Path) -> dict[str, str]:
    """Speakers of utterances whose names do not tell: lines `utterance speaker`."""
    speakers = {}
    for number, line in open_text(path):
        words = line.split()
        if len(words) != 2:
            raise TrialError(f"{path}, line {number}: {len(words)} columns; expected `utterance speaker`")
        speakers[words[0]] = words[1]
    return speakers


def speaker_of(utterance: str, known: dict[str, str] | None = None) -> str:
    """An utterance's speaker: as given, else what stands before the first `/`, else before the first `-`."""
    if known and utterance in known:
        return known[utterance]
    return utterance.split("/" if "/" in utterance else "-", 1)[0]


def main(argv: list[str] | None = None) -> int:
    """Makes trials from a data set: see spknet.evaluate.make_trials."""
    from spknet.evaluate.make_trials import main as make

    return make(argv)


if __name__ == "__main__":
    raise SystemExit(main())
