"""Labels of examples: names (classification), numbers (regression), lists of names (multi-label)."""

from __future__ import annotations

import json
import math
from typing import Any

from peftcore.errors import PeftcoreError

Label = str | float | tuple[str, ...]  # of each


def class_name(where: str, key: str, text: str) -> str:
    """Return the name of a class, a tag or a folder of images, without spaces around it.

    Raises:
        PeftcoreError: it is empty or NaN; the message begins with `where`.
    """
    label = text.strip()  # otherwise "good" and "good " would be two classes
    if not label:
        raise PeftcoreError(f"{where}: '{key}' is empty")
    if label.lower() == "nan":
        raise PeftcoreError(
            f"{where}: '{key}' is {label}, which tables write where a value is missing. Leave the row out, or name the "
            "class differently"
        )
    return label


def number(value: Any) -> float | None:
    """Return a finite number, also from text as in CSV files; else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def names(value: Any) -> tuple[str, ...] | None:
    """Return a list of names or whole numbers, also from JSON text as in CSV files; else None."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list):
        return None
    found = [str(each).strip() for each in value if isinstance(each, (str, int)) and not isinstance(each, bool)]
    return tuple(found) if len(found) == len(value) and all(found) else None


def short(value: Any) -> str:
    """Return a value for a message, shortened."""
    return json.dumps(value, ensure_ascii=False, default=str)[:80]


def text_of(where: str, key: str, value: Any) -> str:
    """Return a field that must be text.

    Raises:
        PeftcoreError: it is not; the message begins with `where`.
    """
    if not isinstance(value, str):
        raise PeftcoreError(f"{where}: '{key}' must be text, found {short(value)}")
    return value
