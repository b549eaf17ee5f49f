"""Traversals of modules that are faster than PyTorch's, for models with 250,000 adapter modules."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor, nn


def parts(module: nn.Module) -> list[nn.Module]:
    """Return a list like `module.modules()`, three times faster. Shared modules are not deduplicated."""
    modules: list[nn.Module] = []
    stack: list[nn.Module | None] = [module]
    while stack:
        part = stack.pop()
        if part is not None:
            modules.append(part)
            stack += part._modules.values()
    return modules


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a dict like `module.state_dict(keep_vars=True)`, faster."""
    tensors: dict[str, Tensor] = {}
    stack: list[tuple[str, nn.Module]] = [("", module)]
    while stack:
        prefix, part = stack.pop()
        attributes, cls = part.__dict__, cast(Any, type(part))  # mypy considers classes unhashable
        if not _has_plain_state(cls) or attributes.get("_state_dict_hooks") or attributes.get("_state_dict_pre_hooks"):
            return module.state_dict(keep_vars=True)
        non_persistent = attributes.get("_non_persistent_buffers_set", ())
        for name, parameter in part._parameters.items():
            if parameter is not None:
                tensors[prefix + name] = parameter
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in non_persistent:
                tensors[prefix + name] = buffer
        stack += [(f"{prefix}{name}.", child) for name, child in reversed(part._modules.items()) if child is not None]
    return tensors


@cache
def _has_plain_state(cls: type[nn.Module]) -> bool:
    """Return whether modules of the class only add their own parameters and buffers to `state_dict`."""
    return (
        cls.state_dict is nn.Module.state_dict
        and cls._save_to_state_dict is nn.Module._save_to_state_dict
        and cls.get_extra_state is nn.Module.get_extra_state
    )
