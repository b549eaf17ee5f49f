"""Do two adapters compute the same of the same tensors? What differs in configs need not matter, and what is alike in
modules is all that does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# What a module has besides, that its forward does not read, or that is compared on its own.
_APART = {"training", "multiplier", *vars(nn.Module())}


def difference(one: nn.Module, other: nn.Module, *, numbers: bool = True) -> str | None:
    """The first of what tells two adapters apart, in words, or None.

    The values of their tensors are left out, but for buffers that no file has: those follow from a config.

    Args:
        numbers: attributes that are numbers must be the same, too (a scale, a rank, a probability).
    """
    if type(one) is not type(other):
        return f"a {type(other).__name__} is no {type(one).__name__}"
    mine, theirs = _attributes(one), _attributes(other)
    for name in dict.fromkeys([*mine, *theirs]):
        here, there = mine.get(name), theirs.get(name)
        if not _equal(here, there) and (numbers or not (_is_number(here) and _is_number(there))):
            return f"{name}={there!r}, here {here!r}"
    for kind in ("_parameters", "_buffers"):
        own, beside = ({n for n, t in vars(m)[kind].items() if t is not None} for m in (one, other))
        if own != beside:
            return f"the tensors {sorted(beside)}, here {sorted(own)}"
    for name in one._non_persistent_buffers_set:
        if not _equal_values(one._buffers[name], other._buffers[name]):
            return f"other values of '{name}', which no file has"
    if one._modules.keys() != other._modules.keys():
        return f"the modules {sorted(other._modules)}, here {sorted(one._modules)}"
    for name, child in one._modules.items():
        its = other._modules[name]
        found = difference(child, its, numbers=numbers) if child is not None and its is not None else None
        if found:
            return found
    return None


def has_values_of_its_config(module: nn.Module) -> bool:
    """Has it buffers that no file has?"""
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
    except (RuntimeError, ValueError, TypeError):  # tensors, and what compares entry by entry
        return False
