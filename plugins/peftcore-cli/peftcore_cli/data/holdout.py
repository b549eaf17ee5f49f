"""Split each data set at random into training and held-out examples."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from peftcore.errors import PeftcoreError
from peftcore_cli.data import mixture
from peftcore_cli.data.disk_list import LazySequence, Selection
from peftcore_cli.data.row import Row

SHOWN_ROWS = 10  # held-out rows that `describe` names


def check(holdout: float) -> None:
    """Raise a PeftcoreError unless `holdout` is a fraction in (0, 1) or an integer of at least 1."""
    if holdout <= 0 or (holdout > 1 and not float(holdout).is_integer()):
        raise PeftcoreError(
            "--holdout must be a fraction between 0 and 1, such as 0.1, or a whole number of examples, found "
            f"{holdout:g}. To evaluate on separate examples, pass --eval-data FILE"
        )


def split(rows: LazySequence[Row], holdout: float, seed: int) -> tuple[LazySequence[Row], LazySequence[Row]]:
    """Split rows at random into (training, held-out) rows, with a generator seeded by `seed`.

    A fraction is held out of each data set with at least two examples. A number of examples is divided among the data
    sets in proportion to their sizes, with at least one from each if possible.

    Raises:
        PeftcoreError: `holdout` is neither a fraction in (0, 1) nor a number below `len(rows)`, or there are fewer than
            two rows.
    """
    check(holdout)
    if len(rows) < 2:
        raise PeftcoreError(
            "cannot split a single example into training and held-out examples. Pass examples to evaluate on: "
            "--eval-data FILE"
        )
    if holdout >= len(rows):
        raise PeftcoreError(
            f"--holdout {holdout:g} leaves no examples to train on: the data has {len(rows):,}. Hold out fewer, or "
            "pass examples to evaluate on: --eval-data FILE"
        )
    index_sets = [array("q", indices) for indices in mixture.ranges(rows).values()]
    if len(index_sets) == 1:
        counts = [int(holdout) if holdout >= 1 else _fraction(len(rows), holdout)]
    elif holdout >= 1:
        counts = _divide(int(holdout), [len(index_set) for index_set in index_sets])
    else:
        counts = [_fraction(len(index_set), holdout) for index_set in index_sets]
        if not any(counts):  # data sets with a single example
            counts[0] = 1
    is_held_out = bytearray(len(rows))
    for order, count in zip(index_sets, counts, strict=True):
        random.Random(seed).shuffle(order)
        for index in order[:count]:
            is_held_out[index] = True
    train, held_out = (array("q", (i for i, is_out in enumerate(is_held_out) if is_out == out)) for out in (0, 1))
    return Selection(rows, train), Selection(rows, held_out)


def describe(held_out: Sequence[Row], total: int) -> str:
    """Return which of `total` examples are held out: `4 of 40 examples (chat.jsonl:7, 12, 30, 31)`."""
    lines_by_file: dict[str, list[str]] = {}
    for row in held_out[:SHOWN_ROWS]:
        file, _, line = row.location.rpartition(":")
        if line.isdecimal():
            lines_by_file.setdefault(file, []).append(line)
        else:  # an image, which is a file of its own
            lines_by_file[row.location] = []
    places = [f"{file}:{', '.join(lines)}" if lines else file for file, lines in lines_by_file.items()]
    more = ", ..." if len(held_out) > SHOWN_ROWS else ""
    return f"{len(held_out):,} of {total:,} examples ({', '.join(places)}{more})"


def _fraction(size: int, fraction: float) -> int:
    """Return the number of held-out examples out of `size`: at least one, but not all."""
    return min(max(1, round(fraction * size)), size - 1)


def _divide(count: int, sizes: Sequence[int]) -> list[int]:
    """Divide `count` held-out examples among data sets by size, so that each keeps a training example if possible."""
    counts = [0] * len(sizes)
    for _ in range(count):
        free = [i for i, size in enumerate(sizes) if counts[i] < size - 1] or [
            i for i, size in enumerate(sizes) if counts[i] < size
        ]
        empty = [i for i in free if not counts[i]]
        index = max(empty or free, key=lambda i: sizes[i] / (counts[i] + 1))
        counts[index] += 1
    return counts
