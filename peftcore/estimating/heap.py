"""What a process holds for its tensors: glibc's malloc, simulated on a step's allocations (malloc/malloc.c, 2.41).

Requests from a threshold on are mapped where no free piece is large enough, and gone when they are freed; the threshold
rises to the largest freed one, up to 32 MiB. The others come from one heap: the smallest free piece that is large
enough, split; free neighbours are joined; the end is given back when it is larger than twice the threshold. What lies
free between others stays with the process.

Most of what a process holds in vain comes of two things together. A tensor begins at a multiple of 64 bytes, for which
112 bytes more are looked for than it takes (`_int_memalign`): the piece that a freed tensor leaves is too small for
another of its size, unless the bytes before or behind it are free too. And there lie PyTorch's objects of a few hundred
bytes: a tensor's, its storage's, and the node of autograd, which stays until the backward has ended. Which pieces of
up to 1,040 bytes are joined, and when, decides over hundreds of megabytes, so malloc's lists of them are kept, too.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from peftcore.estimating.following import (
    AGAIN_GONE,
    GONE,
    MADE,
    NODE,
    NODES_GONE,
    SCRATCH,
    STEPS,
    TENSOR_GONE,
    TENSOR_MADE,
    VIEW_MADE,
    Event,
    Operation,
    Storage,
)
from peftcore.estimating.objects import META, STORAGE, TENSOR, VERSION, VIEW_META, node

_PAGE, _PAD = 4096, 128 << 10
_LARGEST_THRESHOLD = 32 << 20
_ALIGNMENT, _LEAST = 64, 32
_CACHED, _CACHED_OF_A_SIZE = 1040, 7  # `tcache`: pieces that are kept by size when they are freed, and joined with none
_FAST, _SMALL = 128, 1024  # `fastbins` and `smallbins`: up to, and below, so many bytes
_CONSOLIDATES = 64 << 10  # a freed piece of so many bytes has the fast ones joined

_STEPS = 3  # that are simulated: where pieces lie differs between them

Piece = tuple[int, int]  # (address, size); address -1: it is mapped


class Heap:
    """The main arena. Addresses count from 0."""

    def __init__(self) -> None:
        self.threshold, self.trim = 128 << 10, 256 << 10
        self.mapped = 0
        self.end = 0  # of what was got from the system
        self.top = 0  # from here on all is free
        self.touched = 0
        self.fresh = 0  # bytes that were got from the system, all together
        self._size_at: dict[int, int] = {}  # of free pieces that may be joined, by where they begin
        self._start_at: dict[int, int] = {}  # and by where they end
        self._unsorted: dict[int, int] = {}  # those of them freed since the last search, the oldest first
        self._sizes: list[int] = []  # of the others, sorted
        self._bins: dict[int, list[int]] = {}  # and those of a size in the order of their bin
        self._cached: dict[int, list[int]] = defaultdict(list)
        self._fast: dict[int, list[int]] = defaultdict(list)
        self._fast_ones = 0
        self._remainder = -1  # of the last small request

    @property
    def resident(self) -> int:
        """Bytes that are the process's."""
        return self.mapped + self.touched

    def allocate(self, count: int) -> Piece:
        """A new piece for so many bytes (`malloc`)."""
        size = _size_for(count)
        if cached := self._cached.get(size):
            return cached.pop(), size
        return self._allocate(size)

    def allocate_aligned(self, count: int) -> Piece:
        """A new piece for so many bytes of a tensor (`posix_memalign` to 64 bytes)."""
        size = _size_for(count)
        for address in reversed(self._cached.get(size, ())):
            if (address + 16) % _ALIGNMENT == 0:
                self._cached[size].remove(address)
                return address, size
        address, found = self._allocate(_size_for(size + _ALIGNMENT + _LEAST))
        if address < 0:
            return address, found
        start = -(-(address + 16) // _ALIGNMENT) * _ALIGNMENT - 16
        if start != address:
            start += _ALIGNMENT if start - address < _LEAST else 0
            self._join(address, start - address)
        rest, behind = address + found - start - size, start + size
        if rest >= _LEAST or (rest > 0 and (behind + rest == self.top or behind + rest in self._size_at)):
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
        elif size <= _CACHED and len(cached := self._cached[size]) < _CACHED_OF_A_SIZE:
            cached.append(address)
        elif size <= _FAST:
            self._fast[size].append(address)
            self._fast_ones += 1
        else:
            self._join(address, size)

    def _allocate(self, size: int) -> Piece:
        """`_int_malloc`: a piece that was freed, of the end, or mapped."""
        if size <= _FAST and (fast := self._fast[size]):
            address = fast.pop()
            moved = min(len(fast), _CACHED_OF_A_SIZE - len(self._cached[size]))
            self._cached[size] += [fast.pop() for _ in range(moved)]
            self._fast_ones -= 1 + moved
            return address, size
        if size < _SMALL:
            if (same := self._of_size(size)) is not None:
                cached = self._cached[size]
                while len(cached) < _CACHED_OF_A_SIZE and (more := self._of_size(size)) is not None:
                    cached.append(more)
                return same, size
        elif self._fast_ones:
            self._consolidate()
        while True:
            if (just := self._sort(size)) is not None:
                return just, size
            at = bisect_left(self._sizes, size)
            if at < len(self._sizes):
                found = self._sizes[at]
                alike = self._bins[found]
                # Of a bin of the request's own the second, so that the first keeps its links; of another the last.
                address = alike[-1 if len(alike) == 1 or _bin(found) != _bin(size) else 1]
                self._take(address)
                if found - size < _LEAST:
                    return address, found
                self._give(address + size, found - size)
                if size < _SMALL:
                    self._remainder = address + size
                return address, size
            if self.end - self.top < size + _LEAST:
                if self._fast_ones:
                    self._consolidate()
                    continue
                if size >= self.threshold:
                    mapped = -(-(size + 8) // _PAGE) * _PAGE
                    self.mapped += mapped
                    self.fresh += mapped
                    return -1, mapped
                self.end += -(-(size + _PAD + _LEAST - (self.end - self.top)) // _PAGE) * _PAGE
            address = self.top
            self.top += size
            self.fresh += max(0, self.top - self.touched)
            self.touched = max(self.touched, self.top)
            return address, size

    def _of_size(self, size: int) -> int | None:
        """Of the sorted pieces of this very size the oldest."""
        alike = self._bins.get(size)
        if not alike:
            return None
        address = alike[-1]
        self._take(address)
        return address

    def _sort(self, size: int) -> int | None:
        """Sort what was freed since the last search; one of this very size is the one looked for."""
        kept = False
        while self._unsorted:
            address, found = next(iter(self._unsorted.items()))
            if size < _SMALL and address == self._remainder and len(self._unsorted) == 1 and found > size + _LEAST:
                self._take(address)
                self._remainder = address + size
                self._give(self._remainder, found - size)
                return address
            if found != size:
                del self._unsorted[address]
                self._put(address, found)
                continue
            self._take(address)
            if size > _CACHED or len(self._cached[size]) >= _CACHED_OF_A_SIZE:
                return address
            self._cached[size].append(address)
            kept = True
        return self._cached[size].pop() if kept else None

    def _join(self, address: int, size: int) -> None:
        """Make free what lies there, in one piece with its free neighbours."""
        size = self._joined(address, size)
        if size < _CONSOLIDATES:
            return
        if self._fast_ones:
            self._consolidate()
        if self.end - self.top >= self.trim:
            self.end -= (self.end - self.top - _LEAST - 1 - _PAD) // _PAGE * _PAGE
            self.touched = min(self.touched, self.end)

    def _joined(self, address: int, size: int, directly: bool = True) -> int:
        if (after := self._size_at.get(address + size)) is not None:
            self._take(address + size)
            size += after
        if (before := self._start_at.get(address)) is not None:
            self._take(before)
            address, size = before, size + address - before
        if address + size < self.top:
            self._give(address, size, directly=directly and size < _SMALL)
            return size
        self.top = address
        return self.end - address

    def _consolidate(self) -> None:
        for size, pieces in sorted(self._fast.items()):
            while pieces:
                self._joined(pieces.pop(), size, directly=False)
        self._fast_ones = 0

    def _put(self, address: int, size: int) -> None:
        alike = self._bins.setdefault(size, [])
        if not alike:
            insort(self._sizes, size)
        alike.insert(0 if size < _SMALL else 1, address)

    def _give(self, address: int, size: int, directly: bool = False) -> None:
        if directly:
            self._put(address, size)
        else:
            self._unsorted[address] = size
        self._size_at[address] = size
        self._start_at[address + size] = address

    def _take(self, address: int) -> None:
        size = self._size_at.pop(address)
        del self._start_at[address + size]
        if address in self._unsorted:
            del self._unsorted[address]
            return
        alike = self._bins[size]
        alike.remove(address)
        if not alike:
            del self._bins[size], self._sizes[bisect_left(self._sizes, size)]


def _bin(size: int) -> int:
    """Which of malloc's bins a free piece lies in (`largebin_index`)."""
    if size < _SMALL:
        return size >> 4
    for shift, most, first in ((6, 48, 48), (9, 20, 91), (12, 10, 110), (15, 4, 119), (18, 2, 124)):
        if size >> shift <= most:
            return first + (size >> shift)
    return 126


def _size_for(count: int) -> int:
    return max(_LEAST, (count + 8 + 15) & ~15)


class Held(NamedTuple):
    """Bytes that a process has at most, and those that it gets from the system in a step, some again and again."""

    most: int
    fresh: int


def held_by_process(
    storages: Sequence[Storage], operations: Sequence[Operation], events: Sequence[Event], state: str
) -> Held:
    """What a process has for these storages in such steps after the first.

    In the first one the optimizer makes its state, the storages of kind `state`, when all gradients are there. Before
    it weights were loaded, and copies of them freed.
    """
    stay = [n for n, storage in enumerate(storages) if storage.born == 0 and storage.died is None]
    heap = Heap()
    fitting = [storages[n].bytes for n in stay if storages[n].bytes <= _LARGEST_THRESHOLD]
    heap.threshold = max(heap.threshold, *fitting, 0)
    heap.trim = 2 * heap.threshold
    run = _Run(heap, storages, operations)
    for number in stay:
        if storages[number].kind != state:
            run.make(number)
    most = before = 0
    for step in range(_STEPS):
        if step == 1:
            most, before = heap.resident, heap.fresh
        for event in events:
            if event.kind == STEPS and step == 0:
                for number in stay:
                    if storages[number].kind == state:
                        run.make(number)
            elif event.kind != MADE or event.number not in run.stay:
                most = max(most, run.do(event))
        run.over()
    return Held(most, (heap.fresh - before) // (_STEPS - 1))


class _Run:
    """Events of a step, done with a heap."""

    def __init__(self, heap: Heap, storages: Sequence[Storage], operations: Sequence[Operation]) -> None:
        self.heap, self.storages, self.operations = heap, storages, operations
        self.stay: set[int] = set()
        self._data: dict[int, list[Piece]] = {}
        self._objects: dict[int, list[Piece]] = {}
        self._nodes: list[Piece] = []
        self._again: list[Piece] = []  # those of a forward that is run again

    def make(self, number: int) -> None:
        """Make a storage that stays, with its tensor."""
        self.stay.add(number)
        self.heap.allocate(STORAGE)
        self.heap.allocate_aligned(self.storages[number].bytes)
        for size in (TENSOR, VERSION):
            self.heap.allocate(size)

    def do(self, event: Event) -> int:
        """What the process has at most meanwhile."""
        heap, (kind, number, edges, leaves) = self.heap, event
        if kind == MADE:
            storage = heap.allocate(STORAGE)
            self._data[number] = [heap.allocate_aligned(self.storages[number].bytes), storage]
        elif kind == GONE:
            self._free(self._data.pop(number, []))
        elif kind == TENSOR_GONE:
            self._free(self._objects.pop(number, []))
        elif kind in (TENSOR_MADE, VIEW_MADE):
            sizes = [TENSOR, VERSION] if kind == TENSOR_MADE else [TENSOR]
            if edges:
                sizes.append(META if kind == TENSOR_MADE else VIEW_META)
            self._objects[number] = [heap.allocate(size) for size in sizes][::-1]
        elif kind == NODE:
            nodes = self._again if self.operations[number].recomputed else self._nodes
            name = self.operations[number].name
            nodes += map(heap.allocate, node(name, edges, leaves))
        elif kind == SCRATCH:
            piece = heap.allocate_aligned(self.operations[number].cost.scratch)
            most = heap.resident
            heap.free(piece)
            return most
        elif kind == AGAIN_GONE:
            self._free(self._again[::-1])
            self._again = []
        elif kind == NODES_GONE:
            self._free([*self._again[::-1], *self._nodes[::-1]])  # the loss's first
            self._again, self._nodes = [], []
        return heap.resident

    def over(self) -> None:
        """The step has ended: nothing is left of it."""
        for pieces in (self._again, self._nodes, *self._data.values(), *self._objects.values()):
            self._free(pieces)
        self._again, self._nodes, self._data, self._objects = [], [], {}, {}

    def _free(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self.heap.free(piece)
