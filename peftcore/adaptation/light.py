"""A module whose tables of hooks are made when somebody looks at them.

PyTorch gives every module a dozen empty ones: 1.6 KB, and as many objects that the garbage collector walks. A model
with a thousand adapters has a quarter of a million of their modules, of which few are called and none has a hook.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn


class _Table:
    """An attribute that a module has from the first time it is read; what is set in its place is read from then on."""

    def __init__(self, name: str, kind: type) -> None:
        self.name = name
        self.kind = kind

    def __get__(self, module: Any, owner: type) -> Any:
        return self if module is None else module.__dict__.setdefault(self.name, self.kind())


class LightModule(nn.Module):
    """An `nn.Module`, to be used as such, that takes a third of the memory. For adapters of which there are many."""

    whole_batch: bool = False  # what is asked of each adapter, and takes long to look for in vain
    needs_call: Any = False

    def __init__(self) -> None:
        super().__init__()
        for name in _TABLES:
            del self.__dict__[name]


_TABLES = {name: type(value) for name, value in vars(nn.Module()).items() if type(value) in (OrderedDict, set)}
for _name, _kind in _TABLES.items():
    setattr(LightModule, _name, _Table(_name, _kind))
