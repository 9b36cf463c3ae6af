"""Trials from a data set: targets across sessions, impostors at random, of the same gender or hard.

Speakers that a network was trained on make its errors look smaller than they are, so the command wants to know which
speakers may be used: those a run kept out (--run), those of a file (--speakers), all but those of a file or list
(--exclude), or, said aloud, --all_speakers. A session is what stands between speaker and file name (a video, a recording).

    spknet trials --list all.txt --run runs/a --targets 100 --nontargets 100 --impostors same-gender \\
        --metadata speakers.csv --out dev_list.txt
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from shards.format import write_file
from shards.reader import open_shards
from spknet import rng
from spknet.checkpoints.network import load_network
from spknet.errors import run
from spknet.evaluate import embeddings as kept
from spknet.evaluate import scoring
from spknet.evaluate.commands import Parser, at_least, check_file
from spknet.evaluate.groups import read_metadata
from spknet.evaluate.lists import trained_speakers
from spknet.evaluate.trials import TrialError, open_text, read_utterances, separator

HARDEST = 10  # nearest speakers that hard impostors are drawn from
ROWS = 64  # speakers that are compared with all at a time
TRIES = 50  # draws for one non-target before a speaker is given up: all its pairs are taken


def session_of(utterance: str) -> str:
    """What stands between speaker and file name."""
    return utterance.rpartition("/")[0]


def target_pairs(
    utterances: list[str], limit: int, draw: np.random.Generator, same_session: bool = False
) -> list[tuple]:
    """At most `limit` pairs of one speaker's utterances, from two different sessions unless same_session."""
    sessions = np.unique([session_of(u) for u in utterances], return_inverse=True)[1]
    a, b = np.triu_indices(len(utterances), 1)
    usable = np.flatnonzero((sessions[a] != sessions[b]) | same_session)
    chosen = draw.choice(usable, min(limit, len(usable)), replace=False) if len(usable) else []
    return [(utterances[a[i]], utterances[b[i]]) for i in sorted(chosen)]


def nontarget_pairs(
    speaker: str, others: Sequence[str], of: dict[str, list[str]], limit: int, draw, taken: set
) -> list[tuple]:
    """At most `limit` pairs of a speaker's utterances with those of `others`, none in `taken` either way round."""
    pairs = []
    while others and len(pairs) < limit:
        for _ in range(TRIES):
            own = of[speaker][draw.integers(len(of[speaker]))]
            theirs = of[others[draw.integers(len(others))]]
            pair = (own, theirs[draw.integers(len(theirs))])
            if pair not in taken and pair[::-1] not in taken:
                break
        else:
            break
        taken.add(pair)
        pairs.append(pair)
    return pairs


class AllBut(Sequence):
    """A list without the speaker at one place: a list of its own for each of a million speakers would fill any memory."""

    def __init__(self, speakers: list[str], place: int):
        self.speakers, self.place = speakers, place

    def __len__(self) -> int:
        return len(self.speakers) - 1

    def __getitem__(self, i: int) -> str:
        return self.speakers[i + (i >= self.place)]


def same_value(speakers: list[str], values: dict[str, str]) -> dict[str, Sequence[str]]:
    """For each speaker the others with the same value (gender); none for a speaker without one."""
    groups = defaultdict(list)
    for speaker in speakers:
        groups[values.get(speaker)].append(speaker)
    others: dict[str, Sequence[str]] = dict.fromkeys(speakers, ())
    for value, group in groups.items():
        others |= {speaker: AllBut(group, i) for i, speaker in enumerate(group) if value}
    return others


def nearest(of: dict[str, list[str]], embedded) -> dict[str, list[str]]:
    """For each speaker the HARDEST others whose mean embeddings are nearest. Raises TrialError for an utterance without one."""
    absent = next((u for own in of.values() for u in own if u not in embedded.rows), None)
    if absent:
        raise TrialError(f"hard impostors need an embedding of every utterance; there is none of {absent}")
    rows, speakers = scoring.vectors(embedded.embeddings), list(of)
    means = scoring.unit(np.stack([rows[[embedded.rows[u] for u in of[s]]].mean(axis=0) for s in speakers]))
    return {speaker: [speakers[j] for j in best] for speaker, best in zip(speakers, _most_alike(means))}


def _most_alike(means: np.ndarray) -> Iterator[np.ndarray]:
    """For each row the HARDEST others with the highest cosines, the lowest number first among equals. means (S, D)."""
    count = min(HARDEST, len(means) - 1)
    for start in range(0, len(means), ROWS):
        likeness = means[start : start + ROWS] @ means.T
        for i, cosines in enumerate(likeness, start):
            cosines[i] = -np.inf
            near = np.flatnonzero(cosines >= np.partition(cosines, -count)[-count])
            yield near[np.argsort(-cosines[near], kind="stable")[:count]]


