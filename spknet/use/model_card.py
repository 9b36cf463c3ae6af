"""A card as a page for people: Markdown.

print(markdown(card))
"""

from __future__ import annotations

import yaml

from spknet.checkpoints.card import Card, ListFigures

PAGE = """# {name}

{headline}

| | |
|---|---|
| network | {name}, {parameters:,} parameters |
| embedding | {dimensions} dimensions, compared by cosine |
| audio | {rate:,} Hz; others are converted |
| trained on | {data} |
| checkpoint | {checkpoint}, step {step} |
| weights (SHA-256) | `{weights}` |
| code | spknet {version}, revision {revision} |
| made | {date} |
| licence | {license} |

## How good it is

95 % intervals by bootstrap over speakers. Thresholds and calibration are learned on the development list alone; other
lists choose nothing.

{figures}

## Thresholds

A pair is one speaker's from a cosine of **{threshold:.4f}** on, where {prior:.3g} of all pairs are. The log-likelihood
ratio (natural) of a cosine s is {weight:.4f} s {bias:+.4f}.

{thresholds}

## How it was trained

Options that differ from the defaults of spknet:

```yaml
{options}```

## Limits

- Figures hold for recordings like those of the lists: language, channel, noise, length and age of the speakers.
- {few}
- The probability assumes the share of pairs above. With another share, another threshold is right:
  `spknet card --prior P`.
- Recordings below 1 s, silent, clipped or band-limited ones are embedded, and `spknet verify` says so.
- A score is no proof of who somebody is: voices can be alike, imitated and synthesised. Nothing here detects that.
"""


def headline(card: Card) -> str:
    """The development list's figures in one line."""
    dev = card.lists[0]
    return (
        f"EER {_with_interval(dev, 'eer', '.2f')} % on {dev.name}, {dev.trials:,} trials of {dev.speakers} development speakers;"
        f" same speaker from a cosine of {card.threshold:.4f} on"
    )


def markdown(card: Card) -> str:
    """The page. card.lists: development list first."""
    network, made, dev = card.network, card.provenance, card.lists[0]
    speakers = made["training_speakers"]
    data = ", ".join(made["training_data"]) or "not known"
    few = f"The threshold rests on {dev.speakers} speakers ({dev.targets:,} target and {dev.nontargets:,} non-target trials)."
    return PAGE.format(
        name=network["name"],
        headline=headline(card) + ".",
        parameters=network["parameters"],
        dimensions=network["embedding_size"],
        rate=network["sample_rate"],
        data=data if speakers is None else f"{data}, {speakers:,} speakers",
        checkpoint=made["checkpoint"],
        step=made["step"],
        weights=card.weights_sha256,
        version=made["version"],
        revision=made["revision"] or "unknown",
        date=made["date"],
        license=card.license or 'not stated; whoever hands it on sets it with `spknet card --license "..."`',
        figures=_table(HEAD, [_row(one) for one in card.lists]),
        threshold=card.threshold,
        prior=card.target_prior,
        weight=card.calibration.weight,
        bias=card.calibration.bias,
        thresholds=_thresholds(card),
        options=yaml.safe_dump(made["options"], sort_keys=True) if made["options"] else "# none\n",
        few=few,
    )


HEAD = ["list", "EER %", "minDCF 0.01", "minDCF 0.05", "minCllr", "trials", "targets", "speakers"]


def _row(one: ListFigures) -> list[str]:
    figures = [_with_interval(one, *how) for how in (("eer", ".2f"), ("min_dcf_p01", ".3f"), ("min_dcf_p05", ".3f"))]
    counts = [f"{one.trials:,}", f"{one.targets:,}", f"{one.speakers:,}"]
    return [f"{one.name} ({one.role})", *figures, f"{one.figures['min_cllr']:.3f}", *counts]


def _with_interval(one: ListFigures, name: str, form: str) -> str:
    low_high = (one.intervals or {}).get(name)
    between = "" if low_high is None else f" ({low_high[0]:{form}} to {low_high[1]:{form}})"
    return f"{one.figures[name]:{form}}{between}"


def _thresholds(card: Card) -> str:
    if not card.false_alarm_thresholds:
        return "The development list has too few non-targets to claim a false-alarm rate."
    rows = [
        [f"{100 * row.rate:g} %", f"{row.threshold:.4f}", f"{100 * row.miss_rate:.1f} %"]
        for row in card.false_alarm_thresholds
    ]
    return _table(["false alarms at most", "cosine from", "targets missed there"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
