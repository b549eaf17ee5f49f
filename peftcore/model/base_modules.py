"""The base model's modules, parameters and classes, excluding those that peftcore added."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CHILD = "peftcore"  # child of an adapted module that holds its adapters
TRAINED = "peftcore_trained"  # child of the model that holds the values of `Train` placements
ROWS = "_peftcore_rows"  # attribute of an adapted module: its `Rows`, or the reason why they are unknown
OWN_FORWARD = "_peftcore_own_forward"  # attribute of an adapted module: the forward that was set on the instance
_WRAPPED = "_checkpoint_wrapped_module"  # name of the only child of PyTorch's wrapper for activation checkpointing

_CACHED = threading.local()  # .model: (model inside `caching_base_modules` in this thread, its `base_modules`)


@contextmanager
def caching_base_modules(model: nn.Module) -> Iterator[None]:
    """Cache the list of modules of `model` within the block, which must not add or remove modules."""
    previous = getattr(_CACHED, "model", None)
    if previous is None or previous[0] is not model:
        _CACHED.model = model, _list_modules(model, "")
    try:
        yield
    finally:
        _CACHED.model = previous


def base_modules(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Return (path, module) for each module of the base model, excluding adapters; a shared module appears once."""
    cached = getattr(_CACHED, "model", None)
    if cached is not None and cached[0] is model and not prefix:
        modules: list[tuple[str, nn.Module]] = cached[1]
        return modules
    return _list_modules(model, prefix)


def _list_modules(model: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    modules: list[tuple[str, nn.Module]] = []
    visited_ids: set[int] = set()
    stack = [(prefix, model)]  # the next module is last
    while stack:
        path, module = stack.pop()
        if id(module) in visited_ids:
            continue
        visited_ids.add(id(module))
        modules.append((path, module))
        for name, child in reversed(module._modules.items()):
            if child is not None and name not in (CHILD, TRAINED):
                child_path = f"{path}.{name}" if path else name
                stack.append((path if name == _WRAPPED else child_path, child))
    return modules


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) for the base model, excluding adapters; a tied parameter appears under each name."""
    parameters: list[tuple[str, nn.Parameter]] = []
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameters.append((f"{path}.{name}" if path else name, parameter))
    return parameters


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the original class of `module`, without adapters."""
    cls = type(module)
    for marker in ("_peftcore_original", "_peftcore_enclosed", "_peftcore_folds", "_peftcore_fused"):  # outermost first
        cls = getattr(cls, marker, cls)
    return cls


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the original unbound forward of `module`, without adapters."""
    return original_class(module).forward


def has_own_forward(module: nn.Module) -> bool:
    """Return whether the instance has its own `forward`, other than accelerate's hook around the class's forward."""
    forward = module.__dict__.get(OWN_FORWARD, module.__dict__.get("forward"))
    wrapped_forward = getattr(module, "_old_forward", None) if hasattr(module, "_hf_hook") else forward
    return forward is not None and getattr(wrapped_forward, "__func__", None) not in (
        original_forward(module),
        type(module).forward,
    )


@contextmanager
def restoring_on_error(module: nn.Module) -> Iterator[None]:
    """If the block raises, restore the class and attributes of `module`."""
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
