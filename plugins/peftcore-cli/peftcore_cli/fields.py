"""`--set NAME=VALUE`: parse fields of a method's config by the types of its dataclass.

`none`, `true`, `false` and numbers are converted if the type allows them. Sequences are separated by commas
(`q_proj,v_proj`), and mappings are `name:value` pairs. Both may also be JSON. If a field takes text or a sequence, a
value with special characters of regular expressions is text, and a bare name is a sequence with one element.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from typing import Any

from peftcore.errors import PeftcoreError, nearest_field
from peftcore.plugin import fits, in_words

_WORDS = {"none": None, "null": None, "true": True, "false": False}


def parse(config_class: type, settings: list[str], option: str = "--set") -> dict[str, Any]:
    """Parse `NAME=VALUE` settings into fields of `config_class`. Errors name `option`.

    Raises:
        PeftcoreError: a setting has no `=`, an unknown field or the wrong type, or a field is set twice.
    """
    hints = typing.get_type_hints(config_class)
    field_names = [field.name for field in dataclasses.fields(config_class) if field.init]
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals:
            raise PeftcoreError(f"{option} must be NAME=VALUE, found '{setting}'")
        if name not in field_names:
            raise PeftcoreError(
                f"{option} {setting}: {config_class.__name__} has no field '{name}'{nearest_field(name, field_names)}. "
                f"Its fields: {', '.join(field_names)}"
            )
        if name in values:
            raise PeftcoreError(f"{option} {setting}: '{name}' is set twice. Remove one of the settings")
        try:
            values[name] = convert(text.strip(), hints[name])
        except (ValueError, RecursionError):
            message = f"{option} {setting}: '{name}' takes {describe(hints[name])}, found '{text}'"
            raise PeftcoreError(message if len(message) < 1_000 else f"{message[:500]}...") from None
    return values


def convert(text: str, hint: Any) -> Any:
    """Convert `text` to the type `hint`, with the most specific interpretation that fits.

    Raises:
        ValueError: no interpretation fits.
    """
    for value in _interpretations(text, hint):
        if fits(value, hint):
            return value
    raise ValueError(text)


def text_of(value: Any) -> str:
    """Format a value as text that `convert` turns back into the value."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, default=str)


def describe(hint: Any) -> str:
    """Describe the type `hint` in words, including the notation of lists and tables."""
    words = in_words(hint)
    hints = [notation for kind, notation in (("a list", "a,b"), ("a table", "name:value,...")) if kind in words]
    return f"{words} (written {' or '.join(hints)})" if hints else words


def _interpretations(text: str, hint: Any) -> Iterator[Any]:
    """Yield the possible values of `text`, the most specific first."""
    yield from _scalars(text)
    if hint is Any:
        yield text
        return
    if text[:1] in ("[", "{"):
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(text)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    lists = [[_scalar(part) for part in parts], parts] if parts else []
    table = {}
    for part in parts:
        key, _, value = part.rpartition(":")
        table[key.strip()] = value.strip()
    tables = [{key: _scalar(value) for key, value in table.items()}, table] if table and "" not in table else []
    yield from [*lists, text, *tables] if _looks_like_names(text) else [text, *tables, *lists]


def _scalars(text: str) -> Iterator[Any]:
    """Yield the possible scalar values of `text`, except for `text` itself."""
    if text.lower() in _WORDS:
        yield _WORDS[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            yield kind(text)


def _scalar(text: str) -> Any:
    return next(_scalars(text), text)


def _looks_like_names(text: str) -> bool:
    """Return whether a value for a field that takes text or a list is a list of names."""
    if re.search(r"[\\()\[\]{}*+?|^$]", text):
        return False
    return "," in text or re.fullmatch(r"[A-Za-z_][\w.]*", text) is not None
