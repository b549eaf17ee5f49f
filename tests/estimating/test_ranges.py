"""Ranges of bytes and how they are written."""

import pytest

from peftcore.estimating import Range


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Range(2.06e9, 2.31e9), "2.1 to 2.3 GB"),
        (Range(1.204e9, 1.312e9), "1.20 to 1.31 GB"),
        (Range(0.96e9, 1.04e9), "0.96 to 1.04 GB"),
        (Range(20.01e9, 20.04e9), "20.0 GB"),
        (Range(51.2e6, 63.1e6), "51.2 to 63.1 MB"),
    ],
)
def test_text(found: Range, text: str) -> None:
    assert str(found) == text


def test_plus_and_holds() -> None:
    assert Range(2.0, 3.0).plus(1.5) == (3.5, 4.5)
    assert [Range(2.0, 3.0).holds(count) for count in (1, 2, 3, 4)] == [False, True, True, False]
