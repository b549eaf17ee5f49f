"""glibc's malloc, simulated: what is mapped, what is used again, and what lies in vain between others."""

import random
import struct
import zlib

from peftcore.estimating.following import GONE, MADE, STEPS, Event, Storage
from peftcore.estimating.heap import Heap, held_by_process

MIB = 1 << 20


def test_places_are_those_of_glibc() -> None:
    """Where glibc 2.41 put 2,034 requests: a C program made the same ones, after its own first and a mapped piece."""
    heap, draw = Heap(), random.Random(0)
    for count in (0x288, 24, 472):  # malloc's own, and the program's
        heap.allocate(count)
    heap.free(heap.allocate(9_600_000))
    sizes = (8, 24, 40, 100, 176, 480, 900, 2000, 30_000, 200_000, 1_000_000)
    live: list[tuple[int, int]] = []
    places = []
    for _ in range(4000):
        if live and draw.random() < 0.48:
            heap.free(live.pop(draw.randrange(len(live))))
            continue
        count = draw.choice(sizes) + 8 * draw.randrange(9)
        aligned = count > 300 and draw.random() < 0.7
        live.append(heap.allocate_aligned(count) if aligned else heap.allocate(count))
        places.append(live[-1][0] + 16)
    assert (len(places), places[:3], places[-1], max(places)) == (2034, [1216, 2176, 4288], 461_376, 18_272_256)
    assert zlib.crc32(struct.pack(f"<{len(places)}q", *places)) == 2_118_323_571


def test_large_pieces_are_mapped_until_one_was_freed() -> None:
    heap = Heap()
    first = heap.allocate_aligned(4 * MIB)
    assert first[0] == -1 and heap.touched == 0 and 4 * MIB < heap.resident < 4 * MIB + 8192
    heap.free(first)
    assert heap.resident == 0 and heap.threshold > 4 * MIB
    assert heap.allocate_aligned(3 * MIB)[0] >= 0 and heap.mapped == 0


def test_a_freed_tensor_leaves_no_room_for_one_of_its_size() -> None:
    """112 bytes more are looked for, which are there where the neighbour is free as well."""
    heap = Heap()
    heap.threshold = heap.trim = 32 * MIB
    first, node, second = heap.allocate_aligned(MIB), heap.allocate(472), heap.allocate_aligned(MIB)
    heap.allocate(472)
    heap.free(first)
    third = heap.allocate_aligned(MIB)
    assert third[0] > second[0] and third[0] % 64 == 48  # beside a header of 16 bytes
    heap.free(node)  # it stays with its size's pieces
    assert heap.allocate_aligned(MIB)[0] > third[0]
    heap.free(second)
    assert heap.allocate(472) == node
    top = heap.top
    assert heap.allocate_aligned(MIB - 4096)[0] < second[0] + MIB and heap.top == top


def test_the_end_is_given_back() -> None:
    heap = Heap()
    heap.threshold, heap.trim = 32 * MIB, 8 * MIB
    pieces = [heap.allocate_aligned(3 * MIB) for _ in range(4)]
    most = heap.resident
    heap.free(pieces.pop())
    assert heap.resident == most
    for piece in reversed(pieces):
        heap.free(piece)
    assert heap.resident < 4 * MIB < 12 * MIB < most  # less than 8 MiB at the end stay


def test_what_stays_is_made_once_and_state_before_the_first_update() -> None:
    """State comes when the gradient is there; the hole that this leaves is too small for the next one by 112 bytes."""
    storages = [
        Storage(MIB, (1,), 0, None, "base"),
        Storage(3 * MIB, (1,), 0, None, "state"),
        Storage(2 * MIB, (1,), 1, 2, "gradients"),
    ]
    events = [Event(MADE, 2), Event(STEPS), Event(GONE, 2)]
    held = held_by_process(storages, [], events, "state")
    assert 8 * MIB < held.most < 8.5 * MIB and MIB <= held.fresh < 1.5 * MIB
