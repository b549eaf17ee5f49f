"""Traces made by hand, with what the documented rules of PyTorch's CUDA allocator give for them."""

import pytest

from peftcore.estimating.following import Operation, Storage
from peftcore.estimating.segments import MIB, Segments, peak_reserved


def test_small_blocks_share_a_segment() -> None:
    card = Segments()
    blocks = [card.allocate(count) for count in (1, 513, MIB)]
    assert [block.size for block in blocks] == [512, 1024, MIB]
    assert card.reserved == 2 * MIB and card.allocated == 512 + 1024 + MIB
    card.allocate(MIB)  # what is left of the first is too small by 1,536 bytes
    assert card.reserved == 4 * MIB


@pytest.mark.parametrize(
    ("count", "reserved"),
    [(MIB, 2), (MIB + 1, 20), (10 * MIB - 1, 10), (9 * MIB, 20), (10 * MIB, 10), (10 * MIB + 1, 12), (33 * MIB, 34)],
)
def test_segments(count: int, reserved: int) -> None:
    """A request just below 10 MiB is rounded up to them first, as a block is."""
    card = Segments()
    card.allocate(count)
    assert card.reserved == reserved * MIB


def test_large_ones_are_split_where_more_than_a_megabyte_is_left() -> None:
    card = Segments()
    first, second = card.allocate(6 * MIB), card.allocate(13 * MIB)  # 14 MiB are left of the first's segment
    assert second.segment == first.segment and second.size == 14 * MIB and card.reserved == 20 * MIB


def test_the_smallest_that_is_large_enough_is_taken_and_neighbours_are_joined() -> None:
    card = Segments()
    a, b, c, d = (card.allocate(count * MIB) for count in (4, 8, 2, 4))
    e = card.allocate(3 * MIB)  # of another segment: 2 MiB are left of the first
    assert card.reserved == 40 * MIB and e.segment != a.segment
    card.free(b)
    card.free(a)
    assert card.allocate(12 * MIB).segment == a.segment and card.reserved == 40 * MIB
    card.free(c)
    card.free(d)
    assert card.allocate(8 * MIB).segment == a.segment and card.reserved == 40 * MIB


def test_of_a_step() -> None:
    """A weight of 30 MiB, two of 12 one after the other, and one of 25 that fits into no segment of theirs."""
    storages = [
        Storage(30 * MIB, (1,), 0),
        Storage(12 * MIB, (1,), 0, 1),
        Storage(12 * MIB, (1,), 1, 2),
        Storage(25 * MIB, (1,), 2, 3),
    ]
    operations = [Operation("a", "", "forward") for _ in range(3)]
    assert peak_reserved(storages, operations) == (30 + 12 + 26) * MIB
