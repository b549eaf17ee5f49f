"""sentence-transformers on a model with adapters: it refuses to save what it could not load again.

It would write the base with the adapters' tensors inside, and its load would ignore these.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from peftcore.engine import state_of
from peftcore.errors import PeftcoreError

_PATCHED = "_peftcore"


def patch_model(model: nn.Module) -> None:
    """Make the class of `model` refuse to save a model with adapters."""
    for name in ("save", "save_pretrained"):
        owner: Any = next((cls for cls in type(model).__mro__ if name in vars(cls)), None)
        if owner is not None and owner.__module__.partition(".")[0] == "sentence_transformers":
            own = vars(owner)[name]
            if not hasattr(own, _PATCHED):
                setattr(owner, name, _refusing(own))


def _refusing(own: Any) -> Any:
    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if state is not None:
            raise PeftcoreError(
                f"{type(self).__name__} would be saved in a form that it cannot load, with adapters "
                f"{', '.join(state.applied)}. Save the adapters with peftcore.save(model, folder), in "
                "training with save_strategy='no', or merge them first: peftcore.merge(model, keep_adapters=False)"
            )
        return own(self, *args, **kwargs)

    setattr(method, _PATCHED, True)
    return method
