"""Detect modules that were replaced, resized or parametrized after adapters were applied.

The adapter of such a module is no longer called, or no longer fits. peftcore repairs nothing: functions that read or
change adapters raise an error that names the module, and `remove` detaches the adapters that are still attached.

`find_changes` compares each module with its `Site`, the record made when the first adapter was applied, and describes
every change. `Snapshot` is the fast check that runs first: it only tells whether anything has changed. Both are called
by the model's record of adapters (`state.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any, cast

from torch import nn

from peftcore.engine.adaptation.adapted import adapters_at, is_adapted
from peftcore.engine.adaptation.ancestors import LOCK, lock_of
from peftcore.engine.adaptation.concurrency import ModelLock
from peftcore.engine.trained_parameters import TrainedParameters
from peftcore.model.base_modules import CHILD, TRAINED, base_modules, original_class

Shapes = Mapping[str, tuple[int, ...]]
_shape = attrgetter("shape")


@dataclass
class Site:
    """A module with adapters.

    Args:
        shapes: shapes of the module's parameters before the first adapter.
        adapters: number of adapters on the module.
    """

    shapes: Shapes
    adapters: int = 0


def parameter_shapes(module: nn.Module) -> Shapes:
    """Return {name: shape} of the module's own parameters; empty for a parametrized module."""
    # Parameters of other classes, such as bitsandbytes' or DTensor, may change shape when they change device, so their
    # shapes are not recorded. ZeRO-3 resizes its parameters to 0.
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            is_plain = type(parameter) is nn.Parameter
            shapes[name] = tuple(getattr(parameter, "ds_shape", parameter.shape)) if is_plain else ()
    for name in getattr(module, "parametrizations", ()):
        shapes[f"parametrizations.{name}"] = ()
    return shapes


def find_changes(
    model: nn.Module,
    sites: Iterable[tuple[str, Site]],
    lock: ModelLock,
    *,
    adapter: str | None = None,
    shapes: bool = True,
) -> Iterator[tuple[str, str]]:
    """Yield (path, description of the change) for every module in `sites` that has changed.

    Args:
        lock: the model's lock.
        adapter: the adapter that must still be attached; None for all adapters.
        shapes: also compare parameter shapes; False while the model is merged.
    """
    for path, site in sites:
        module = module_at(model, path)
        if module is None or not _belongs_to_model(module, lock):
            yield path, _describe_replacement(module)
            continue
        adapters = adapters_at(module)._modules
        has_lost_adapter = len(adapters) < site.adapters if adapter is None else adapter not in adapters
        if has_lost_adapter:
            yield path, "has lost its adapter"
        elif shapes:
            change = _shape_change(module, site.shapes)
            if change:
                yield path, change


def _belongs_to_model(module: nn.Module, lock: ModelLock) -> bool:
    """Return whether a module is adapted and has this model's lock; copies and other models have other locks."""
    return is_adapted(module) and module.__dict__.get(LOCK) is lock


def find_changes_of_trained(model: nn.Module, adapter: str, lock: ModelLock) -> Iterator[tuple[str, str]]:
    """Yield (path, description of the change) for the base parameters that `adapter` trains and for their modules."""
    tensors = TrainedParameters.of(model, adapter)
    if tensors is None:
        return
    yield from tensors.changes(model)
    for owner in tensors.by_module():
        module = module_at(model, owner)
        if module is not None and lock_of(module) is not lock:
            yield owner, f"was replaced by another {original_class(module).__name__}"


def modules_with_adapter(
    model: nn.Module, adapter: str, paths: Iterable[str], lock: ModelLock
) -> list[tuple[str, nn.Module]]:
    """Return (path, module) for each module that `adapter` is still attached to."""
    modules: list[tuple[str, nn.Module]] = []
    for path in paths:
        module = module_at(model, path)
        if module is None or not _belongs_to_model(module, lock):
            continue
        if adapter in adapters_at(module)._modules:
            modules.append((path, module))
    return modules


def with_adapter(model: nn.Module, adapter: str, paths: Iterable[str]) -> Iterator[nn.Module]:
    """Yield the modules at `paths` that contain `adapter`, for `remove`.

    Unlike `modules_with_adapter`, it includes copies and modules that were given another class since.
    """
    for path in paths:
        module = module_at(model, path)
        if module is not None and CHILD in module._modules and adapter in adapters_at(module):
            yield module


def moved_with_adapter(model: nn.Module, adapter: str, lock: ModelLock) -> Iterator[nn.Module]:
    """Yield the modules of this model that contain `adapter`, at any path.

    A module may have moved: deleting a child of a `Sequential` renumbers the later children.
    """
    for _, module in base_modules(model):
        if module.__dict__.get(LOCK) is lock and CHILD in module._modules and adapter in adapters_at(module):
            yield module


