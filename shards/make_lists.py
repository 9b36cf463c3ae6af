"""Training lists for any corpus: from its folders, from Kaldi's tables, from a CSV. Out come lines `speaker path` for shards.pack.

Every line is checked: the file is there and below --root, and speaker and path make a valid key. A pattern is matched against the
paths below --root: `{speaker}`, `{session}` or any `{name}` stand for text without a slash, `*` as well, `**` for anything,
`{wav,mp3,m4a}` for one of these words. Links are followed. Speakers with names that no key can hold (over 64 bytes, with
spaces) get shorter ones; LIST.speakers.tsv says which. LIST.ids.tsv keeps Kaldi's utterance ids, and --trials makes trials by path.

    spknet lists --root DIR --pattern '{speaker}/{session}/*.{wav,m4a}' --out train_list.txt
    spknet lists --root DIR --wav-scp wav.scp --utt2spk utt2spk --trials trials --trials-out test_list.txt --out train_list.txt
    spknet lists --root DIR --csv clips.tsv --speaker-column client_id --path-column path --out train_list.txt
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards import errors, lists
from shards.commands import Parser, command
from shards.format import ShardError, refuse_overwriting, write_file

AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".mp4", ".aac", ".webm", ".mka")
AUDIO += (".wma", ".amr", ".3gp", ".aif", ".aiff", ".au", ".sph", ".caf", ".w64")
LONGEST_SPEAKER = 64  # bytes; a key has 95
TARGETS = {"target": "1", "1": "1", "nontarget": "0", "0": "0"}


class ListError(ShardError):
    """What was found, what was expected, what to do."""


@dataclass
class LeftOut:
    """Files that a pattern fits and that are no utterances, counted, with one of each as an example."""

    counts: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, path: str) -> None:
        self.counts[kind] += 1
        self.examples.setdefault(kind, path)

    def lines(self) -> list[str]:
        return [f"left out: {count} {kind}, as {self.examples[kind]}" for kind, count in self.counts.items()]


def pattern_to_regex(pattern: str) -> re.Pattern:
    """`{speaker}/*.wav` -> a regular expression with the group `speaker`. Raises ListError without exactly one {speaker}."""
    if pattern.count("{speaker}") != 1:
        raise ListError(f"pattern {pattern!r}: expected {{speaker}} once in it, as in '{{speaker}}/{{session}}/*.wav'")
    made = []
    for word in re.split(r"(\*\*/|\*\*|\*|\{\w+\}|\{[^{}/]+,[^{}/]*\})", pattern.removeprefix("./")):
        if word == "{speaker}":
            made.append(r"(?P<speaker>[^/]+)")
        elif word == "*" or re.fullmatch(r"\{\w+\}", word):
            made.append(r"[^/]+")
        elif word.startswith("**"):
            made.append(r"(?:.*/)?" if word.endswith("/") else ".*")
        elif word.startswith("{"):
            made.append(f"(?:{'|'.join(map(re.escape, word[1:-1].split(',')))})")
        else:
            made.append(re.escape(word))
    return re.compile("".join(made))


def from_folder(root: Path, pattern: str, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """(speaker, path below root) of every audio file that the pattern fits. Raises ListError where none does, naming one."""
    regex, found, other = pattern_to_regex(pattern), False, None
    any_ending = pattern.endswith(("*", "}")) and not re.search(r"\.\{[^{}/]+\}$", pattern)
    for path in _files(root, left_out):
        fit = regex.fullmatch(path)
        name = path.rpartition("/")[2]
        if name.startswith(lists.MAC):
            left_out.add("files that a Mac keeps beside others", path)
        elif fit and any_ending and not name.lower().endswith(AUDIO):
            left_out.add("files without an audio file's ending", path)
        elif fit:
            found = True
            yield fit["speaker"], path
        else:
            other = other or path
    if not found:
        raise ListError(
            f"{root}: no file fits {pattern!r}" + (f", for instance {other} does not" if other else "; it is empty")
        )


def _files(root: Path, left_out: LeftOut) -> Iterator[str]:
    """Paths below root, sorted in their folders; links are followed, except into a folder that they lie in."""

    def refuse(error: OSError):
        raise ListError(f"{error.filename} cannot be read ({error.strerror}); change its rights")

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        folders.sort()
        here = os.path.realpath(folder)
        for name in list(folders):
            path = os.path.join(folder, name)
            if os.path.islink(path) and (here + os.sep).startswith(os.path.realpath(path) + os.sep):
                folders.remove(name)
                left_out.add("links to a folder around them", os.path.relpath(path, root))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if os.path.exists(path):
                yield os.path.relpath(path, root)
            else:
                left_out.add("links to nothing", os.path.relpath(path, root))


def from_kaldi(wav_scp: Path, utt2spk: Path, root: Path) -> Iterator[tuple[str, str, str]]:
    """(speaker, path, utterance) of wav.scp. Commands in it (`sox ... |`) are never run: ListError."""
    speakers = dict(words for _, words in _table(utt2spk))
    seen: dict[str, int] = {}
    for number, (utterance, source) in _table(wav_scp):
        where = f"{wav_scp}, line {number}"
        if source.endswith("|"):
            raise ListError(f"{where}: a command, expected a file: write its output to a file first")
        if utterance not in speakers:
            raise ListError(f"{where}: utterance {utterance} is not in {utt2spk}")
        if utterance in seen:
            raise ListError(f"{where}: utterance {utterance} stands in line {seen[utterance]} already; take one out")
        seen[utterance] = number
        yield speakers[utterance], _below(root, source, where), utterance


def _table(path: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    for number, line in lists.read_lines(path):
        words = line.split(maxsplit=1)
        if len(words) == 1:
            raise ListError(f"{path}, line {number}: found {line.strip()!r}, expected two columns")
        yield number, (words[0], words[1].strip())


def kaldi_trials(trials: Path, paths: dict[str, str]) -> list[str]:
    """Lines `label path path` of Kaldi's `utterance utterance target|nontarget`. Raises ListError naming the wrong line."""
    made = []
    for number, line in lists.read_lines(trials):
        words = line.split()
        if len(words) != 3 or words[2] not in TARGETS:
            raise ListError(
                f"{trials}, line {number}: found {line!r}, expected `utterance utterance target` or `nontarget`"
            )
        unknown = [word for word in words[:2] if word not in paths]
        if unknown:
            raise ListError(f"{trials}, line {number}: utterance {unknown[0]} is not in --wav-scp")
        made.append(f"{TARGETS[words[2]]} {paths[words[0]]} {paths[words[1]]}")
    return made


