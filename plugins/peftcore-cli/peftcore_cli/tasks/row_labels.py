"""Labels of rows as targets of a classifier."""

from __future__ import annotations

from collections import Counter

from peftcore.errors import PeftcoreError, nearest
from peftcore_cli.data.row import Row

_SHOWN = 20  # labels that are listed by name


def labels_of(rows: list[Row]) -> list[str]:
    """Return the distinct label names, numbers in numeric order, otherwise alphabetically; none for regression.

    Raises:
        PeftcoreError: all examples have one label or number, or no row has any.
    """
    if isinstance(rows[0].label, float):
        if len({row.label for row in rows}) < 2:
            raise PeftcoreError(
                f"{rows[0].where}: every training example has the number {rows[0].label:g}, so there is nothing to "
                "learn. Add examples with other numbers"
            )
        return []
    found: set[str] = set()
    for row in rows:
        found.update((row.label,) if isinstance(row.label, str) else row.label if isinstance(row.label, tuple) else ())
    if len(found) < 2 and (isinstance(rows[0].label, str) or rows[0].words):
        what = "word has the tag" if rows[0].words else "training example has the label"
        raise PeftcoreError(
            f"{rows[0].where}: every {what} '{', '.join(found)}', and a classifier needs at least two. Add examples of "
            "another one, or, if these were held out, name the held-out ones: --eval-data FILE"
        )
    if not found:
        raise PeftcoreError(f"{rows[0].where}: no example has a label")
    return sorted(found, key=int) if all(each.removeprefix("-").isdecimal() for each in found) else sorted(found)


def counts_of(rows: list[Row]) -> str:
    """Describe the labels or tags of rows by their counts, most frequent first; empty for regression."""
    counts: Counter[str] = Counter()
    for row in rows:
        if isinstance(row.label, str):
            counts[row.label] += 1
        elif isinstance(row.label, tuple):
            counts.update(row.label)
    if not counts:
        return ""
    shown = [f"{label} ({count:,})" for label, count in counts.most_common(_SHOWN)]
    if len(counts) > _SHOWN:
        shown.append(f"{len(counts) - _SHOWN:,} more")
    # Every word has one tag, but an example of several labels may have any number of them.
    whole, unit = (counts.total(), "tags") if rows[0].words else (len(rows), "examples")
    share = counts.most_common(1)[0][1] / whole
    return f"labels: {', '.join(shown)}. {share:.1%} of the {unit} have the most frequent one"


def targets(rows: list[Row], known: list[str]) -> list[int] | list[float] | list[tuple[float, ...]]:
    """Return each row's target: the index of its label in `known`, its number, or zeros and ones for all labels.

    Raises:
        PeftcoreError: a label is not known.
    """
    index = {label: i for i, label in enumerate(known)}
    for row in rows:
        for name in row.label if isinstance(row.label, tuple) else (row.label,):
            if isinstance(name, str) and name not in index:
                raise PeftcoreError(
                    f"{row.where}: label '{name}' is unknown{nearest(name, known)}. The model knows: "
                    f"{', '.join(known)}. Correct the label, or train with examples of it"
                )
    if isinstance(rows[0].label, float):
        return [row.label for row in rows if isinstance(row.label, float)]
    if isinstance(rows[0].label, tuple):
        return [tuple(float(label in row.label) for label in known) for row in rows if isinstance(row.label, tuple)]
    return [index[row.label] for row in rows if isinstance(row.label, str)]
