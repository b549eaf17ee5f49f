"""How a class of another library is taught of adapters.

Each method that is taught asks first whether adapters stand on the model, and is the library's own where none does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peftcore.engine import state_of


def patch(cls: type, name: str, ours: Callable[..., Any], model_of: Callable[[Any], Any]) -> None:
    """Let `cls.name` be `ours(self, own, *args, **kwargs)` where `model_of(self)` has adapters; `own` is its own."""
    own = getattr(cls, name)

    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = model_of(self)
        if model is None or state_of(model) is None:
            return own(self, *args, **kwargs)
        return ours(self, functools.partial(own, self), *args, **kwargs)

    setattr(cls, name, method)
