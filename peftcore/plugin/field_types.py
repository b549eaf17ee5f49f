"""Types of config fields, from their annotations: check values, and describe types in words.

Does not import PyTorch, so that the command line can read and describe fields before PyTorch is loaded.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, Union

_ENTRIES = 100_000  # maximum number of entries of a list or table
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", type(None): "None"}


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the type of an annotation, by the rules of `check_types`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        # 1 equals True: types are compared as well.
        return any(type(value) is type(allowed) and value == allowed for allowed in parts)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and _is_number(value)
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Collection):
        return _collection_fits(value, kind, parts)
    return True


def _collection_fits(value: Any, kind: type[Collection[Any]], parts: tuple[Any, ...]) -> bool:
    """Return whether a value is a list or table (`kind`) with entries of the types `parts`."""
    if not isinstance(value, Collection) or isinstance(value, (str, bytes)) or len(value) > _ENTRIES:
        return False
    if issubclass(kind, Mapping) != isinstance(value, Mapping):
        return False
    if isinstance(value, Mapping):
        columns: tuple[Collection[Any], ...] = (value.keys(), value.values())
        return all(_entries_fit(entries, part) for part, entries in zip(parts, columns, strict=False))
    return not parts or _entries_fit(value, parts[0])


def _entries_fit(entries: Collection[Any], hint: Any) -> bool:
    if hint is str:  # compared by type at once, because lists of names are long
        return {*map(type, entries)} <= {str} or all(isinstance(entry, str) for entry in entries)
    return all(fits(entry, hint) for entry in entries)


def literals(hint: Any) -> list[Any]:
    """Return the values in a `Literal` hint."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return list(parts)
    values: list[Any] = []
    for part in parts:
        values += literals(part)
    return values


def _is_number(value: int | float) -> bool:
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    return math.isfinite(value)


def in_words(hint: Any) -> str:
    """Return the type that an annotation names, such as `a whole number or None`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(part) for part in parts)
    if origin is Literal:
        *names, last_name = map(repr, parts)
        return f"{', '.join(names)} or {last_name}" if names else last_name
    kind = origin or hint
    if kind not in _WORDS and isinstance(kind, type) and issubclass(kind, Collection):
        kind_name = "table" if issubclass(kind, Mapping) else "list"
        part_names = [in_words(part).removeprefix("a ") for part in parts if part not in (Any, Ellipsis)]
        return f"a {kind_name}" + (f" ({' to '.join(part_names)})" if part_names else "")
    return _WORDS.get(hint, str(hint))
