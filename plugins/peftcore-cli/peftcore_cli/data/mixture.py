"""Mixtures of data sets: `--data A:2 --data B` draws the examples of A twice as often as those of B.

A weight is how often an example is drawn in each epoch: 2 draws every example twice, 0.5 a random half, another one in
each epoch.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

from peftcore.errors import PeftcoreError


@dataclass(frozen=True)
class Source:
    """A data set of `--data`: a file, a folder or a hub id, and its weight."""

    path: str
    weight: float = 1.0


def parsed(text: str) -> Source:
    """Parse `PATH:WEIGHT`; the name of an existing file or folder is a path, whatever its colons.

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
            f"the weight in --data {text} must be a number above 0: how often an example is drawn in each epoch. "
            "To train without the data set, leave out its --data"
        )
    return Source(path, weight)


def count(size: int, weight: float) -> int:
    """Return how many examples of a data set with `size` examples are drawn in each epoch, at least one."""
    return max(1, round(size * weight))


def drawn(parts: Sequence[tuple[int, float]], draw: random.Random) -> list[int]:
    """Return the indices of one epoch, in no particular order.

    Args:
        parts: (number of examples, weight) of each data set, in the order of the examples.
        draw: random numbers; none are drawn if every weight is whole.
    """
    found: list[int] = []
    begin = 0
    for size, weight in parts:
        indices = range(begin, begin + size)
        if not size:
            continue
        copies, more = divmod(count(size, weight), size)
        found += copies * list(indices)
        if more:
            found += sorted(draw.sample(indices, more))
        begin += size
    return found
