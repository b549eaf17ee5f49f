"""Memory that PyTorch's caching allocator reserves on a CUDA device for a step, by its documented rules.

    a block       multiples of 512 bytes
    up to 1 MiB   of segments of 2 MiB
    below 10 MiB  of segments of 20 MiB
    from there    a segment of its own, in multiples of 2 MiB

A request gets the smallest free block of its kind that is large enough. The remainder becomes a block if it has at
least 512 bytes (small blocks) or more than 1 MiB (large blocks). Adjacent free blocks in a segment are merged, and
segments are not released. PyTorch also releases fully free segments if the GPU runs out of memory, which is not
modelled (c10/cuda/CUDACachingAllocator.cpp and PyTorch's notes on CUDA memory; default PYTORCH_CUDA_ALLOC_CONF, one
stream).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from peftcore.estimating.following import Operation, Storage, births_and_deaths

MIB = 1 << 20
_BLOCK, _SMALL, _OWN = 512, MIB, 10 * MIB
_OF_SMALL, _OF_LARGE, _MULTIPLE = 2 * MIB, 20 * MIB, 2 * MIB


@dataclass(eq=False)
class Block:
    """Block of a segment, linked to its neighbours."""

    segment: int
    start: int
    size: int
    small: bool
    before: Block | None = field(default=None, repr=False)
    behind: Block | None = field(default=None, repr=False)

    @property
    def place(self) -> tuple[int, int, int]:
        """Sort key of free blocks."""
        return self.size, self.segment, self.start


class Segments:
    """Allocator of one GPU."""

    def __init__(self) -> None:
        self.reserved = self.allocated = 0
        self._count = 0
        self._places: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}  # free blocks, sorted
        self._free: dict[tuple[int, int, int], Block] = {}

    def allocate(self, count: int) -> Block:
        """Allocate a block with this number of bytes."""
        size = max(_BLOCK, -(-count // _BLOCK) * _BLOCK)
        small = size <= _SMALL
        places = self._places[small]
        at = bisect_left(places, (size, -1, -1))
        block = self._taken(self._free[places[at]]) if at < len(places) else self._segment(size, small)
        remainder = block.size - size
        if remainder >= _BLOCK if small else remainder > _SMALL:
            behind = Block(block.segment, block.start + size, remainder, small, block, block.behind)
            if block.behind is not None:
                block.behind.before = behind
            block.behind, block.size = behind, size
            self._give(behind)
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        """Free a block."""
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
        self.reserved += bytes_
        self._count += 1
        return Block(self._count, 0, bytes_, small)

    def _give(self, block: Block) -> None:
        insort(self._places[block.small], block.place)
        self._free[block.place] = block

    def _taken(self, block: Block) -> Block:
        places = self._places[block.small]
        del places[bisect_left(places, block.place)]
        del self._free[block.place]
        return block


def peak_reserved(storages: Sequence[Storage], operations: Sequence[Operation]) -> int:
    """Return the maximum number of bytes that the allocator reserves in two such steps."""
    card = Segments()
    born, died, stay = births_and_deaths(storages)
    for number in stay:
        card.allocate(storages[number].bytes)
    peak = card.reserved
    for _ in range(2):
        blocks: dict[int, Block] = {}
        for number in range(len(operations) + 1):
            for index in died[number]:
                if index in blocks:
                    card.free(blocks.pop(index))
            for index in born[number]:
                blocks[index] = card.allocate(storages[index].bytes)
            peak = max(peak, card.reserved)
        for block in blocks.values():
            card.free(block)
    return peak
