"""Check whether two adapters compute the same from the same tensors.

Modules are compared rather than configs, because not every field that differs affects the computation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Attributes that forward does not read, or that are compared separately.
_APART = {"training", "multiplier", *vars(nn.Module())}


def difference(one: nn.Module, other: nn.Module, *, numbers: bool = True) -> str | None:
    """Describe the first difference between two adapters, or return None.

    Values of parameters and persistent buffers are ignored. Non-persistent buffers follow from the config, so their
    values are compared.

    Args:
        one: an adapter on the model.
        other: the adapter to compare with.
        numbers: also compare numeric attributes, such as a scale, a rank or a probability.
    """
    if type(one) is not type(other):
        return f"class {type(other).__name__} instead of {type(one).__name__}"
    return (
        _different_attribute(one, other, numbers=numbers)
        or _different_tensors(one, other)
        or _different_child(one, other, numbers=numbers)
    )


def _different_attribute(one: nn.Module, other: nn.Module, *, numbers: bool) -> str | None:
    attributes, other_attributes = _attributes(one), _attributes(other)
    for name in dict.fromkeys([*attributes, *other_attributes]):
        value, other_value = attributes.get(name), other_attributes.get(name)
        if _equal(value, other_value) or (not numbers and _is_number(value) and _is_number(other_value)):
            continue
        return f"{name}={other_value!r} instead of {value!r}"
    return None


def _different_tensors(one: nn.Module, other: nn.Module) -> str | None:
    """Describe a difference in the names of tensors or in the values of non-persistent buffers."""
    for kind in ("_parameters", "_buffers"):
        names = {name for name, tensor in vars(one)[kind].items() if tensor is not None}
        other_names = {name for name, tensor in vars(other)[kind].items() if tensor is not None}
        if names != other_names:
            return f"tensors {sorted(other_names)} instead of {sorted(names)}"
    for name in one._non_persistent_buffers_set:
        if not _equal_values(one._buffers[name], other._buffers[name]):
            return f"other values of the non-persistent buffer '{name}'"
    return None


def _different_child(one: nn.Module, other: nn.Module, *, numbers: bool) -> str | None:
    if one._modules.keys() != other._modules.keys():
        return f"submodules {sorted(other._modules)} instead of {sorted(one._modules)}"
    for name, child in one._modules.items():
        other_child = other._modules[name]
        description = None if child is None or other_child is None else difference(child, other_child, numbers=numbers)
        if description:
            return description
    return None


def has_nonpersistent_buffers(module: nn.Module) -> bool:
    """Return whether the adapter has non-persistent buffers."""
    return any(each._non_persistent_buffers_set for each in module.modules())


def _equal_values(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one.cpu(), other.to("cpu", one.dtype))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _APART}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # tensors and other values that compare elementwise
        return False
