"""A model without what peftcore put there: its modules, its parameters, and their classes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CHILD = "peftcore"  # the child module of an adapted module that holds its adapters
TRAINED = "peftcore_trained"  # the child of the model that keeps the values of `Train` placements
ROWS = "_peftcore_rows"  # attribute of an adapted module: its `Rows`, or a string that says why they are not known
OWN_FORWARD = "_peftcore_own_forward"  # attribute of an adapted module: the forward of this one instance
_WRAPPED = "_checkpoint_wrapped_module"  # the one child of PyTorch's wrapper for activation checkpointing

_WALKED = threading.local()  # .model: (a model whose modules this thread does not change now, its `base_modules`)


@contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """Look the modules of `model` up once for the whole block, in which none is added or removed."""
    before = getattr(_WALKED, "model", None)
    if before is None or before[0] is not model:
        _WALKED.model = model, _walk(model, "")
    try:
        yield
    finally:
        _WALKED.model = before


def base_modules(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Return (path, module) of the model itself, without what peftcore put there; a shared module once."""
    walked = getattr(_WALKED, "model", None)
    if walked is not None and walked[0] is model and not prefix:
        found: list[tuple[str, nn.Module]] = walked[1]
        return found
    return _walk(model, prefix)


def _walk(model: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    ahead = [(prefix, model)]  # the next one last
    while ahead:
        path, module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        for name, child in reversed(module._modules.items()):
            if child is not None and name not in (CHILD, TRAINED):
                ahead.append((path if name == _WRAPPED else f"{path}.{name}" if path else name, child))
    return found


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) of the model itself, without adapters; a tied parameter under each of its names."""
    found: list[tuple[str, nn.Parameter]] = []
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.append((f"{path}.{name}" if path else name, parameter))
    return found


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of `module` without adapters."""
    cls = type(module)
    for marker in ("_peftcore_original", "_peftcore_enclosed", "_peftcore_folds", "_peftcore_fused"):  # outermost first
        cls = getattr(cls, marker, cls)
    return cls


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the unbound forward of `module` without adapters."""
    return original_class(module).forward


def has_own_forward(module: nn.Module) -> bool:
    """Return whether `module` has its own `forward` on the instance; accelerate's hooks call that of its class."""
    own = module.__dict__.get(OWN_FORWARD, module.__dict__.get("forward"))
    inside = getattr(module, "_old_forward", None) if hasattr(module, "_hf_hook") else own
    return own is not None and getattr(inside, "__func__", None) not in (original_forward(module), type(module).forward)


@contextmanager
def restored_after_error(module: nn.Module) -> Iterator[None]:
    """Restore the class and the attributes of `module` if the block, which changes them, raises."""
    cls, attributes = type(module), dict(module.__dict__)
    tables = [(value, dict(value)) for value in attributes.values() if isinstance(value, dict)]
    try:
        yield
    except BaseException:
        module.__class__ = cls
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for table, values in tables:
            table.clear()
            table.update(values)
        raise
