"""Support accelerate's offloading (`dispatch_model`, `cpu_offload`, `disk_offload`) of a model with adapters.

An offloaded module has its weights only during a call, so their gradients would be lost. Adapters, and modules with
parameters that an adapter trains, stay in memory, so that they can be trained and saved.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from accelerate import big_modeling, hooks
from accelerate.utils import offload
from torch import Tensor, nn

from peftcore.engine import state_of
from peftcore.engine.adaptation.adapted import Adapters
from peftcore.engine.trained_parameters import all_of

_STAY: ContextVar[frozenset[int]] = ContextVar("_STAY", default=frozenset())  # modules of the model being offloaded


def _staying(model: nn.Module) -> frozenset[int]:
    staying = {id(module) for module in model.modules() if isinstance(module, Adapters)}
    for _, owned in all_of(model):
        staying.update(id(module) for module in owned.owners(model))
    return frozenset(staying)


def _patch(name: str) -> None:
    """Patch a function that attaches hooks to a module and recurses into its children."""
    original: Callable[..., None] = getattr(hooks, name)

    @functools.wraps(original)
    def attach(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        token = None if state_of(module) is None else _STAY.set(_staying(module))
        try:
            if id(module) in _STAY.get():
                original(module, *args[:1], **{**kwargs, "offload": False})
            else:
                original(module, *args, **kwargs)
        finally:
            if token is not None:
                _STAY.reset(token)

    for library in (hooks, big_modeling):
        if hasattr(library, name):
            setattr(library, name, attach)


_offload_weight: Callable[..., Any] = offload.offload_weight


@functools.wraps(_offload_weight)
def _write(weight: Tensor, weight_name: str, offload_folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """Write a tensor to a file named after it, creating folders if the name contains "/" (modules_to_save)."""
    os.makedirs(os.path.dirname(os.path.join(offload_folder, weight_name)), exist_ok=True)
    return _offload_weight(weight, weight_name, offload_folder, *args, **kwargs)


offload.offload_weight = _write
for _name in ("attach_align_device_hook", "attach_align_device_hook_on_blocks"):
    _patch(_name)
