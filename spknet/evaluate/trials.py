"""Trial lists: pairs of utterances (or of an enrolled model and an utterance) to be scored, with or without the truth.

    VoxCeleb      1 id10270/5r0dWxy17C8/00001.wav id10270/x6uYqmx31kE/00001.wav       1 target, 0 non-target
    CN-Celeb      id00800-enroll test/id00800-singing-01-001.wav 1                    the same, behind
    Kaldi         id10270-5r0dWxy17C8-00001 id10270-x6uYqmx31kE-00001 target|nontarget
    unlabelled    id10270/5r0dWxy17C8/00001.wav id10270/x6uYqmx31kE/00001.wav         scored only

The first line decides which. Columns stand apart by spaces or tabs. Names may hold spaces where tabs separate the columns, or
where every name ends like an audio file (`1 a/my talk/0.wav b/my talk/1.wav`). UTF-8 or, with its byte order mark, UTF-16;
`.gz` too. An enrolment list, `model utterance utterance ...` a line, lets the left side name a model of several utterances.

    trials = read_trials("veri_test.txt"); names = trials.utterances()
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards import lists
from shards.format import ShardError, check_speaker, read_bytes
from spknet.errors import UserError, of_system

KALDI = {"target": 1, "nontarget": 0}
VOXCELEB = {"1": 1, "0": 0}
SAID = {"kaldi": "target or nontarget", "voxceleb": "0 or 1", "cnceleb": "0 or 1"}  # in the order they are tried
FORMATS = "`0|1 utterance utterance`, `utterance utterance 0|1`, `utterance utterance target|nontarget` or `utterance utterance`"
TABS = "where names hold spaces, separate the columns by tabs"
AUDIO = re.compile(r"(\S(?:.*?\S)??\.(?:wav|flac|m4a|mp3|ogg|opus|aac|mp4|wma|webm|mka|mkv|aif|aiff))(?:\s+|$)", re.I)


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
    remarks: list[str] = field(default_factory=list)  # what a reader of its figures should know

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
    """(line number from 1, line without its end) of a text file, plain or .gz. Raises TrialError where it cannot be read."""
    path = Path(path)
    try:
        data = read_bytes(path)
        data = gzip.decompress(data) if path.suffix == ".gz" or data.startswith(b"\x1f\x8b") else data
        text = data.decode(next((encoding for mark, encoding in lists.MARKS if data.startswith(mark)), "utf-8"))
    except UnicodeDecodeError as error:
        raise TrialError(
            f"{path}: cannot read this list: it is not UTF-8 ({error}); convert it with iconv -t UTF-8"
        ) from None
    except ShardError as error:
        raise TrialError(f"{path}: cannot read this list: {str(error).removeprefix(f'{path} ')}") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        known = isinstance(error, OSError) and error.errno is not None
        reason = str(of_system(error)).removeprefix(f"{path}: ") if known else error
        raise TrialError(f"{path}: cannot read this list: {reason}") from None
    if "\0" in text:
        raise TrialError(f"{path}: cannot read this list: it has zero bytes; convert it with iconv -f UTF-16 -t UTF-8")
    yield from enumerate((line.rstrip("\n") for line in io.StringIO(text, newline=None)), 1)


def names_in(text: str) -> list[str]:
    """The names in a part of a line: between tabs, or as paths of audio files with spaces in them, or word by word."""
    if "\t" in text.strip():
        return [name.strip() for name in text.split("\t") if name.strip()]
    words = text.split()
    if len(words) > 2 and words[-1] != text.strip():
        names = AUDIO.findall(text.strip())
        if names and AUDIO.sub("", text.strip()) == "":
            return names
    return words


def separator(names) -> str:
    """What columns of a list with these names are written apart by, so that `names_in` finds them again."""
    return "\t" if any(" " in name for name in names) else " "


def read_trials(path: str | Path, enrolment: dict[str, list[str]] | None = None) -> Trials:
    """Reads one list. Raises TrialError for a bad label, a missing column, an empty list, one without both classes, or a pair
    that is called target and non-target."""
    models: dict[str, int] = {}
    tests: dict[str, int] = {}
    left, right, labels, lines = [], [], [], []
    kind = None
    for number, line in open_text(path):
        if not line.strip():
            continue
        kind = kind or _kind(line, f"{path}, line {number}")
        a, b, label = _parse(line, kind, f"{path}, line {number}")
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
    found = Trials(list_name(path), str(path), list(models), list(tests), left, right, known, lines, enrolment or {})
    found.remarks.extend(_odd_pairs(found))
    return found


def _odd_pairs(trials: Trials) -> list[str]:
    """Remarks on utterances tried against themselves and on pairs that come twice. Raises TrialError where labels contradict."""
    enrolled = {name: ("model", name) if name in trials.enrolment else name for name in trials.models}
    place: dict = {}
    left = np.array([place.setdefault(enrolled[name], len(place)) for name in trials.models])[trials.left]
    right = np.array([place.setdefault(name, len(place)) for name in trials.tests])[trials.right]
    pairs = np.minimum(left, right).astype(np.int64) * len(place) + np.maximum(left, right)
    order = np.argsort(pairs, kind="stable")
    again = np.flatnonzero(pairs[order][1:] == pairs[order][:-1])
    first, second = order[again], order[again + 1]
    if trials.labels is not None and (wrong := np.flatnonzero(trials.labels[first] != trials.labels[second])).size:
        a, b = first[wrong[0]], second[wrong[0]]
        raise TrialError(
            f"{trials.path}, lines {trials.lines[a]} and {trials.lines[b]}: {trials.models[trials.left[b]]}"
            f" {trials.tests[trials.right[b]]} is a target on one and a non-target on the other ({wrong.size} such pairs);"
            " correct the list"
        )
    remarks = []
    if same := int((left == right).sum()):
        line = trials.lines[np.flatnonzero(left == right)[0]]
        remarks.append(f"{same} trials of an utterance with itself, which no system gets wrong (first: line {line})")
    if again.size:
        a = int(np.argmin(trials.lines[second]))
        lines = f"lines {trials.lines[first[a]]} and {trials.lines[second[a]]}"
        remarks.append(f"{again.size} trials of a pair that an earlier line has tried, all counted (first: {lines})")
    return remarks


def list_name(path: str | Path) -> str:
    """What a list is called in reports: its file name without .gz and .txt."""
    return Path(path).name.removesuffix(".gz").removesuffix(".txt")


def _kind(line: str, where: str) -> str:
    """The format of a list from its first line."""
    words, columns = line.split(), len(line.split())
    for kind in SAID if columns >= 3 else ():
        rest, label = _without_label(line, kind)
        if label in _labels(kind) and len(names_in(rest)) == 2:
            return kind
    if words[0] not in VOXCELEB and words[-1] not in KALDI and len(names_in(line)) == 2:
        return "unlabelled"
    if columns == 3:
        raise TrialError(f"{where}: bad label: neither {words[0]!r} nor {words[2]!r} is one; expected {FORMATS}")
    problem = "a column is missing" if columns < 3 else "too many columns"
    raise TrialError(f"{where}: {problem} ({columns} found); expected {FORMATS}; {TABS}")


def _labels(kind: str) -> dict[str, int]:
    return KALDI if kind == "kaldi" else VOXCELEB


def _without_label(line: str, kind: str) -> tuple[str, str]:
    """(the two names, the label) of a line with at least two words."""
    first, second = line.split(None, 1) if kind == "voxceleb" else line.rsplit(None, 1)
    return (second, first) if kind == "voxceleb" else (first, second)


def _parse(line: str, kind: str, where: str) -> tuple[str, str, int]:
    """(left, right, label; -1 without) of a line, in the format of the first one."""
    words = line.split()
    expected = 2 if kind == "unlabelled" else 3
    rest, label = (line, None) if kind == "unlabelled" or len(words) < 3 else _without_label(line, kind)
    names = words if len(words) < expected else names_in(rest)
    if len(names) != 2 or len(words) < expected:
        found = len(words) if len(words) < expected or "\t" not in rest else len(names) + expected - 2
        problem = "a column is missing" if found < expected else "too many columns"
        raise TrialError(f"{where}: {problem}: {found} found, {expected} on the lines before; {TABS}")
    if label is None:
        return names[0], names[1], -1
    if label not in _labels(kind):
        raise TrialError(f"{where}: bad label {label!r}; expected {SAID[kind]}, as on the lines before")
    return names[0], names[1], _labels(kind)[label]


def read_enrolment(path: str | Path) -> dict[str, list[str]]:
    """Models and their utterances: lines `model utterance ...`; a model may go on over several lines."""
    models: dict[str, list[str]] = {}
    for number, line in open_text(path):
        words = line.split(None, 1)
        if len(words) == 1:
            raise TrialError(f"{path}, line {number}: a column is missing: model {words[0]!r} has no utterance")
        if words:
            models.setdefault(words[0], []).extend(names_in(words[1]))
    if not models:
        raise TrialError(f"{path}, line 1: the list is empty; expected `model utterance ...`")
    return models


def read_speakers(path: str | Path) -> dict[str, str]:
    """Speakers of utterances or models whose names do not tell: lines `utterance speaker`."""
    speakers = {}
    for number, line in open_text(path):
        words = line.rsplit(None, 1)
        if len(words) == 1:
            raise TrialError(f"{path}, line {number}: 1 columns; expected `utterance speaker`")
        if words and speakers.setdefault(words[0].strip(), words[1]) != words[1]:
            first = speakers[words[0].strip()]
            raise TrialError(
                f"{path}, line {number}: {words[0].strip()} is of {words[1]}, on an earlier line of {first}"
            )
    return speakers


def read_utterances(path: str | Path) -> dict[str, list[str]]:
    """{speaker: utterances} of a training list, its lines read as packing reads them; an utterance may stand there once."""
    of_speaker: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for number, line in open_text(path):
        if not line.strip():
            continue
        try:
            speaker, name = lists.speaker_and_path(line)
            check_speaker(speaker)
        except ShardError as error:
            raise TrialError(f"{path}, line {number}: {error}") from None
        if lines.setdefault(name, number) != number:
            raise TrialError(f"{path}, lines {lines[name]} and {number}: {name} stands there twice; take one out")
        of_speaker.setdefault(speaker, []).append(name)
    if not of_speaker:
        raise TrialError(f"{path}, line 1: the list is empty; expected `speaker path`")
    return of_speaker


def speaker_of(utterance: str, known: dict[str, str] | None = None) -> str:
    """An utterance's speaker: as given, else what stands before the first `/`, else before the first `-`."""
    if known and utterance in known:
        return known[utterance]
    return utterance.split("/" if "/" in utterance else "-", 1)[0]


