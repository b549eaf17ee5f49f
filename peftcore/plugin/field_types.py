"""Types of config fields, as their annotations name them: whether a value fits, and the type in words.

Free of PyTorch, so that the command line can read and describe fields before PyTorch is loaded.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, Union

_ENTRIES = 100_000  # most entries of a list or table
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", type(None): "None"}


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the type of an annotation, by the rules of `check_types`."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inside)
    if origin is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in inside)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and _is_number(value)
    kind = origin or hint
    if not isinstance(kind, type) or not issubclass(kind, Collection):
        return True
    if not isinstance(value, Collection) or isinstance(value, (str, bytes)) or len(value) > _ENTRIES:
        return False
    if issubclass(kind, Mapping) or isinstance(value, Mapping):
        if not (issubclass(kind, Mapping) and isinstance(value, Mapping)):
            return False
        pairs = zip(inside, (list(value.keys()), list(value.values())), strict=False)
        return all(fits(each, hint) for hint, values in pairs for each in values)
    if not inside or (inside[0] is str and {*map(type, value)} <= {str}):
        return True
    return all(fits(each, inside[0]) for each in value)


def literals(hint: Any) -> list[Any]:
    """Return the values in a `Literal` hint."""
    inside = typing.get_args(hint)
    return list(inside) if typing.get_origin(hint) is Literal else [each for part in inside for each in literals(part)]


def _is_number(value: int | float) -> bool:
    return -(1 << 63) <= value < 1 << 63 if isinstance(value, int) else math.isfinite(value)


def in_words(hint: Any) -> str:
    """Return the type that an annotation names, such as `a whole number or None`."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(each) for each in inside)
    if origin is Literal:
        *first, last = map(repr, inside)
        return f"{', '.join(first)} or {last}" if first else last
    kind = origin or hint
    if kind not in _WORDS and isinstance(kind, type) and issubclass(kind, Collection):
        what = "table" if issubclass(kind, Mapping) else "list"
        of = [in_words(each).removeprefix("a ") for each in inside if each not in (Any, Ellipsis)]
        return f"a {what}" + (f" ({' to '.join(of)})" if of else "")
    return _WORDS.get(hint, str(hint))