def from_csv(path: Path, speaker_column: str, path_column: str, root: Path) -> Iterator[tuple[str, str]]:
    """(speaker, path) of a CSV (or, by its ending, TSV) file with a line of column names."""
    tabs = path.suffix.lower() == ".tsv"
    # In a TSV a quote is a letter: Common Voice's sentences have them unpaired.
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ","}
    with lists.open_text(path, newline="") as file:
        try:
            reader = csv.DictReader(file, **style)
            missing = {speaker_column, path_column} - set(reader.fieldnames or [])
            if missing:
                columns = ", ".join(reader.fieldnames or [])
                raise ListError(f"{path}: no column {', '.join(sorted(missing))}; its columns are {columns}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if not row[speaker_column] or not row[path_column]:
                    raise ListError(f"{where}: speaker or path is empty")
                yield row[speaker_column], _below(root, row[path_column], where)
        except csv.Error as error:
            raise ListError(f"{path}, line {reader.line_num}: {error}; is it a CSV file?") from None


def _below(root: Path, source: str, where: str) -> str:
    path = os.path.relpath(os.path.join(root.absolute(), source), root.absolute())
    if path.split(os.sep)[0] == "..":
        raise ListError(f"{where}: {source} is not below --root {root}: choose a --root that holds all files")
    return path


def short_name(speaker: str) -> str:
    """A name that a key can hold: without spaces, at most 64 bytes, its beginning and a digest of the whole."""
    plain = "_".join(speaker.split())
    if plain == speaker and len(speaker.encode("utf-8", "surrogateescape")) <= LONGEST_SPEAKER:
        return speaker
    data = speaker.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(data, digest_size=8).hexdigest()
    return plain.encode("utf-8", "ignore")[:32].decode("utf-8", "ignore") + "-" + digest


def checked(pairs: Iterable[tuple], root: Path) -> list[tuple[str, str]]:
    """(speaker, path) of the pairs, each file there, each name fit for a key, none twice. Raises ListError, ShardError."""
    kept, seen = [], {}
    for speaker, path, *_ in pairs:
        speaker = short_name(speaker)
        _, key, source = lists.parse_line(f"{speaker} {path}", os.fspath(root))
        if not os.path.isfile(source):
            raise ListError(f"{source}: no such file (speaker {speaker}); correct the table or --root")
        if key in seen:
            raise ListError(
                f"{path}: another file of the list has the same key, {key!r}: {seen[key]}; rename one, or choose a narrower pattern"
            )
        seen[key] = path
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


def parser() -> Parser:
    p = Parser(command("lists"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", type=Path, required=True, help="folder of the corpus; paths in the list start from it")
    p.add_argument("--out", type=Path, required=True, help="the list to write")
    p.add_argument("--pattern", help="of paths below the root, with {speaker} in it")
    p.add_argument("--wav-scp", type=Path, help="Kaldi: `utterance path`")
    p.add_argument("--utt2spk", type=Path, help="Kaldi: `utterance speaker`")
    p.add_argument("--trials", type=Path, help="Kaldi: `utterance utterance target|nontarget`, made to paths")
    p.add_argument("--trials-out", type=Path, help="where the trials by path go")
    p.add_argument("--csv", type=Path, help="table with a line of column names; .tsv: tabs between columns")
    p.add_argument("--speaker-column", default="speaker", help="column of the CSV (speaker)")
    p.add_argument("--path-column", default="path", help="column of the CSV (path)")
    return p


@errors.told
def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    given = [options.pattern, options.wav_scp, options.csv]
    if sum(value is not None for value in given) != 1 or (options.wav_scp is None) != (options.utt2spk is None):
        parser().error("give one of --pattern, --csv, or --wav-scp with --utt2spk")
    if (options.trials is None) != (options.trials_out is None) or (options.trials and not options.wav_scp):
        parser().error("--trials goes with --trials-out and --wav-scp")
    if not options.root.is_dir():
        raise ListError(f"--root {options.root} is no folder; expected the folder of the corpus")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    inputs = {f"--{name}": vars(options)[name.replace("-", "_")] for name in ("wav-scp", "utt2spk", "csv", "trials")}
    for path in filter(None, (options.out, options.trials_out)):
        refuse_overwriting(path, inputs)
    left_out = LeftOut()
    pairs = list(_pairs(options, left_out))
    kept = checked(pairs, options.root)
    _write(options.out, [f"{speaker} {path}" for speaker, path in kept])
    print(f"{options.out}: {summary(kept)}")
    print("".join(f"{line}\n" for line in left_out.lines()), end="")
    _write_maps(options, pairs)


def _pairs(options: argparse.Namespace, left_out: LeftOut) -> Iterator[tuple]:
    if options.pattern is not None:
        return from_folder(options.root, options.pattern, left_out)
    if options.wav_scp is not None:
        return from_kaldi(options.wav_scp, options.utt2spk, options.root)
    return from_csv(options.csv, options.speaker_column, options.path_column, options.root)


def _write_maps(options: argparse.Namespace, pairs: list[tuple]) -> None:
    """The shortened speakers, Kaldi's ids, and the trials by path."""
    names = {short_name(speaker): speaker for speaker, *_ in pairs if short_name(speaker) != speaker}
    if names:
        target = options.out.with_name(options.out.name + ".speakers.tsv")
        _write(target, [f"{short}\t{name}" for short, name in names.items()])
        print(f"{target}: {len(names)} speakers have shorter names in the list")
    if options.wav_scp is None:
        return
    target = options.out.with_name(options.out.name + ".ids.tsv")
    paths = {utterance: path for _, path, utterance in pairs}
    _write(target, [f"{utterance}\t{path}" for utterance, path in paths.items()])
    print(f"{target}: the path of each of {len(paths)} utterance ids")
    if options.trials is not None:
        lines = kaldi_trials(options.trials, paths)
        _write(options.trials_out, lines)
        print(f"{options.trials_out}: {len(lines)} trials by path")


def _write(path: Path, lines: list[str]) -> None:
    write_file(path, "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
