"""Training lists for any corpus: from its folders, from Kaldi's tables, from a CSV. Out come lines `speaker path` for shards.pack.

Every line is checked: the file is there and below --root, and speaker and path make a valid key. A pattern is matched against the
paths below --root: `{speaker}`, `{session}` or any `{name}` stand for text without a slash, `*` as well, `**` for anything.

    python -m tools.lists --root DIR --pattern '{speaker}/{session}/*.wav' --out train_list.txt
    python -m tools.lists --root DIR --wav-scp wav.scp --utt2spk utt2spk --out train_list.txt
    python -m tools.lists --root DIR --csv clips.csv --speaker-column client_id --path-column path --out train_list.txt
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards import lists
from shards.errors import UserError
from shards.format import ShardError, atomic_write


class ListError(UserError):
    """What was found, what was expected, what to do."""


def pattern_to_regex(pattern: str) -> re.Pattern:
    """`{speaker}/*.wav` -> a regular expression with the group `speaker`. Raises ListError without exactly one {speaker}."""
    if pattern.count("{speaker}") != 1:
        raise ListError(f"pattern {pattern!r}: expected {{speaker}} once in it, as in '{{speaker}}/{{session}}/*.wav'")
    made = []
    for word in re.split(r"(\*\*/|\*\*|\*|\{\w+\})", pattern.removeprefix("./")):
        if word == "{speaker}":
            made.append(r"(?P<speaker>[^/]+)")
        elif word in ("*",) or re.fullmatch(r"\{\w+\}", word):
            made.append(r"[^/]+")
        elif word.startswith("**"):
            made.append(r"(?:.*/)?" if word.endswith("/") else ".*")
        else:
            made.append(re.escape(word))
    return re.compile("".join(made))


def from_folder(root: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """(speaker, path below root) of every file that the pattern fits. Raises ListError where none does, naming one that does not."""
    regex, found, other = pattern_to_regex(pattern), False, None
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = os.path.relpath(os.path.join(folder, name), root)
            fit = regex.fullmatch(path)
            if fit:
                found = True
                yield fit["speaker"], path
            else:
                other = other or path
    if not found:
        raise ListError(
            f"{root}: no file fits {pattern!r}" + (f", for instance {other} does not" if other else "; it is empty")
        )


def from_kaldi(wav_scp: Path, utt2spk: Path, root: Path) -> Iterator[tuple[str, str]]:
    """(speaker, path) of the utterances of wav.scp. Commands in it (`sox ... |`) are never run: ListError."""
    speakers = dict(words for _, words in _table(utt2spk))
    for number, (utterance, source) in _table(wav_scp):
        if source.endswith("|"):
            raise ListError(f"{wav_scp}, line {number}: a command, expected a file: write its output to a file first")
        if utterance not in speakers:
            raise ListError(f"{wav_scp}, line {number}: utterance {utterance} is not in {utt2spk}")
        yield speakers[utterance], _below(root, source, f"{wav_scp}, line {number}")


def _table(path: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            words = line.split(maxsplit=1)
            if len(words) == 1:
                raise ListError(f"{path}, line {number}: found {line.strip()!r}, expected two columns")
            if words:
                yield number, (words[0], words[1].strip())


def from_csv(path: Path, speaker_column: str, path_column: str, root: Path) -> Iterator[tuple[str, str]]:
    """(speaker, path) of a CSV (or, by its ending, TSV) file with a line of column names."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        missing = {speaker_column, path_column} - set(reader.fieldnames or [])
        if missing:
            raise ListError(
                f"{path}: no column {', '.join(sorted(missing))}; its columns are {', '.join(reader.fieldnames or [])}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not row[speaker_column] or not row[path_column]:
                raise ListError(f"{where}: speaker or path is empty")
            yield row[speaker_column], _below(root, row[path_column], where)


def _below(root: Path, source: str, where: str) -> str:
    path = os.path.relpath(os.path.join(root.absolute(), source), root.absolute())
    if path.startswith(".."):
        raise ListError(f"{where}: {source} is not below --root {root}: choose a --root that holds all files")
    return path


def checked(pairs: Iterable[tuple[str, str]], root: Path) -> list[tuple[str, str]]:
    """The pairs, each file there, each name fit for a key, none twice. Raises ListError, ShardError."""
    kept, seen = [], set()
    for speaker, path in pairs:
        if len(speaker.split()) != 1:
            raise ListError(
                f"{path}: speaker {speaker!r} has spaces, which a list of `speaker path` cannot hold; rename it"
            )
        _, key, source = lists.parse_line(f"{speaker} {path}", os.fspath(root))
        if not os.path.isfile(source):
            raise ListError(f"{source}: no such file (speaker {speaker}); correct the table or --root")
        if key in seen:
            raise ListError(f"{path}: another file of the list has the same key, {key!r}; choose a narrower pattern")
        seen.add(key)
        kept.append((speaker, path))
    if not kept:
        raise ListError("no utterances: the table is empty")
    return kept


def summary(pairs: list[tuple[str, str]]) -> str:
    counts = Counter(speaker for speaker, _ in pairs)
    few = sum(count < 2 for count in counts.values())
    line = f"{len(counts):,} speakers, {len(pairs):,} utterances: {min(counts.values())} to {max(counts.values())} a speaker"
    line += f", median {statistics.median(counts.values()):g}"
    return line + (f"; {few:,} speakers with a single one, too few for M = 2" if few else "")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m tools.lists", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--root", type=Path, required=True, help="folder of the corpus; paths in the list start from it")
    p.add_argument("--out", type=Path, required=True, help="the list to write")
    p.add_argument("--pattern", help="of paths below the root, with {speaker} in it")
    p.add_argument("--wav-scp", type=Path, help="Kaldi: `utterance path`")
    p.add_argument("--utt2spk", type=Path, help="Kaldi: `utterance speaker`")
    p.add_argument("--csv", type=Path, help="table with a line of column names; .tsv: tabs between columns")
    p.add_argument("--speaker-column", default="speaker")
    p.add_argument("--path-column", default="path")
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    given = [options.pattern, options.wav_scp, options.csv]
    if sum(value is not None for value in given) != 1 or (options.wav_scp is None) != (options.utt2spk is None):
        parser().error("give one of --pattern, --csv, or --wav-scp with --utt2spk")
    try:
        if options.pattern is not None:
            pairs = from_folder(options.root, options.pattern)
        elif options.wav_scp is not None:
            pairs = from_kaldi(options.wav_scp, options.utt2spk, options.root)
        else:
            pairs = from_csv(options.csv, options.speaker_column, options.path_column, options.root)
        kept = checked(pairs, options.root)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(options.out) as file:
            file.write("".join(f"{speaker} {path}\n" for speaker, path in kept).encode())
    except (ListError, ShardError, OSError, UnicodeDecodeError) as error:
        print(f"lists: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {summary(kept)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
