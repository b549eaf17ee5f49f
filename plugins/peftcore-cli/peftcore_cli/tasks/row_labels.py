"""Labels of rows, and the targets of a classifier."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

from peftcore.errors import PeftcoreError, nearest
from peftcore_cli.data.row import Row

_MAX_SHOWN = 20  # labels listed by name


def labels_of(rows: Iterable[Row]) -> list[str]:
    """Return the distinct labels, in numerical order if all are numbers, otherwise alphabetically; none for regression.

    Raises:
        PeftcoreError: all examples have the same label or number, or no row has a label.
    """
    rows = iter(rows)
    first = next(rows)
    if isinstance(first.label, float):
        if all(row.label == first.label for row in rows):
            raise PeftcoreError(
                f"{first.location}: every training example has the label {first.label:g}, so there is nothing to "
                "learn. Add examples with other numbers"
            )
        return []
    names: set[str] = set()
    for row in itertools.chain([first], rows):
        if isinstance(row.label, str):
            names.add(row.label)
        elif isinstance(row.label, tuple):
            names.update(row.label)
    if len(names) < 2 and (isinstance(first.label, str) or first.words):
        subject = "word has the tag" if first.words else "training example has the label"
        raise PeftcoreError(
            f"{first.location}: every {subject} '{', '.join(names)}', but a classifier needs at least two labels. Add "
            "examples with another label, or, if all of these were held out, choose the held-out examples: "
            "--eval-data FILE"
        )
    if not names:
        raise PeftcoreError(f"{first.location}: no example has a label. Add labels")
    are_integers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=int) if are_integers else sorted(names)


def counts_of(rows: Iterable[Row]) -> str:
    """Describe the counts of labels or tags, most frequent first; an empty text for regression."""
    counts: Counter[str] = Counter()
    examples, unit = 0, "examples"
    for row in rows:
        examples += 1
        if isinstance(row.label, str):
            counts[row.label] += 1
        elif isinstance(row.label, tuple):
            counts.update(row.label)
        if row.words:
            unit = "tags"
    if not counts:
        return ""
    shown = [f"{label} ({count:,})" for label, count in counts.most_common(_MAX_SHOWN)]
    if len(counts) > _MAX_SHOWN:
        shown.append(f"{len(counts) - _MAX_SHOWN:,} more")
    # Every word has one tag, but a multi-label example may have any number of labels.
    total = counts.total() if unit == "tags" else examples
    share = counts.most_common(1)[0][1] / total
    return f"labels: {', '.join(shown)}. {share:.1%} of the {unit} have the most frequent label"


def targets(rows: list[Row], labels: list[str]) -> list[int] | list[float] | list[tuple[float, ...]]:
    """Return the target of each row.

    The kind of the first row's label determines the targets:

        number (regression)                  the number
        several labels (multi-label)         a tuple with 1.0 for each of `labels` that the row has, otherwise 0.0
        one label                            its index in `labels`

    Raises:
        PeftcoreError: a label is unknown.
    """
    _refuse_unknown_labels(rows, labels)
    first_label = rows[0].label
    if isinstance(first_label, float):
        return [row.label for row in rows if isinstance(row.label, float)]
    if isinstance(first_label, tuple):
        return [_indicators(row.label, labels) for row in rows if isinstance(row.label, tuple)]
    index_of = {label: i for i, label in enumerate(labels)}
    return [index_of[row.label] for row in rows if isinstance(row.label, str)]


def _indicators(row_labels: tuple[str, ...], labels: list[str]) -> tuple[float, ...]:
    return tuple(float(label in row_labels) for label in labels)


def _refuse_unknown_labels(rows: list[Row], labels: list[str]) -> None:
    known_labels = set(labels)
    for row in rows:
        row_labels = row.label if isinstance(row.label, tuple) else (row.label,)
        for label in row_labels:
            if isinstance(label, str) and label not in known_labels:
                raise PeftcoreError(
                    f"{row.location}: unknown label '{label}'{nearest(label, labels)}. The model's labels are "
                    f"{', '.join(labels)}. Correct the label, or train with examples of it"
                )
