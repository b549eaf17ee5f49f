"""Timing of a command. This module is imported first, so that slow imports are counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

START_TIME = time.perf_counter()


class Clock:
    """Seconds spent in each part of a run, by name."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - began

    def remaining_seconds(self) -> float:
        """Return the seconds since the start of the command that belong to no part."""
        return max(0.0, time.perf_counter() - START_TIME - sum(self.parts.values()))

    def all_parts(self) -> dict[str, float]:
        """Return the seconds of each part, and the remaining time since the start as `other`."""
        return {**self.parts, "other": self.remaining_seconds()}
