"""The work of calls, counted in lines of Python rather than timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def lines(call: Callable[[], object]) -> int:
    """Return how many lines of Python `call` runs in this thread; each pass of a loop counts."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def growth(call: Callable[[int], Callable[[], object]], size: int) -> float:
    """Return how many times more lines `call(2 * size)` runs than `call(size)`, beyond those of `call(0)`.

    2 for work that grows with the size, 4 for work that grows with its square.
    """
    none, once, twice = (lines(call(each)) for each in (0, size, 2 * size))
    return (twice - none) / (once - none)
