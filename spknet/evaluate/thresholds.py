"""Thresholds chosen on one list as they do on another.

A threshold for a false-alarm rate f is the lowest score that at most a fraction f of the non-targets of the list it is chosen
on reach. A rate f is only claimed on at least 30/f non-targets: then about 30 errors are expected, and the rate's own
standard error stays below a fifth of it.

    threshold_card((test_scores, test_labels), (dev_scores, dev_labels))
"""

from __future__ import annotations

import numpy as np

RATES = (0.01, 0.001, 0.0001)  # false-alarm rates of the threshold card
ERRORS_BEHIND = 30  # expected false alarms without which a rate is not claimed


def threshold_card(test: tuple, dev: tuple | None) -> list[dict]:
    """One row for each false-alarm rate: the threshold, chosen on dev (scores, labels), and the rates it gives on test.

    Without dev the threshold comes from the test list itself and the row says `oracle`. `claimed` and its reason say whether
    both lists have the non-targets for it; the threshold is None where the choosing list has too few.
    """
    chooser = test if dev is None else dev
    scores, labels = (np.asarray(values) for values in test)
    chosen_on = np.sort(np.asarray(chooser[0])[np.asarray(chooser[1]) == 0])[::-1]
    targets, nontargets = scores[labels == 1], scores[labels == 0]
    card = []
    for rate in RATES:
        needed = round(ERRORS_BEHIND / rate)
        row = {"rate": rate, "chosen_on": "oracle" if dev is None else "dev", "nontargets_needed": needed}
        row |= {"nontargets_chosen_on": len(chosen_on), "nontargets": len(nontargets)}
        row |= {"threshold": None, "far": None, "frr": None}
        row["claimed"] = min(len(chosen_on), len(nontargets)) >= needed
        if len(chosen_on) >= needed:
            threshold = _threshold(chosen_on, rate)
            row["threshold"] = threshold
            row["far"], row["frr"] = float((nontargets >= threshold).mean()), float((targets < threshold).mean())
        card.append(row)
    return card


def _threshold(descending: np.ndarray, rate: float) -> float:
    """The smallest threshold that at most a fraction `rate` of the scores reach: just above the first one too many."""
    allowed = int(np.floor(rate * len(descending) + 1e-9))
    return float(np.nextafter(descending[allowed], np.inf))


def rows(card: list[dict]) -> list[list[str]]:
    """The threshold card as a table, head first."""
    table = [["false-alarm rate", "chosen on", "threshold", "FAR here %", "FRR here %", "claimed"]]
    for row in card:
        needed = f"{row['nontargets_needed']:,} needed"
        first = [f"{100 * row['rate']:g} %", row["chosen_on"]]
        if row["threshold"] is None:
            table.append(
                [*first, "", "", "", f"no: {row['nontargets_chosen_on']:,} non-targets to choose on, {needed}"]
            )
            continue
        said = "yes" if row["claimed"] else f"no: {row['nontargets']:,} non-targets here, {needed}"
        table.append([*first, f"{row['threshold']:.4f}", f"{100 * row['far']:.3f}", f"{100 * row['frr']:.2f}", said])
    return table
