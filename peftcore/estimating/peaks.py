"""Peak memory of a process on this machine: a range, from the tensors of a step and the allocator's allowance.

    low    tensors at their peak, and some of the holes
    high   large tensors at their peak, small tensors at theirs, and most of the holes

Large tensors are returned to the system when they are freed. Small ones come from a heap that does not shrink, so that
its peak adds to that of the large ones whenever the two fall. `overhead` measures the holes of the heap.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from peftcore.estimating.following import Operation, Storage
from peftcore.estimating.ranges import Range

LARGE = 32 << 20  # bytes of a tensor that the C library returns to the system when it is freed
# Shares of the calibrated holes, and bytes, that hold 95 % of the 107 configurations in docs/will-it-fit.md.
_HOLES, _UNKNOWN = (0.15, 0.7), (10e6, 30e6)


class Peaks(NamedTuple):
    """Peaks of a step in bytes: of all tensors, of large ones, of small ones, of small ones made within the step."""

    tensors: int
    large: int
    small: int
    passing: int


def peaks(storages: Sequence[Storage], operations: Sequence[Operation]) -> Peaks:
    """Return the peaks of a step's tensors and of the memory inside its operators."""
    count = len(operations)
    small, large = [0] * (count + 2), [0] * (count + 2)
    throughout = 0
    for storage in storages:
        changes = large if storage.bytes >= LARGE else small
        changes[storage.born] += storage.bytes
        if storage.died is not None:
            changes[storage.died] -= storage.bytes
        elif storage.born == 0 and changes is small:
            throughout += storage.bytes
    for number, operation in enumerate(operations):
        changes = large if operation.cost.scratch >= LARGE else small
        changes[number] += operation.cost.scratch
        changes[number + 1] -= operation.cost.scratch
    smalls, larges = [*accumulate(small)], [*accumulate(large)]
    both = max(one + other for one, other in zip(smalls, larges, strict=True))
    return Peaks(both, max(larges), max(smalls), max(smalls) - throughout)


def held(found: Peaks, allowance: float) -> Range:
    """Return how many bytes a process holds at the peak of a step."""
    holes = allowance * found.passing
    least = found.tensors + _HOLES[0] * holes - _UNKNOWN[0]
    return Range(max(0.0, least), found.large + found.small + _HOLES[1] * holes + _UNKNOWN[1])
