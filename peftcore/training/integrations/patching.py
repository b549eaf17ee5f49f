"""Replace a method of another library's class once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_PATCHED = "_peftcore_patched"  # attribute of the function that replaces a method


def replace(cls: type, name: str, replacement: Callable[..., Any]) -> None:
    """Replace the method `cls.name`, which `cls` itself defines, by `ours(self, original, *args, **kwargs)`, once."""
    original = vars(cls)[name]
    if hasattr(original, _PATCHED):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, functools.partial(original, self), *args, **kwargs)

    setattr(method, _PATCHED, True)
    setattr(cls, name, method)
