"""Events that lower packages emit and higher packages subscribe to, so that no package imports a higher one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Event:
    """An event with its subscribers, which are called in the order of subscription."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[..., Any]] = []

    def subscribe(self, function: Callable[..., Any]) -> None:
        """Call `function` with the event's arguments each time it is emitted."""
        self._subscribers.append(function)

    def announce(self, *facts: Any) -> None:
        """Call all subscribers with the arguments `facts`."""
        for function in self._subscribers:
            function(*facts)


adapter_applied = Event()  # (model): an adapter was applied
vocabulary_resizes = Event()  # (model or part of it, the embedding and head that are about to be resized)
adapter_names_given = Event()  # (model, adapter names of a call's samples, function that takes their activation)
