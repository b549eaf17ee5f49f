"""Checks of config fields and calls that several methods share. Errors name the expected and the found value."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import PeftcoreError, nearest
from peftcore.plugin.field_types import fits, in_words, literals

_NO_DEFAULT = object()


def check_types(config: Any, fields: Mapping[str, Any] | None = None) -> None:
    """Check that the values of a dataclass have their annotated types. Call this first in `__post_init__`.

    Checked types are bool, int, float, str, None, Literal, lists, tables and unions of these. Numbers must be finite,
    an int is also a float, a bool is not a number, and any collection except a string is a list. Other annotations
    accept any value.

    Args:
        config: the dataclass, or its class.
        fields: values by name, for checks before an object exists.

    Raises:
        PeftcoreError: a value has another type.
    """
    kind = config if isinstance(config, type) else type(config)
    hints, defaults = _hints(kind), _defaults(kind)
    if fields is None:
        fields = {name: getattr(config, name) for name in defaults}
    for name, value in fields.items():
        if name in hints and value is not defaults.get(name, _NO_DEFAULT) and not fits(value, hints[name]):
            allowed_texts = [literal for literal in literals(hints[name]) if isinstance(literal, str)]
            hint = nearest(value, allowed_texts) if isinstance(value, str) else ""
            raise PeftcoreError(f"{name} must be {in_words(hints[name])}, found {shown(value)}{hint}")


def shown(value: Any) -> str:
    """Return `repr(value)`, shortened if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int may have thousands of digits
        return f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= 200 else f"{text[:200]}..."


@lru_cache(maxsize=256)
def _hints(config_class: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(config_class)
    except Exception:  # annotations that only type checkers understand
        return {}


@lru_cache(maxsize=256)
def _defaults(config_class: type) -> dict[str, Any]:
    """Return {field: default, or a marker if there is none}. Defaults are not checked."""
    fields = dataclasses.fields(config_class)
    return {f.name: _NO_DEFAULT if f.default is dataclasses.MISSING else f.default for f in fields}


def require(holds: bool, message: str) -> None:
    """Raise a PeftcoreError with `message` unless the condition `holds`."""
    if not holds:
        raise PeftcoreError(message)


def positive_whole(**fields: Any) -> None:
    """Raise a PeftcoreError unless each value is an int above 0.

    Raises:
        PeftcoreError: a value is not an int above 0.
    """
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise PeftcoreError(f"{name} must be a positive whole number, found {value!r}")


def probability(**fields: Any) -> None:
    """Raise a PeftcoreError unless each value is in [0, 1).

    Raises:
        PeftcoreError: a value is not in [0, 1).
    """
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise PeftcoreError(f"{name} must be in [0, 1), found {value!r}")


def one_of(allowed: Collection[Any], **fields: Any) -> None:
    """Raise a PeftcoreError unless each value is one of `allowed`.

    Raises:
        PeftcoreError: a value is not allowed.
    """
    for name, value in fields.items():
        if value not in allowed:
            *choices, last_choice = map(repr, allowed)
            hint = nearest(str(value), [choice for choice in allowed if isinstance(choice, str)])
            raise PeftcoreError(f"{name} must be {', '.join(choices)} or {last_choice}, found {value!r}{hint}")


def task_ids(given: Any, count: int, device: torch.device, *, on_card: bool) -> Tensor:
    """Return the `task_ids` of a call as int64 `[rows]`, or `[1]` for a single number.

    Args:
        count: the number of tasks.
        device: device of the result.
        on_card: whether to check the values of CUDA tensors as well, which synchronizes.

    Raises:
        PeftcoreError: the values are not whole numbers from 0 to count - 1.
    """
    index = torch.as_tensor(given).reshape(-1)
    is_integer = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    expected = f"task_ids must be whole numbers from 0 to {count - 1}"
    require(
        is_integer and len(index) > 0,
        f"{expected}, found {str(index.dtype).removeprefix('torch.')} {list(index.shape)}",
    )
    if not torch.compiler.is_compiling() and (on_card or index.device.type == "cpu"):
        in_range = int(index.min()) >= 0 and int(index.max()) < count
        require(
            in_range,
            f"{expected}, found {index.tolist() if len(index) <= 16 else [int(index.min()), '...', int(index.max())]}",
        )
    return index.to(device, torch.int64)
