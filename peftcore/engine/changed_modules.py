"""Detection of modules that were replaced, resized or parametrized after adapters were applied.

An adapter of such a module is not called any more, or does not fit it. Nothing is repaired: functions that read or
change adapters raise an error that names the module, and `remove` detaches what is still attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

from torch import nn

from peftcore.engine.adaptation.adapted import adapters_at, is_adapted
from peftcore.engine.adaptation.ancestors import LOCK, lock_of
from peftcore.engine.adaptation.concurrency import ModelLock
from peftcore.engine.trained_parameters import TrainedParameters
from peftcore.model.base_modules import CHILD, TRAINED, base_modules, original_class

Facts = Mapping[str, tuple[int, ...]]
_shape = attrgetter("shape")


@dataclass
class Site:
    """A module that has adapters.

    Args:
        facts: the shapes of its parameters before the first adapter.
        adapters: how many adapters it has.
    """

    facts: Facts
    adapters: int = 0


def facts(module: nn.Module) -> Facts:
    """Return the shape of each of the module's own parameters by name; empty for a parametrized one."""
    # Other classes, such as bitsandbytes' or DTensor, may change shape with the device. ZeRO-3 empties its parameters.
    found: dict[str, tuple[int, ...]] = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            is_plain = type(parameter) is nn.Parameter
            found[name] = tuple(getattr(parameter, "ds_shape", parameter.shape)) if is_plain else ()
    for name in getattr(module, "parametrizations", ()):
        found[f"parametrizations.{name}"] = ()
    return found


def changes(
    model: nn.Module,
    sites: Iterable[tuple[str, Site]],
    lock: ModelLock,
    *,
    adapter: str | None = None,
    shapes: bool = True,
) -> Iterator[tuple[str, str]]:
    """Yield (path, how it changed) for every module of `sites` that has changed.

    Args:
        lock: the lock of the model.
        adapter: the adapter that must be attached, or None for all that were.
        shapes: compare parameters, too; False while the model is merged.
    """
    for path, site in sites:
        module = module_at(model, path)
        if module is None or not is_adapted(module) or module.__dict__.get(LOCK) is not lock:
            yield path, _replaced(module)
            continue
        change, there = None, adapters_at(module)._modules
        if len(there) < site.adapters if adapter is None else adapter not in there:
            change = "has lost its adapter"
        elif shapes:
            change = _differs(module, site.facts)
        if change:
            yield path, change


def changes_of_trained(model: nn.Module, adapter: str, lock: ModelLock) -> Iterator[tuple[str, str]]:
    """Yield (path, how it changed) for the parameters that `adapter` trains and the modules that own them."""
    own = TrainedParameters.of(model, adapter)
    if own is None:
        return
    yield from own.changes(model)
    for owner in {slot.rpartition(".")[0] for slots in own.slots.values() for slot in slots}:
        module = module_at(model, owner)
        if module is not None and lock_of(module) is not lock:
            yield owner, f"was replaced by another {original_class(module).__name__}"


def attached(model: nn.Module, adapter: str, paths: Iterable[str], lock: ModelLock) -> list[tuple[str, nn.Module]]:
    """Return (path, module) where `adapter` is still attached."""
    found: list[tuple[str, nn.Module]] = []
    for path in paths:
        module = module_at(model, path)
        if module is None or not is_adapted(module) or module.__dict__.get(LOCK) is not lock:
            continue
        if adapter in adapters_at(module)._modules:
            found.append((path, module))
    return found


def with_adapter(model: nn.Module, adapter: str, paths: Iterable[str]) -> Iterator[nn.Module]:
    """Yield the modules at `paths` that have `adapter`, including copies and modules of another class."""
    for path in paths:
        module = module_at(model, path)
        if module is not None and CHILD in module._modules and adapter in adapters_at(module):
            yield module


def moved_with_adapter(model: nn.Module, adapter: str, lock: ModelLock) -> Iterator[nn.Module]:
    """Yield the modules that have `adapter` at any path: deleting a child of a `Sequential` renames those after it."""
    for _, module in base_modules(model):
        if module.__dict__.get(LOCK) is lock and CHILD in module._modules and adapter in adapters_at(module):
            yield module


def _replaced(module: nn.Module | None) -> str:
    """Return how a module that is not the adapted one of this model came to its place."""
    if module is None:
        return "is gone"
    kind = type(module).__name__
    if not is_adapted(module):
        return f"was given another class, {kind}" if CHILD in module._modules else f"was replaced by another {kind}"
    return f"was replaced by a {kind} of another model, or a copy"


def _differs(module: nn.Module, was: Facts) -> str | None:
    now = facts(module)
    gone, new = sorted(was.keys() - now.keys()), sorted(now.keys() - was.keys())
    if gone or new:
        return f"has the parameters {new} in place of {gone}"
    for name, shape in was.items():
        if shape and now[name] and now[name] != shape:
            return f"has '{name}' of shape {list(now[name])}, which was {list(shape)}"
    return None


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module at `path`, like `get_submodule` and usually five times faster."""
    module = module_at(model, path)
    return model.get_submodule(path) if module is None else module


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at `path`, like `submodule`, or None if the model has none there."""
    module = model
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:  # or an attribute by which a wrapper passes it on
            try:
                return model.get_submodule(path)
            except AttributeError:
                return None
        module = child
    return module


class Snapshot:
    """Snapshot of the modules that have adapters, while they are unchanged.

    It compares objects, without a walk in Python. `changes`, which finds out how a module changed, takes longer than
    everything else in a change of adapters, so it runs only if this check fails.

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
