"""What a process holds for its tensors: glibc's malloc, simulated on a step's allocations.

Requests from a threshold on are mapped where no free piece is large enough, and gone when they are freed; the threshold
rises to the largest freed one, up to 32 MiB. The others come from one heap: the smallest free piece that is large
enough, split; free neighbours are joined; the end is given back when it is larger than twice the threshold. What lies
free between others stays with the process (malloc/malloc.c: `sysmalloc`, `_int_malloc`, `_int_free`, `systrim`).

Most of what a process holds in vain comes of two things together. A tensor begins at a multiple of 64 bytes, for which
96 bytes more are looked for than it takes (`_int_memalign`): the piece that a freed tensor leaves is too small for
another of its size, unless the bytes before or behind it are free too. And there lie PyTorch's objects of a few hundred
bytes: a tensor's, its storage's, and the node of autograd, which stays until the backward has ended.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

from peftcore.estimating.following import Operation, Storage, births_and_deaths

_PAGE, _PAD = 4096, 128 << 10
_LARGEST_THRESHOLD = 32 << 20
_ALIGNMENT, _LEAST = 64, 32
_CACHED, _CACHED_OF_A_SIZE = 1040, 7  # pieces that are kept by size when they are freed, and joined with none
_OF_A_TENSOR = (104, 184, 24)  # bytes of StorageImpl, TensorImpl and a vector; seen in traces of PyTorch 2.13
_OF_A_NODE = (472, 24, 24, 40)

Piece = tuple[int, int]  # (address, size); address -1: it is mapped


class Heap:
    """One arena. Addresses count from 0."""

    def __init__(self) -> None:
        self.threshold, self.trim = 128 << 10, 128 << 10
        self.mapped = 0
        self.end = 0  # of what was got from the system
        self.top = 0  # from here on all is free
        self.touched = 0
        self._free: list[Piece] = []  # as (size, address), sorted
        self._size_at: dict[int, int] = {}  # of free pieces, by where they begin
        self._start_at: dict[int, int] = {}  # and by where they end
        self._cached: dict[int, list[Piece]] = defaultdict(list)

    @property
    def resident(self) -> int:
        """Bytes that are the process's."""
        return self.mapped + self.touched

    def allocate(self, count: int) -> Piece:
        """A new piece for so many bytes."""
        size = _size_for(count)
        if cached := self._cached.get(size):
            return cached.pop()
        return self._map(size) or self._cut(size)

    def allocate_aligned(self, count: int) -> Piece:
        """A new piece for so many bytes of a tensor."""
        size = _size_for(count)
        wanted = size + _ALIGNMENT + _LEAST
        if mapped := self._map(wanted):
            return mapped
        address, found = self._cut(wanted)
        start = -(-(address + 16) // _ALIGNMENT) * _ALIGNMENT - 16
        if start != address:
            start += _ALIGNMENT if start - address < _LEAST else 0
            self._join(address, start - address)
        rest, behind = address + found - start - size, start + size
        if rest >= _LEAST or behind + rest == self.top or behind + rest in self._size_at:
            self._join(behind, rest)
            return start, size
        return start, size + rest

    def free(self, piece: Piece) -> None:
        """Give a piece back."""
        address, size = piece
        if address < 0:
            self.mapped -= size
            if self.threshold < size <= _LARGEST_THRESHOLD:
                self.threshold, self.trim = size, 2 * size
            return
        if size <= _CACHED and len(cached := self._cached[size]) < _CACHED_OF_A_SIZE:
            cached.append(piece)
            return
        self._join(address, size)
        if self.end - self.top > self.trim:
            self.end = -(-(self.top + _PAD) // _PAGE) * _PAGE
            self.touched = min(self.touched, self.end)

    def _map(self, size: int) -> Piece | None:
        if size < self.threshold or (self._free and self._free[-1][0] >= size):
            return None
        size = -(-(size + 16) // _PAGE) * _PAGE
        self.mapped += size
        return -1, size

    def _cut(self, size: int) -> Piece:
        """Of the smallest free piece that is large enough, or of the end."""
        at = bisect_left(self._free, (size, -1))
        if at < len(self._free):
            found, address = self._free[at]
            self._take(found, address)
            if found - size < _LEAST:
                return address, found
            self._give(found - size, address + size)
            return address, size
        address = self.top
        self.top += size
        if self.top > self.end:
            self.end = -(-(self.top + _PAD) // _PAGE) * _PAGE
        self.touched = max(self.touched, self.top)
        return address, size

    def _join(self, address: int, size: int) -> None:
        """Make free what lies there, in one piece with its free neighbours."""
        if (after := self._size_at.get(address + size)) is not None:
            self._take(after, address + size)
            size += after
        if (before := self._start_at.get(address)) is not None:
            self._take(address - before, before)
            address, size = before, size + address - before
        if address + size < self.top:
            self._give(size, address)
        else:
            self.top = address

    def _give(self, size: int, address: int) -> None:
        insort(self._free, (size, address))
        self._size_at[address] = size
        self._start_at[address + size] = address

    def _take(self, size: int, address: int) -> None:
        del self._free[bisect_left(self._free, (size, address))]
        del self._size_at[address]
        del self._start_at[address + size]


def _size_for(count: int) -> int:
    return max(_LEAST, (count + 8 + 15) & ~15)


def peak_of_process(storages: Sequence[Storage], operations: Sequence[Operation]) -> int:
    """The most bytes that a process has for these storages in the second of two such steps."""
    heap = Heap()
    born, died, stay = births_and_deaths(storages)
    for number in stay:
        heap.allocate_aligned(storages[number].bytes)
    most = 0
    for _ in range(2):
        most = heap.resident
        held: dict[int, list[Piece]] = {}
        nodes: list[Piece] = []
        recording = ""
        for number in range(len(operations) + 1):
            for each in died[number]:
                for piece in held.pop(each, ()):
                    heap.free(piece)
            operation = operations[number] if number < len(operations) else None
            if operation is not None and operation.recorded:
                recording = operation.phase
                nodes += map(heap.allocate, _OF_A_NODE)
            elif nodes and operation is not None and operation.phase != operations[number - 1].phase != recording:
                for piece in nodes:  # a backward has ended
                    heap.free(piece)
                nodes = []
            for each in born[number]:
                held[each] = [heap.allocate_aligned(storages[each].bytes), *map(heap.allocate, _OF_A_TENSOR)]
            most = max(most, heap.resident)
            if operation is not None and operation.cost.scratch:
                piece = heap.allocate_aligned(operation.cost.scratch)
                most = max(most, heap.resident)
                heap.free(piece)
        for piece in (*nodes, *(piece for pieces in held.values() for piece in pieces)):
            heap.free(piece)
    return most