def _of_file_name(utterance: str, known: dict[str, str] | None = None) -> str:
    """CN-Celeb's names, `test/id00800-singing-01-001.wav`: the speaker stands before the file name's first `-`."""
    if known and utterance in known:
        return known[utterance]
    return utterance.rpartition("/")[2].split("-", 1)[0]


@dataclass(frozen=True)
class Speakers:
    """Who speaks on the sides of a list's trials."""

    left: np.ndarray  # (n,) numbers into names
    right: np.ndarray
    names: list[str]
    contradicting: int  # trials whose label says something else than these speakers


def speakers(trials: Trials, known: dict[str, str] | None = None) -> Speakers:
    """Speakers of a list. known: utterance or model -> speaker. Of the two ways to read names, that which the labels bear out."""
    first = _speakers(trials, known, speaker_of)
    other = _speakers(trials, known, _of_file_name) if first.contradicting else first
    return first if other.contradicting else other


def _speakers(trials: Trials, known: dict[str, str] | None, rule) -> Speakers:
    known = known or {}
    of_models = [known.get(model) or rule(trials.utterances_of(model)[0], known) for model in trials.models]
    of_tests = [rule(test, known) for test in trials.tests]
    names = sorted(set(of_models) | set(of_tests))
    place = {name: i for i, name in enumerate(names)}
    left = np.array([place[name] for name in of_models])[trials.left]
    right = np.array([place[name] for name in of_tests])[trials.right]
    wrong = 0 if trials.labels is None else int(((left == right) != (trials.labels == 1)).sum())
    return Speakers(left, right, names, wrong)