def make(
    of: dict[str, list[str]], others: dict[str, Sequence[str]], how: argparse.Namespace
) -> tuple[list[str], list[str]]:
    """Lines `label a b` in a shuffled order, and what to tell the user. of: utterances of each speaker; others: its impostors;
    how: targets, nontargets, seed, same_session."""
    trials, lonely, taken = [], 0, set()
    # SPEAKER/FILE: no session is named.
    flat = all(session_of(u) == speaker for speaker, own in of.items() for u in own)
    for number, speaker in enumerate(sorted(of)):
        draw = rng.stream(how.seed, 0, "trials", number)
        own = target_pairs(sorted(of[speaker]), how.targets, draw, how.same_session or flat)
        lonely += not own
        trials += [("1", *pair) for pair in own]
        trials += [("0", *pair) for pair in nontarget_pairs(speaker, others[speaker], of, how.nontargets, draw, taken)]
    count = sum(trial[0] == "1" for trial in trials)
    if count in (0, len(trials)):
        raise TrialError(
            f"{count} targets and {len(trials) - count} non-targets from {len(of)} speakers: both are needed;"
            " more speakers, utterances from several sessions, or --same_session"
        )
    order = rng.stream(how.seed, 0, "trial order").permutation(len(trials))
    said = [f"{count} targets, {len(trials) - count} non-targets, {len(of)} speakers"]
    if lonely:
        said.append(f"{lonely} speakers have no pair from two sessions and only serve as impostors")
    if flat and not how.same_session:
        said.append("names tell no sessions (SPEAKER/FILE), so targets may be from one recording")
    apart = separator(u for own in of.values() for u in own)
    return [apart.join(trials[i]) for i in order], said


def _utterances(chosen: argparse.Namespace) -> dict[str, list[str]]:
    if not chosen.shards:
        return read_utterances(chosen.list)
    data = open_shards(chosen.shards)
    bounds = data.speaker_rows.tolist()
    return {
        speaker: [data.key(row) for row in range(first, last)]
        for speaker, first, last in zip(data.speakers, bounds, bounds[1:])
    }


def _allowed(chosen: argparse.Namespace, speakers: list[str]) -> list[str]:
    """The speakers that trials may be made of."""
    if chosen.all_speakers:
        return speakers
    if chosen.run:
        _, config, meta = load_network(chosen.run)
        trained = trained_speakers(config, meta)
        if trained is None:
            raise TrialError(
                f"{chosen.run} does not say which speakers it was trained on; give --exclude TRAINING_LIST"
            )
        left = without(speakers, trained)
        if len(left) < 2:
            raise TrialError(
                f"{chosen.run} was trained on all but {len(left)} of these {len(speakers)} speakers, and trials need two; train with"
                " --data.dev_speakers N, which keeps N out, or give other data"
            )
        return left
    if chosen.speakers or chosen.exclude:
        named = {line.split()[0] for _, line in open_text(chosen.speakers or chosen.exclude) if line.strip()}
        return [s for s in speakers if (s in named) == bool(chosen.speakers)]
    raise TrialError(
        "which speakers may be used? Never those a network was trained on: give --run RUN (all but its training speakers),"
        " --speakers FILE, --exclude FILE, or --all_speakers"
    )


def without(speakers: list[str], trained: list[str]) -> list[str]:
    """Speakers that a network was not trained on.

    Several data sets together call their speakers SET/SPEAKER, one alone SPEAKER. Where the two sides do it differently, a
    speaker is left out if the name without SET is that of any training speaker.
    """
    if any("/" in s for s in speakers) == any("/" in s for s in trained):
        known = set(trained)
        return [s for s in speakers if s not in known]
    last = {s.rpartition("/")[2] for s in trained}
    return [s for s in speakers if s.rpartition("/")[2] not in last]


def _impostors(chosen: argparse.Namespace, of: dict[str, list[str]]) -> dict[str, Sequence[str]]:
    speakers = sorted(of)
    if chosen.impostors == "same-gender":
        if not chosen.metadata:
            raise TrialError("--impostors same-gender needs --metadata CSV with the speakers in its first column")
        columns, rows = read_metadata(chosen.metadata)
        if chosen.gender_column not in columns:
            raise TrialError(f"{chosen.metadata}: no column {chosen.gender_column!r}; there are {', '.join(columns)}")
        return same_value(speakers, {s: rows[s][chosen.gender_column] for s in speakers if s in rows})
    if chosen.impostors == "hard":
        if not chosen.embeddings:
            raise TrialError("--impostors hard needs --embeddings FOLDER, written by `spknet embed`")
        return nearest({s: of[s] for s in speakers}, kept.load(chosen.embeddings)[0])
    return same_value(speakers, dict.fromkeys(speakers, "any"))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser("spknet trials", __doc__)
    add, where = parser.add, parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--list", help="lines `speaker path`")
    where.add_argument("--shards", nargs="+", help="packed data sets")
    add("--out", required=True, help="list to write, `1|0 utterance utterance` a line")
    add("--run", help="a run: its training speakers are not used, those it kept out (data.dev_speakers) are")
    add("--speakers", help="file of the speakers to use, one a line")
    add("--exclude", help="file or training list whose first column names speakers not to use")
    add("--all_speakers", action="store_true", help="no network was or will be trained on them")
    add("--targets", type=at_least(1), default=50, help="most target trials of a speaker")
    add("--nontargets", type=at_least(1), default=50, help="most non-target trials that a speaker begins")
    add("--same_session", action="store_true", help="targets from one session, too (tests the recording)")
    add("--impostors", choices=("random", "same-gender", "hard"), default="random", help="who non-targets are")
    add("--metadata", help="CSV with a gender column")
    add("--gender_column", default="gender", help="its name")
    add("--embeddings", help="folder of embeddings, for hard impostors")
    add("--seed", type=at_least(0), default=0, help="of the drawing")
    chosen = parser.parse_args(argv)
    of = _utterances(chosen)
    of = {speaker: of[speaker] for speaker in _allowed(chosen, sorted(of))}
    check_file(chosen.out)
    lines, said = make(of, _impostors(chosen, of), chosen)
    write_file(chosen.out, "".join(line + "\n" for line in lines))
    print(f"{chosen.out}: " + "; ".join(said))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
