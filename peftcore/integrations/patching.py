"""Patching of methods of other libraries' classes.

A patched method behaves as the original if the model has no adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peftcore.engine import state_of


def patch(cls: type, name: str, ours: Callable[..., Any], model_of: Callable[[Any], Any]) -> None:
    """Replace `cls.name` by `ours(self, original, *args, **kwargs)` for objects whose `model_of(self)` has adapters."""
    own = getattr(cls, name)

    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = model_of(self)
        if model is None or state_of(model) is None:
            return own(self, *args, **kwargs)
        return ours(self, functools.partial(own, self), *args, **kwargs)

    setattr(cls, name, method)
