"""Ranges of bytes, written as `2.1 to 2.3 GB`."""

from __future__ import annotations

from typing import NamedTuple


class Range(NamedTuple):
    """Range of bytes, from `low` to `high`."""

    low: float
    high: float

    def plus(self, count: float) -> Range:
        """Return the range with `count` added to both ends."""
        return Range(self.low + count, self.high + count)

    def holds(self, count: float) -> bool:
        """Return whether `count` is within the range."""
        return self.low <= count <= self.high

    def __str__(self) -> str:
        unit, scale = ("MB", 1e6) if self.high < 1e8 else ("GB", 1e9)
        digits = 1 if self.high >= 2e9 or unit == "MB" else 2
        low, high = (f"{end / scale:,.{digits}f}" for end in self)
        return f"{high} {unit}" if low == high else f"{low} to {high} {unit}"
