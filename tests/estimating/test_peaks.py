"""Peaks of a process, counted by hand."""

import pytest

from peftcore.estimating.costs import PLAIN, Cost, retained_bytes
from peftcore.estimating.following import Operation, Storage
from peftcore.estimating.peaks import LARGE, Peaks, held, peaks
from peftcore.ops import extension


def operation(scratch: int = 0) -> Operation:
    return Operation("aten::mm", "", "forward", Cost(scratch=scratch))


def test_peaks_of_large_and_small_tensors_fall_at_different_times() -> None:
    storages = [
        Storage(100, (1,), 0),  # a weight
        Storage(LARGE, (1,), 0),  # a large weight
        Storage(LARGE + 8, (1,), 0, 2),  # logits
        Storage(60, (1,), 1, kind="gradients"),
        Storage(LARGE, (1,), 3, kind="gradients"),
        Storage(500, (1,), 2, 3),
    ]
    found = peaks(storages, [operation(), operation(30), operation(), operation()])
    assert found == Peaks(2 * LARGE + 8 + 100 + 60 + 30, 2 * LARGE + 8, 100 + 60 + 500, 560, 60, 500)
    assert peaks([], [operation(LARGE)]) == Peaks(LARGE, LARGE, 0, 0, 0, 0)


def test_code_that_onednn_keeps_for_the_shapes_of_products() -> None:
    def product(columns: int, products: int = 1) -> Cost:
        return Cost(product=(8, 16, columns, PLAIN), products=products)

    code = retained_bytes([product(32)])
    assert code > 0 and retained_bytes([product(32), product(32)]) == code
    assert retained_bytes([product(32), product(48), Cost(kept=100), Cost(kept=70)]) == 2 * code + 100
    # With the extension the products of experts are computed by its kernels, for which oneDNN keeps nothing.
    assert retained_bytes([product(32, products=4)]) == (0 if extension is not None else 4 * code)


def test_holes_of_the_heap_widen_the_range() -> None:
    found = Peaks(1_000_000_000, 600_000_000, 500_000_000, 400_000_000, 50_000_000, 20_000_000)
    assert held(found) == pytest.approx((990e6 + 20e6, 1_180e6 + 208e6 + 26.5e6 + 30e6))
    assert held(Peaks(10, 0, 10, 10, 0, 0)).low == 0


def test_a_measured_peak_is_within_the_range() -> None:
    """Llama of 8 layers and hidden size 768, every parameter with SGD, batch 8 x 64 in fp32: 1,259 MB."""
    found = Peaks(1_030_000_000, 614_000_000, 472_000_000, 264_000_000, 208_000_000, 6_300_000)
    assert held(found).plus(7_000_000).holds(1_259_000_000)
