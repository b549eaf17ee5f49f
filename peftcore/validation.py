"""Checks of config fields that several methods make. Each names the field, what it takes and what was found."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peftcore.errors import PeftcoreError, nearest


def require(holds: bool, message: str) -> None:
    """Raise a PeftcoreError with `message` unless something `holds`."""
    if not holds:
        raise PeftcoreError(message)


def positive_whole(**fields: Any) -> None:
    """Each value is an int above 0.

    Raises:
        PeftcoreError: one is not.
    """
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise PeftcoreError(f"{name} must be a positive whole number, found {value!r}")


def probability(**fields: Any) -> None:
    """Each value is in [0, 1).

    Raises:
        PeftcoreError: one is not.
    """
    for name, value in fields.items():
        if not 0 <= value < 1:
            raise PeftcoreError(f"{name} must be in [0, 1), found {value!r}")


def one_of(allowed: Collection[Any], **fields: Any) -> None:
    """Each value is one of `allowed`.

    Raises:
        PeftcoreError: one is not.
    """
    for name, value in fields.items():
        if value not in allowed:
            *first, last = map(repr, allowed)
            hint = nearest(str(value), [known for known in allowed if isinstance(known, str)])
            raise PeftcoreError(f"{name} must be {', '.join(first)} or {last}, found {value!r}{hint}")
