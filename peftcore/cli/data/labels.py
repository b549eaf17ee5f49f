"""Labels of examples: names (classification), numbers (regression), lists of names (multi-label)."""

from __future__ import annotations

import json
import math
from typing import Any

from peftcore.cli.task_names import MULTI_LABEL, REGRESSION
from peftcore.errors import PeftcoreError

Label = str | float | tuple[str, ...]  # of each


def parsed(where: str, key: str, value: Any, task: str) -> Label:
    """Return the label as the file has it, checked for `task`.

    Raises:
        PeftcoreError: it is not a label; the message begins with `where`.
    """
    if task == REGRESSION:
        found = number(value)
        if found is None:
            raise PeftcoreError(f"{where}: '{key}' must be a number, found {short(value)}")
        return found
    if task == MULTI_LABEL:
        listed = names(value)
        if listed is None:
            raise PeftcoreError(f'{where}: \'{key}\' must be a list of names, such as ["a", "b"], found {short(value)}')
        several = tuple(class_name(where, key, name) for name in listed)
        twice = next((name for name in several if several.count(name) > 1), None)
        if twice is not None:
            raise PeftcoreError(
                f"{where}: '{key}' names {twice} twice: {short(value)}. List the labels that apply, not zeros "
                "and ones for all of them"
            )
        return several
    if not isinstance(value, (int, str)):
        raise PeftcoreError(f"{where}: '{key}' must be text, found {short(value)}")
    return class_name(where, key, str(value))


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


def tagged_words(where: str, keys: tuple[str, str], words: Any, tags: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (words, tags) of a row.

    Raises:
        PeftcoreError: they are not lists of one length, or a tag is NaN; the message begins with `where`.
    """
    found = [names(each) for each in (words, tags)]
    for key, value, each in zip(keys, (words, tags), found, strict=True):
        if not each or any(len(name.split()) != 1 for name in each):
            raise PeftcoreError(f"{where}: '{key}' must be a list of words without spaces, found {short(value)}")
    if len(found[0] or ()) != len(found[1] or ()):
        raise PeftcoreError(
            f"{where}: '{keys[0]}' has {len(found[0] or ())} words, but '{keys[1]}' has {len(found[1] or ())} tags"
        )
    return found[0] or (), tuple(class_name(where, keys[1], tag) for tag in found[1] or ())


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
