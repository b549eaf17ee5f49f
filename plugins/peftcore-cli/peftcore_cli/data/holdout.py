"""Held-out examples: drawn at random, in each data set."""

from __future__ import annotations

import random
from collections.abc import Sequence

from peftcore.errors import PeftcoreError
from peftcore_cli.data.row import Row


def check(holdout: float) -> None:
    """Raise a PeftcoreError unless `holdout` is a share in (0, 1) or a whole number from 1 up."""
    if holdout <= 0 or (holdout > 1 and not float(holdout).is_integer()):
        raise PeftcoreError(
            "--holdout must be a share between 0 and 1, such as 0.1, or a whole number of examples, "
            f"found {holdout:g}. To evaluate on other examples: --eval-data FILE"
        )


def split(rows: Sequence[Row], holdout: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (rest, held-out), chosen at random depending on `seed` only.

    A share is held out of each data set with at least two examples, a number of examples is divided among the data
    sets by size: at least one of each, if there are enough.

    Raises:
        PeftcoreError: `holdout` is not a share in (0, 1) or a number of examples below that of `rows`, or there are
            fewer than two rows.
    """
    check(holdout)
    if len(rows) < 2:
        raise PeftcoreError("a single example cannot be split. Pass a file to evaluate on: --eval-data FILE")
    if holdout >= len(rows):
        raise PeftcoreError(
            f"--holdout {holdout:g} leaves nothing to train on: there are {len(rows):,} examples. Hold out fewer, or "
            "pass a file to evaluate on: --eval-data FILE"
        )
    places: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(row.source, []).append(index)
    sets = list(places.values())
    if len(sets) == 1:
        counts = [int(holdout) if holdout >= 1 else _share(len(rows), holdout)]
    elif holdout >= 1:
        counts = _divided(int(holdout), [len(each) for each in sets])
    else:
        counts = [_share(len(each), holdout) for each in sets]
        if not any(counts):  # data sets of one example each
            counts[0] = 1
    held: set[int] = set()
    for indices, count in zip(sets, counts, strict=True):
        order = list(indices)
        random.Random(seed).shuffle(order)
        held.update(order[:count])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def _share(size: int, share: float) -> int:
    """Return how many of `size` examples are held out: at least one, but not all."""
    return min(max(1, round(share * size)), size - 1)


def _divided(count: int, sizes: Sequence[int]) -> list[int]:
    """Divide `count` held-out examples by size, one at a time where most are missing; each set keeps an example."""
    found = [0] * len(sizes)
    for _ in range(count):
        free = [i for i, size in enumerate(sizes) if found[i] < size - 1] or [
            i for i, size in enumerate(sizes) if found[i] < size
        ]
        none = [i for i in free if not found[i]]
        place = max(none or free, key=lambda i: sizes[i] / (found[i] + 1))
        found[place] += 1
    return found
