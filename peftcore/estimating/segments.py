"""What PyTorch's allocator has of a CUDA card for a step's tensors: its segments, simulated.

    a block       multiples of 512 bytes
    up to 1 MiB   of segments of 2 MiB
    below 10 MiB  of segments of 20 MiB
    from there    a segment of its own, in multiples of 2 MiB

A request takes the smallest free block of its kind that is large enough; what remains of it becomes a block where it is
512 bytes or more (small ones) or more than 1 MiB (large ones). Free neighbours of a segment are joined, and segments
stay. Where no more is to be had, those that are free as a whole are given back first (c10/cuda/CUDACachingAllocator.cpp
and PyTorch's notes on CUDA's memory, with none of the options of PYTORCH_CUDA_ALLOC_CONF; one stream).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from peftcore.estimating.following import Operation, Storage, births_and_deaths

MIB = 1 << 20
_BLOCK, _SMALL, _OWN = 512, MIB, 10 * MIB
_OF_SMALL, _OF_LARGE, _MULTIPLE = 2 * MIB, 20 * MIB, 2 * MIB


class NoMemory(Exception):
    """A request that the card cannot fill."""


@dataclass(eq=False)
class Block:
    """A piece of a segment, with its neighbours in it."""

    segment: int
    start: int
    size: int
    small: bool
    before: Block | None = field(default=None, repr=False)
    behind: Block | None = field(default=None, repr=False)

    @property
    def place(self) -> tuple[int, int, int]:
        """By which free blocks are sorted."""
        return self.size, self.segment, self.start


class Segments:
    """The allocator of one card. `limit`: bytes that the card has; None: any number."""

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self.reserved = self.allocated = 0
        self._count = 0
        self._places: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}  # of free blocks, sorted
        self._free: dict[tuple[int, int, int], Block] = {}

    def allocate(self, count: int) -> Block:
        """A block for so many bytes.

        Raises:
            NoMemory: the limit is reached, with all that is free given back.
        """
        size = max(_BLOCK, -(-count // _BLOCK) * _BLOCK)
        small = size <= _SMALL
        places = self._places[small]
        at = bisect_left(places, (size, -1, -1))
        block = self._taken(self._free[places[at]]) if at < len(places) else self._segment(size, small)
        rest = block.size - size
        if rest >= _BLOCK if small else rest > _SMALL:
            behind = Block(block.segment, block.start + size, rest, small, block, block.behind)
            if block.behind is not None:
                block.behind.before = behind
            block.behind, block.size = behind, size
            self._give(behind)
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        """Give a block back."""
        self.allocated -= block.size
        if (behind := block.behind) is not None and behind.place in self._free:
            self._taken(behind)
            block.size, block.behind = block.size + behind.size, behind.behind
            if behind.behind is not None:
                behind.behind.before = block
        if (before := block.before) is not None and before.place in self._free:
            self._taken(before)
            before.size, before.behind = before.size + block.size, block.behind
            if block.behind is not None:
                block.behind.before = before
            block = before
        self._give(block)

    def _segment(self, size: int, small: bool) -> Block:
        bytes_ = _OF_SMALL if small else _OF_LARGE if size < _OWN else -(-size // _MULTIPLE) * _MULTIPLE
        if self.limit is not None and self.reserved + bytes_ > self.limit:
            self._release()
            if self.reserved + bytes_ > self.limit:
                raise NoMemory(f"{self.reserved + bytes_} bytes of {self.limit}")
        self.reserved += bytes_
        self._count += 1
        return Block(self._count, 0, bytes_, small)

    def _release(self) -> None:
        for block in [each for each in self._free.values() if each.before is None and each.behind is None]:
            self._taken(block)
            self.reserved -= block.size

    def _give(self, block: Block) -> None:
        insort(self._places[block.small], block.place)
        self._free[block.place] = block

    def _taken(self, block: Block) -> Block:
        places = self._places[block.small]
        del places[bisect_left(places, block.place)]
        del self._free[block.place]
        return block


def peak_reserved(storages: Sequence[Storage], operations: Sequence[Operation], limit: float | None = None) -> int:
    """The most bytes that the allocator has of the card in two such steps.

    Raises:
        NoMemory: more than `limit` would be needed.
    """
    card = Segments(limit)
    born, died, stay = births_and_deaths(storages)
    for number in stay:
        card.allocate(storages[number].bytes)
    most = card.reserved
    for _ in range(2):
        held: dict[int, Block] = {}
        for number in range(len(operations) + 1):
            for each in died[number]:
                if each in held:
                    card.free(held.pop(each))
            for each in born[number]:
                held[each] = card.allocate(storages[each].bytes)
            most = max(most, card.reserved)
        for block in held.values():
            card.free(block)
    return most
