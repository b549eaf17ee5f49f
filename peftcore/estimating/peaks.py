"""Range of a process's peak memory on this machine, from a step's tensors and the fragmentation of the heap.

    low    tensors + a fifth of the holes that passing tensors leave
    high   large tensors + small tensors, each at its own peak, + holes of passing tensors, gradients, the largest one

A C library returns a large tensor to the system when it is freed. Small tensors come from a heap that does not shrink,
so the peak of small tensors adds to the peak of large tensors even if the two occur at different times. A hole in the
heap is only reused by allocations that fit into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from peftcore.estimating.following import Operation, Storage
from peftcore.estimating.purpose import Purpose
from peftcore.estimating.ranges import Range

LARGE = 32 << 20  # minimum size in bytes of a tensor that the C library returns to the system when it is freed
# Shares and bytes that holes add, fitted to 135 configurations with glibc and to runs with batches of different
# lengths.
_LEAST_HOLES, _PASSING, _OF_GRADIENTS, _OF_LARGEST = 0.05, 0.52, 0.53, 1.5
_BELOW, _ABOVE = 10e6, 80e6  # the upper bound includes libraries that PyTorch loads in the first step


class Peaks(NamedTuple):
    """Peaks of a step in bytes.

    Args:
        tensors: Peak of all tensors together.
        large, small: Peaks of tensors of at least, and of less than, `LARGE` bytes.
        passing: The part of `small` that is created during the step.
        gradients: Gradients in small tensors.
        largest: Largest small tensor that is created during the step.
    """

    tensors: int
    large: int
    small: int
    passing: int
    gradients: int
    largest: int


def peaks(storages: Sequence[Storage], operations: Sequence[Operation]) -> Peaks:
    """Return the peaks of a step's tensors and of the memory inside its operators."""
    count = len(operations)
    small, large = [0] * (count + 2), [0] * (count + 2)
    throughout = gradients = largest = 0
    for storage in storages:
        changes = large if storage.bytes >= LARGE else small
        changes[storage.born] += storage.bytes
        stays = storage.born == 0 and storage.died is None
        if storage.died is not None:
            changes[storage.died] -= storage.bytes
        if changes is small:
            throughout += storage.bytes * stays
            gradients += storage.bytes * (storage.kind == Purpose.GRADIENTS)
            largest = max(largest, storage.bytes * (not stays))
    for number, operation in enumerate(operations):
        changes = large if operation.cost.scratch >= LARGE else small
        changes[number] += operation.cost.scratch
        changes[number + 1] -= operation.cost.scratch
    smalls, larges = [*accumulate(small)], [*accumulate(large)]
    total = max(one + other for one, other in zip(smalls, larges, strict=True))
    return Peaks(total, max(larges), max(smalls), max(smalls) - throughout, gradients, largest)


def held(peak: Peaks) -> Range:
    """Return the number of bytes that a process holds at the peak of a step."""
    low = peak.tensors + _LEAST_HOLES * peak.passing - _BELOW
    holes = _PASSING * peak.passing + _OF_GRADIENTS * peak.gradients + _OF_LARGEST * peak.largest
    return Range(max(0.0, low), peak.large + peak.small + holes + _ABOVE)
