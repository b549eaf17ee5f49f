"""Fast check that modules with adapters are unchanged: objects are compared, without a walk in Python.

`changes` finds out how a module changed. It takes longer than everything else in a change of adapters, so it runs only
if this check fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter, is_
from typing import Any

from torch import nn

from peftcore.adaptation.adapted import adapters_at
from peftcore.adaptation.base_modules import CHILD, TRAINED
from peftcore.adaptation.concurrency import ModelLock
from peftcore.adaptation.enclosing import LOCK
from peftcore.engine.changes import Site, changes

_shape = attrgetter("shape")


class Snapshot:
    """Snapshot of the modules that have adapters, while they are unchanged.

    Args:
        sites, modules: by path of the module.
        per_sample: whether all of them look up the adapter of each sample.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], modules: Mapping[str, nn.Module], lock: ModelLock):
        self.sites, self.modules, self.per_sample = dict(sites), dict(modules), False
        self._model = model._modules
        ways = {
            (id(within), name): (within, name, child) for path in modules for within, name, child in _way(model, path)
        }
        adapters = [adapters_at(module) for module in modules.values()]
        links: list[tuple[Any, str, Any]] = list(ways.values())
        links += [(module.__dict__, LOCK, lock) for module in modules.values()]
        links += [(module._modules, CHILD, found) for module, found in zip(modules.values(), adapters, strict=True)]
        self._tables, self._names, self._objects = (list(each) for each in zip(*links, strict=True))
        self._classes = list(map(type, modules.values()))
        self._adapters = [found._modules for found in adapters]
        self._parameters = [module._parameters for module in modules.values()]
        self._counts = list(map(len, self._parameters))
        self._slots = [(table, name) for table in self._parameters for name in table]
        self._kinds, self._shapes = self._facts()

    @staticmethod
    def of(model: nn.Module, sites: Mapping[str, Site], lock: ModelLock) -> Snapshot | None:
        """Return a snapshot of the modules `sites`; None if one has changed or is not found by its path."""
        modules = {path: _at(model, path) for path in sites}
        found = {path: module for path, module in modules.items() if module is not None}
        if not sites or len(found) < len(sites) or next(changes(model, sites.items(), lock), None) is not None:
            return None
        return Snapshot(model, sites, found, lock)

    def matches(self, sites: Mapping[str, Site]) -> bool:
        """Return whether `sites` are exactly these modules, unchanged, and no parameter of the base is trained."""
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
        """Return (class of each parameter, shapes of the plain ones)."""
        now = [table.get(name) for table, name in self._slots]
        return list(map(type, now)), [_shape(each) for each in now if type(each) is nn.Parameter]


def _way(model: nn.Module, path: str) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Return (children of a module, name of a child, the child) for each step to `path`."""
    found = []
    module: Any = model
    for name in path.split(".") if path else ():
        found.append((module._modules, name, module._modules[name]))
        module = module._modules[name]
    return found


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at `path`; None if a step is not a child, but an attribute by which a wrapper passes it on."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module
