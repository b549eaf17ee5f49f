"""Labels of examples: names (classification), numbers (regression), lists of names (multi-label)."""

from __future__ import annotations

import json
import math
from typing import Any

from peftcore.errors import PeftcoreError

Label = str | float | tuple[str, ...]  # respectively


def class_name(location: str, key: str, text: str) -> str:
    """Return the name of a class, tag or image folder without surrounding spaces.

    Raises:
        PeftcoreError: the name is empty or NaN. The message begins with `location`.
    """
    label = text.strip()  # otherwise "good" and "good " would be different classes
    if not label:
        raise PeftcoreError(f"{location}: '{key}' is empty. Remove the row, or add a label")
    if label.lower() == "nan":
        raise PeftcoreError(
            f"{location}: '{key}' is {label}, which usually stands for a missing value. Remove the row, or rename the "
            "class"
        )
    return label


def number(value: Any) -> float | None:
    """Convert a value, possibly text from a CSV file, to a finite number, or return None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def names(value: Any) -> tuple[str, ...] | None:
    """Convert a list of names or integers, possibly JSON text from a CSV file, to names, or return None."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list):
        return None
    texts = [str(item).strip() for item in value if isinstance(item, (str, int)) and not isinstance(item, bool)]
    return tuple(texts) if len(texts) == len(value) and all(texts) else None


def short(value: Any) -> str:
    """Format a value for a message, shortened to 80 characters."""
    return json.dumps(value, ensure_ascii=False, default=str)[:80]


def text_of(location: str, key: str, value: Any) -> str:
    """Return the value of a text field.

    Raises:
        PeftcoreError: the value is not text. The message begins with `location`.
    """
    if not isinstance(value, str):
        raise PeftcoreError(f"{location}: '{key}' must be text, found {short(value)}")
    return value
