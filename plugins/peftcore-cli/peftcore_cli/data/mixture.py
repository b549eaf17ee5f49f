"""Mixtures of data sets: `--data A:2 --data B` samples A's examples twice as often as B's.

The weight of a data set is how often its examples are used per epoch. With a weight of 2, every example is used twice.
With 0.5, each epoch uses a different random half.
"""

from __future__ import annotations

import bisect
import math
import os
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from peftcore.errors import PeftcoreError
from peftcore_cli.data.row import Row


@dataclass(frozen=True)
class Source:
    """A data set of `--data`: a file, a folder or a hub id, and its weight."""

    path: str
    weight: float = 1.0


def parse(text: str) -> Source:
    """Parse `PATH:WEIGHT`. The name of an existing file or folder may contain colons.

    Raises:
        PeftcoreError: the weight is not a finite number above 0.
    """
    path, colon, number = text.rpartition(":")
    if not colon or not path or os.path.exists(os.path.expanduser(text)):
        return Source(text)
    try:
        weight = float(number)
    except ValueError:
        return Source(text)
    if not math.isfinite(weight) or weight <= 0:
        raise PeftcoreError(
            f"the weight in --data {text} must be a number above 0: how often each example is used per epoch. To "
            "exclude the data set, remove its --data"
        )
    return Source(path, weight)


def count(size: int, weight: float) -> int:
    """Return the number of examples used per epoch, at least one, from a data set with `size` examples."""
    return max(1, round(size * weight))


def sample_epoch(weighted_sizes: Sequence[tuple[int, float]], generator: random.Random) -> array[int]:
    """Return the indices of one epoch, in no particular order.

    Args:
        weighted_sizes: (number of examples, weight) of each data set, in the order of the examples.
        generator: random generator, which is only used for weights that are not integers.
    """
    order = array("q")
    begin = 0
    for size, weight in weighted_sizes:
        indices = range(begin, begin + size)
        if not size:
            continue
        repeats, remaining = divmod(count(size, weight), size)
        order += repeats * array("q", indices)
        if remaining:
            order.extend(sorted(generator.sample(indices, remaining)))
        begin += size
    return order


def ranges(rows: Sequence[Row]) -> dict[int, range]:
    """Return the range of row indices of each data set. Rows must be sorted by data set.

    Bisection only reads a few rows.
    """
    ranges_by_source, begin = dict[int, range](), 0
    while begin < len(rows):
        source = rows[begin].source
        end = bisect.bisect_right(rows, source, begin, key=lambda row: row.source)
        ranges_by_source[source] = range(begin, end)
        begin = end
    return ranges_by_source
