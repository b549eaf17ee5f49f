"""When the command began, and what its time is spent on: imported before everything that takes seconds to import."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

STARTED = time.perf_counter()


class Clock:
    """Seconds that the parts of a run take, by name."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - began

    def rest(self) -> float:
        """Return the seconds since the command began that are in no part."""
        return max(0.0, time.perf_counter() - STARTED - sum(self.parts.values()))

    def all(self) -> dict[str, float]:
        """Return the parts so far, with the rest as `other`; their sum is the time since the command began."""
        return {**self.parts, "other": self.rest()}
