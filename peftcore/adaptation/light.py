"""Modules whose hook tables are made when they are first read.

PyTorch makes a dozen empty tables for every module: 1.6 KB, and a dozen objects that the garbage collector walks. A
model with a thousand adapters has a quarter of a million modules of adapters. Few are called, and none has a hook.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from peftcore.adapter import Adapter


class _Table:
    """An attribute that is made when it is first read; once it is set or read, the module's own value is used."""

    def __init__(self, name: str, kind: type) -> None:
        self.name = name
        self.kind = kind

    def __get__(self, module: Any, owner: type) -> Any:
        return self if module is None else module.__dict__.setdefault(self.name, self.kind())


class LightAdapter(Adapter):
    """An `Adapter` that takes a third of the memory, for adapters of which there are many."""

    def __init__(self) -> None:
        super().__init__()
        for name in _TABLES:
            del self.__dict__[name]


_TABLES = {name: type(value) for name, value in vars(nn.Module()).items() if type(value) in (OrderedDict, set)}
for _name, _kind in _TABLES.items():
    setattr(LightAdapter, _name, _Table(_name, _kind))


def parts(module: nn.Module) -> list[nn.Module]:
    """Return a list like `module.modules()`, three times faster; shared modules are not de-duplicated."""
    found: list[nn.Module] = []
    ahead: list[nn.Module | None] = [module]
    while ahead:
        part = ahead.pop()
        if part is not None:
            found.append(part)
            ahead += part._modules.values()
    return found


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return `module.state_dict(keep_vars=True)`, faster, and without making hook tables."""
    found: dict[str, Tensor] = {}
    ahead: list[tuple[str, nn.Module]] = [("", module)]
    while ahead:
        prefix, part = ahead.pop()
        own, cls = part.__dict__, cast(Any, type(part))  # to mypy a class is not hashable
        if not _has_plain_state(cls) or own.get("_state_dict_hooks") or own.get("_state_dict_pre_hooks"):
            return module.state_dict(keep_vars=True)
        passing = own.get("_non_persistent_buffers_set", ())
        for name, parameter in part._parameters.items():
            if parameter is not None:
                found[prefix + name] = parameter
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in passing:
                found[prefix + name] = buffer
        ahead += [(f"{prefix}{name}.", child) for name, child in reversed(part._modules.items()) if child is not None]
    return found


@cache
def _has_plain_state(cls: type[nn.Module]) -> bool:
    """Return whether a module of the class adds just its own parameters and buffers to `state_dict`."""
    return (
        cls.state_dict is nn.Module.state_dict
        and cls._save_to_state_dict is nn.Module._save_to_state_dict
        and cls.get_extra_state is nn.Module.get_extra_state
    )
