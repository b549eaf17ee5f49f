"""Held-out examples of one data set and of several."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st
from peftcore_cli.data import holdout
from peftcore_cli.data.disk_list import DiskList
from peftcore_cli.data.row import Row

from peftcore import PeftcoreError


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_divides(count: int, share: float, seed: int) -> None:
    rows = [Row(f"f:{i}", str(i)) for i in range(count)]
    rest, held = map(list, holdout.split(DiskList(rows), share, seed))
    assert sorted(rest + held, key=lambda row: int(row.text)) == rows
    assert 1 <= len(held) < count and [rest, held] == list(map(list, holdout.split(DiskList(rows), share, seed)))
    assert abs(len(held) - share * count) <= 1


def test_refusals() -> None:
    with pytest.raises(PeftcoreError, match="cannot split a single example"):
        holdout.split(DiskList([Row("f:1", "a")]), 0.5, 0)
    with pytest.raises(PeftcoreError, match=r"between 0 and 1, .* found 0\."):
        holdout.split(DiskList([Row("f:1", "a")] * 3), 0, 0)
    with pytest.raises(PeftcoreError, match="leaves no examples to train on: the data has 3"):
        holdout.split(DiskList([Row("f:1", "a")] * 3), 3, 0)


def test_counts() -> None:
    rows = DiskList(Row(f"f:{i}", str(i)) for i in range(9))
    assert [len(holdout.split(rows, count, 0)[1]) for count in (1, 2.0, 8)] == [1, 2, 8]


def test_which_rows_are_held_out() -> None:
    rows = [Row("a:1", "x"), Row("a:3", "x"), Row("b:2", "x"), Row("good/1.png", "")]
    assert holdout.describe(rows, 40) == "4 of 40 examples (a:1, 3, b:2, good/1.png)"
    many = [Row(f"a:{i}", "x") for i in range(12)]
    assert holdout.describe(many, 1200) == "12 of 1,200 examples (a:0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)"


def of_sets(*sizes: int) -> list[Row]:
    return [Row(f"f{source}:{i}", "a", source=source) for source, size in enumerate(sizes) for i in range(size)]


@pytest.mark.parametrize(
    ("sizes", "amount", "wanted"),
    [
        ((90, 10, 2, 1), 0.1, [9, 1, 1, 0]),
        ((1, 1, 1), 0.5, [1, 0, 0]),
        ((90, 10), 10, [9, 1]),
        ((90, 3, 1), 4, [3, 1, 0]),
        ((5, 5, 5), 2, [1, 1, 0]),
        ((1, 2), 2, [1, 1]),
    ],
)
def test_each_data_set_has_its_share(sizes: tuple[int, ...], amount: float, wanted: list[int]) -> None:
    rows = of_sets(*sizes)
    for seed in range(5):
        rest, held = holdout.split(DiskList(rows), amount, seed)
        assert [sum(row.source == i for row in held) for i in range(len(sizes))] == wanted
        assert sorted([*rest, *held], key=rows.index) == rows
