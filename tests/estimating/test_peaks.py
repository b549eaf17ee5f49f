"""Peaks of a process, counted by hand."""

from peftcore.estimating.costs import Cost
from peftcore.estimating.following import Operation, Storage
from peftcore.estimating.peaks import LARGE, Peaks, held, peaks


def operation(scratch: int = 0) -> Operation:
    return Operation("aten::mm", "", "forward", Cost(scratch=scratch))


def test_peaks_of_large_and_small_tensors_fall_at_different_times() -> None:
    storages = [
        Storage(100, (1,), 0),  # a weight
        Storage(LARGE, (1,), 0),  # a large weight
        Storage(LARGE + 8, (1,), 0, 2),  # logits
        Storage(60, (1,), 1),  # a gradient
        Storage(500, (1,), 2, 3),
    ]
    found = peaks(storages, [operation(), operation(30), operation(), operation()])
    assert found == Peaks(2 * LARGE + 8 + 100 + 60 + 30, 2 * LARGE + 8, 100 + 60 + 500, 560)
    assert peaks([], [operation(LARGE)]) == Peaks(LARGE, LARGE, 0, 0)


def test_holes_of_the_heap_widen_the_range() -> None:
    found = Peaks(1_000_000_000, 600_000_000, 500_000_000, 400_000_000)
    exact, wide = held(found, 0.0), held(found, 0.5)
    assert exact.low < 1_000_000_000 < 1_100_000_000 < exact.high
    assert exact.low < wide.low < 1_100_000_000 and wide.high - exact.high > wide.low - exact.low > 0
    assert held(Peaks(10, 0, 10, 10), 0.5).low == 0
