"""What happens in one room and concerns rooms above it: the lower one announces it, and knows none that listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Event:
    """A list of functions that are called, in their order, when it happens."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[..., Any]] = []

    def subscribe(self, function: Callable[..., Any]) -> None:
        """Call `function` with the event's facts whenever it happens from now on."""
        self._subscribers.append(function)

    def announce(self, *facts: Any) -> None:
        """It has happened."""
        for function in self._subscribers:
            function(*facts)


adapter_applied = Event()  # (model): an adapter stands on it, its first or one more
vocabulary_resizes = Event()  # (model or part of it, its embedding and head that are about to get other sizes)
adapters_wanted = Event()  # (model, names, those that must stay): they are about to be used, and may rest on disk
adapter_names_given = Event()  # (model, adapter names of a call's samples, function that takes their activation)
