"""Whether the modules that have adapters are still what they were: objects compared, without a walk in Python.

`changes` says what has become of each module. That takes longer than what else a change of adapters costs, so it is
asked only where something here differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter, is_
from typing import Any

from torch import nn

from peftcore.adaptation.adapted import CHILD, TRAINED, adapters_at
from peftcore.adaptation.concurrency import ModelLock
from peftcore.adaptation.enclosing import LOCK
from peftcore.engine.changes import Site, changes

_shape = attrgetter("shape")


class Intact:
    """The modules that have adapters, each as it was when nothing had become of it.

    Args:
        sites: by path of the module. modules: likewise.
        per_sample: each sample of a batch has its own adapter at all of them.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], modules: Mapping[str, nn.Module], lock: ModelLock):
        self.sites, self.modules, self.per_sample = dict(sites), dict(modules), False
        self._model = model._modules
        ways = {
            (id(within), name): (within, name, child) for path in modules for within, name, child in _way(model, path)
        }
        links: list[tuple[Any, str, Any]] = list(ways.values())
        links += [(module.__dict__, LOCK, lock) for module in modules.values()]
        links += [(module._modules, CHILD, adapters_at(module)) for module in modules.values()]
        self._tables, self._names, self._objects = (list(each) for each in zip(*links, strict=True))
        self._classes = list(map(type, modules.values()))
        self._adapters = [adapters_at(module)._modules for module in modules.values()]
        self._parameters = [module._parameters for module in modules.values()]
        self._counts = list(map(len, self._parameters))
        self._slots = [(table, name) for table in self._parameters for name in table]
        self._kinds, self._shapes = self._facts()

    @staticmethod
    def of(model: nn.Module, sites: Mapping[str, Site], lock: ModelLock) -> Intact | None:
        """The modules `sites` of `model`; None where something has become of one, or one is not found by its path."""
        modules = {path: _at(model, path) for path in sites}
        found = {path: module for path, module in modules.items() if module is not None}
        if not sites or len(found) < len(sites) or next(changes(model, sites.items(), lock), None) is not None:
            return None
        return Intact(model, sites, found, lock)

    def still(self, sites: Mapping[str, Site]) -> bool:
        """Are all modules with adapters, `sites`, these, and as they were? Nothing of the base is trained, either."""
        return (
            len(sites) == len(self.sites)
            and TRAINED not in self._model
            and all(map(is_, map(dict.get, self._tables, self._names), self._objects))
            and list(map(type, self.modules.values())) == self._classes
            and list(map(len, self._parameters)) == self._counts
            and list(map(len, self._adapters)) == [site.adapters for site in self.sites.values()]
            and self._facts() == (self._kinds, self._shapes)
        )

    def _facts(self) -> tuple[list[type], list[Any]]:
        """(class of each parameter, shapes of the plain ones)."""
        now = [table.get(name) for table, name in self._slots]
        return list(map(type, now)), [_shape(each) for each in now if type(each) is nn.Parameter]


def _way(model: nn.Module, path: str) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """(children of a module, name of one, it) on the way to `path`."""
    found = []
    module: Any = model
    for name in path.split(".") if path else ():
        found.append((module._modules, name, module._modules[name]))
        module = module._modules[name]
    return found


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at `path`, where each step there is a child."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module
