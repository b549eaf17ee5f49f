"""Do two adapters compute the same of the same tensors? What differs in configs need not matter, and what is alike in
modules is all that does."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

# What a module has besides, that its forward does not read, or that is compared on its own.
_APART = {"training", "multiplier", *vars(nn.Module())}


def difference(one: nn.Module, other: nn.Module, apart: Collection[str] = ()) -> str | None:
    """The first of what tells two adapters apart, in words, or None; the values of their tensors are left out.

    Args:
        apart: names of attributes that may differ.
    """
    if type(one) is not type(other):
        return f"a {type(other).__name__} is no {type(one).__name__}"
    mine, theirs = _attributes(one), _attributes(other)
    for name in dict.fromkeys([*mine, *theirs]):
        if name not in apart and not _equal(mine.get(name), theirs.get(name)):
            return f"{name}={theirs.get(name)!r}, here {mine.get(name)!r}"
    for kind in ("_parameters", "_buffers"):
        here, there = ({n: t for n, t in vars(m)[kind].items() if t is not None} for m in (one, other))
        if here.keys() != there.keys():
            return f"the tensors {sorted(there)}, here {sorted(here)}"
    if one._modules.keys() != other._modules.keys():
        return f"the modules {sorted(other._modules)}, here {sorted(one._modules)}"
    for name, child in one._modules.items():
        beside = other._modules[name]
        found = difference(child, beside, apart) if child is not None and beside is not None else None
        if found:
            return found
    return None


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _APART}


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # tensors, and what compares entry by entry
        return False
