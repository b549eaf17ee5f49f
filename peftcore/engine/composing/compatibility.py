"""Check whether two adapters with equal tensors compute the same outputs.

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


def _different_attribute(adapter: nn.Module, other_adapter: nn.Module, *, numbers: bool) -> str | None:
    attributes, other_attributes = _attributes(adapter), _attributes(other_adapter)
    for name in dict.fromkeys([*attributes, *other_attributes]):
        value, other_value = attributes.get(name), other_attributes.get(name)
        if _equal(value, other_value) or (not numbers and _is_number(value) and _is_number(other_value)):
            continue
        return f"{name}={other_value!r} instead of {value!r}"
    return None


def _different_tensors(adapter: nn.Module, other_adapter: nn.Module) -> str | None:
    """Describe a difference in the names of tensors or in the values of non-persistent buffers."""
    for kind in ("_parameters", "_buffers"):
        names = {name for name, tensor in vars(adapter)[kind].items() if tensor is not None}
        other_names = {name for name, tensor in vars(other_adapter)[kind].items() if tensor is not None}
        if names != other_names:
            return f"tensors {sorted(other_names)} instead of {sorted(names)}"
    for name in adapter._non_persistent_buffers_set:
        if not _equal_values(adapter._buffers[name], other_adapter._buffers[name]):
            return f"other values of the non-persistent buffer '{name}'"
    return None


def _different_child(adapter: nn.Module, other: nn.Module, *, numbers: bool) -> str | None:
    if adapter._modules.keys() != other._modules.keys():
        return f"submodules {sorted(other._modules)} instead of {sorted(adapter._modules)}"
    for name, child in adapter._modules.items():
        other_child = other._modules[name]
        description = None if child is None or other_child is None else difference(child, other_child, numbers=numbers)
        if description:
            return description
    return None


def has_nonpersistent_buffers(module: nn.Module) -> bool:
    """Return whether the adapter has non-persistent buffers."""
    return any(submodule._non_persistent_buffers_set for submodule in module.modules())


def _equal_values(tensor: Tensor | None, other_tensor: Tensor | None) -> bool:
    if tensor is None or other_tensor is None:
        return tensor is other_tensor
    return tensor.shape == other_tensor.shape and torch.equal(tensor.cpu(), other_tensor.to("cpu", tensor.dtype))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _APART}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _equal(value: Any, other_value: Any) -> bool:
    try:
        return value is other_value or bool(value == other_value)
    except (RuntimeError, ValueError, TypeError):  # tensors and other values that compare elementwise
        return False
