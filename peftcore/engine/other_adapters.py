"""Adapters that are on a model already, as the method of another adapter sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftcore.engine.state import adapter_modules, applied, state_of
from peftcore.errors import PeftcoreError


@dataclass(frozen=True)
class OtherAdapter:
    """An adapter that is on a model already, with one of its modules for each adapted module.

    Args:
        name: name of the adapter.
        method: name of its method.
        config: config of its method, with all choices explicit.
        modules: {path of the adapted module: the adapter there}. They are the adapter's own modules, not copies.
    """

    name: str
    method: str
    config: Any
    modules: Mapping[str, nn.Module]


def has_adapters(model: nn.Module) -> bool:
    """Return whether an adapter is on `model`, active or not."""
    return state_of(model) is not None


def other_adapter(model: nn.Module, name: str) -> OtherAdapter:
    """Return the adapter `name` of `model`, for a method that builds on it: a router, a fusion, a second stage.

    Raises:
        PeftcoreError: `model` has no adapter with this name.
    """
    if not has_adapters(model):
        raise PeftcoreError(f"the model has no adapter '{name}'. First apply or load it: adapter='{name}'")
    entry = applied(model, name)
    return OtherAdapter(name, entry.method, entry.config, dict(adapter_modules(model, name)))