def _describe_replacement(module: nn.Module | None) -> str:
    """Describe the module that has replaced an adapted module of this model."""
    if module is None:
        return "is gone"
    kind = type(module).__name__
    if not is_adapted(module):
        return f"was given another class, {kind}" if CHILD in module._modules else f"was replaced by another {kind}"
    return f"was replaced by a {kind} of another model, or a copy"


def _shape_change(module: nn.Module, shapes_before: Shapes) -> str | None:
    """Describe how the parameters of a module differ from `shapes_before`, or return None."""
    shapes = parameter_shapes(module)
    missing_names = sorted(shapes_before.keys() - shapes.keys())
    new_names = sorted(shapes.keys() - shapes_before.keys())
    if missing_names or new_names:
        return f"has the parameters {new_names} in place of {missing_names}"
    for name, shape_before in shapes_before.items():
        shape = shapes[name]
        # An empty shape means that it was not recorded, see `parameter_shapes`.
        if shape_before and shape and shape != shape_before:
            return f"has '{name}' of shape {list(shape)}, which was {list(shape_before)}"
    return None


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module at `path`, like `get_submodule` but usually five times faster."""
    module = module_at(model, path)
    return model.get_submodule(path) if module is None else module


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at `path`, like `submodule`; None if there is no module."""
    module = model
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:  # a wrapper may forward the attribute to its inner module
            try:
                return model.get_submodule(path)
            except AttributeError:
                return None
        module = child
    return module


class Snapshot:
    """Record of the modules with adapters at a time when they were unchanged, to check quickly that they still are.

    `matches` compares objects without a Python loop over the modules. `find_changes`, which describes each change,
    would dominate the time of changing adapters, so it runs only if `matches` returns False.

    Args:
        sites, modules: {path of a module: value}.

    Attributes:
        per_sample: whether the modules look up an adapter for each sample.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], modules: Mapping[str, nn.Module], lock: ModelLock):
        self.sites = dict(sites)
        self.modules = dict(modules)
        self.per_sample = False
        self._model = model._modules
        steps: dict[tuple[int, str], tuple[dict[str, Any], str, object]] = {}
        for path in modules:
            for table, name, child in _steps_to(model, path):
                steps[id(table), name] = table, name, child
        adapters = [adapters_at(module) for module in modules.values()]
        # Entries (table, key, object) that must not change: `table[key] is object`.
        entries = list(steps.values())
        for module, module_adapters in zip(modules.values(), adapters, strict=True):
            entries.append((module.__dict__, LOCK, lock))
            entries.append((cast("dict[str, Any]", module._modules), CHILD, module_adapters))
        # Stored as three lists, so that `matches` can map over them in C.
        self._tables = [table for table, _, _ in entries]
        self._names = [name for _, name, _ in entries]
        self._objects = [value for _, _, value in entries]
        self._classes = list(map(type, modules.values()))
        self._adapters = [module_adapters._modules for module_adapters in adapters]
        self._parameters = [module._parameters for module in modules.values()]
        self._counts = list(map(len, self._parameters))
        self._slots = [(table, name) for table in self._parameters for name in table]
        self._types, self._shapes = self._types_and_shapes()

    @staticmethod
    def take(model: nn.Module, sites: Mapping[str, Site], lock: ModelLock) -> Snapshot | None:
        """Return a snapshot of the modules `sites`; None if a module has changed or its path does not exist."""
        modules = {path: _child_at(model, path) for path in sites}
        known_modules = {path: module for path, module in modules.items() if module is not None}
        if not sites or len(known_modules) < len(sites):
            return None
        if next(find_changes(model, sites.items(), lock), None) is not None:
            return None
        return Snapshot(model, sites, known_modules, lock)

    def matches(self, sites: Mapping[str, Site]) -> bool:
        """Return whether `sites` are exactly these modules, unchanged, and no base parameter is trained."""
        return (
            len(sites) == len(self.sites)
            and TRAINED not in self._model
            and all(map(is_, map(dict.get, self._tables, self._names), self._objects))
            and list(map(type, self.modules.values())) == self._classes
            and list(map(len, self._parameters)) == self._counts
            and list(map(len, self._adapters)) == [site.adapters for site in self.sites.values()]
            and self._types_and_shapes() == (self._types, self._shapes)
        )

    def _types_and_shapes(self) -> tuple[list[type], list[Any]]:
        """Return (class of each parameter, shapes of the plain parameters)."""
        parameters = [table.get(name) for table, name in self._slots]
        shapes = [_shape(parameter) for parameter in parameters if type(parameter) is nn.Parameter]
        return list(map(type, parameters)), shapes


def _steps_to(model: nn.Module, path: str) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Return (children of a module, name of a child, the child) for each step along `path`."""
    steps: list[tuple[dict[str, Any], str, nn.Module]] = []
    module: Any = model
    for name in path.split(".") if path else ():
        steps.append((module._modules, name, module._modules[name]))
        module = module._modules[name]
    return steps


def _child_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at `path`; None if a step along it is an attribute of a wrapper rather than a child."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module
