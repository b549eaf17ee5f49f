"""`--set NAME=VALUE`: fields of a method's config from text, by the types of its dataclass.

`none`, `true`/`false` and numbers are converted if the type allows them; sequences are separated by commas
(`q_proj,v_proj`), mappings are `name:value` pairs; both may be JSON. If a field takes text or a sequence, text with
special characters of a regular expression stays text, and a single bare name is a sequence of one.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import re
import types
import typing
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from peftcore.errors import PeftcoreError, nearest

_SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping)
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}


def parse(config_class: type, settings: list[str]) -> dict[str, Any]:
    """Return the fields that `settings` (`NAME=VALUE` each) set on `config_class`.

    Raises:
        PeftcoreError: a setting has no `=`, names no field, is given twice, or has the wrong type.
    """
    hints = typing.get_type_hints(config_class)
    known = [field.name for field in dataclasses.fields(config_class) if field.init]
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals:
            raise PeftcoreError(f"--set {setting}: expected NAME=VALUE")
        if name not in known:
            raise PeftcoreError(
                f"--set {setting}: {config_class.__name__} has no field '{name}'{nearest(name, known)}. "
                f"Its fields: {', '.join(known)}"
            )
        if name in values:
            raise PeftcoreError(f"--set {setting}: '{name}' is given twice")
        try:
            values[name] = convert(text.strip(), hints[name])
        except (ValueError, RecursionError):
            said = f"--set {setting}: '{name}' takes {describe(hints[name])}, found '{text}'"
            raise PeftcoreError(said if len(said) < 1_000 else f"{said[:500]}...") from None
    return values


def convert(text: str, hint: Any) -> Any:
    """Convert `text` to the type `hint`.

    Raises:
        ValueError: it cannot be converted.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_to_take(text, sorted(arguments, key=lambda member: _order(text, member)))
    if origin is Literal:
        return (
            next(value for value in arguments if str(value) == text) if text in map(str, arguments) else _refuse(text)
        )
    if hint is type(None):
        return None if text.lower() in ("none", "null") else _refuse(text)
    if hint is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _refuse(text)
    if hint in (int, float):
        return hint(text)
    if (origin or hint) in _MAPPINGS:
        return _mapping(text, arguments or (str, Any))
    if (origin or hint) in _SEQUENCES:
        return _sequence(text, arguments[0] if arguments else str)
    if hint is Any:
        return _first_to_take(text, (type(None), bool, int, float, str))
    return text


def text_of(value: Any) -> str:
    """Return a value as text that `convert` turns back into the value."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, default=str)


def describe(hint: Any) -> str:
    """Describe the type `hint` in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if (origin or hint) in _MAPPINGS:
        return "pairs name:value separated by commas"
    if (origin or hint) in _SEQUENCES:
        item = _TYPE_NAMES.get(arguments[0], "values") if arguments else "text"
        return {"text": "names separated by commas", "a whole number": "whole numbers separated by commas"}.get(
            item, "values separated by commas"
        )
    return _TYPE_NAMES.get(hint, "text")


def _order(text: str, member: Any) -> int:
    """Return the order in which members of a union are tried."""
    kind = get_origin(member) or member
    if kind in _SEQUENCES:
        return 5 if _looks_like_sequence(text) else 8
    order = (type(None), bool, int, float, Literal)
    return order.index(kind) if kind in order else 6 if kind in _MAPPINGS else 7


def _looks_like_sequence(text: str) -> bool:
    if text.startswith("[") and text.endswith("]") and '"' in text:
        return True
    if re.search(r"[\\()\[\]{}*+?|^$]", text):
        return False
    return "," in text or re.fullmatch(r"[A-Za-z_][\w.]*", text) is not None


def _first_to_take(text: str, hints: collections.abc.Iterable[Any]) -> Any:
    for hint in hints:
        try:
            return convert(text, hint)
        except ValueError:
            continue
    return _refuse(text)


def _sequence(text: str, item: Any) -> list[Any]:
    if text.startswith("["):
        values = json.loads(text)  # JSONDecodeError is a ValueError
        return [convert(str(value), item) for value in values]
    return [convert(part.strip(), item) for part in text.split(",") if part.strip()] or _refuse(text)


def _mapping(text: str, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if text.startswith("{"):
        pairs = [(key, json.dumps(value) if not isinstance(value, str) else value) for key, value in _json_pairs(text)]
    else:
        pairs = [part.rpartition(":")[::2] for part in text.split(",") if part.strip()]
    if not pairs or not all(key.strip() for key, _ in pairs):
        _refuse(text)
    return {convert(key.strip(), arguments[0]): convert(value.strip(), arguments[1]) for key, value in pairs}


def _json_pairs(text: str) -> list[tuple[str, Any]]:
    value = json.loads(text)
    return list(value.items()) if isinstance(value, dict) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)
