"""Changes of the inputs that a model class is given, registered by the names of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peftcore.model.inputs import Facts

Change = Callable[[dict[str, Any], Facts], dict[str, Any]]
CHANGES: list[tuple[str, Change]] = []


def of(*names: str) -> Callable[[Change], Change]:
    """Register a change of the inputs of classes whose whole name one of the regular expressions matches."""

    def register(change: Change) -> Change:
        CHANGES.append(("|".join(names), change))
        return change

    return register
