"""Detection of modules that were replaced, resized or parametrized after adapters were applied.

An adapter of such a module is not called any more, or does not fit it. Nothing is repaired: functions that read or
change adapters raise an error that names the module, and `remove` detaches what is still attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from peftcore.adaptation.adapted import adapters_at, is_adapted
from peftcore.adaptation.base_modules import CHILD, original_class
from peftcore.adaptation.concurrency import ModelLock
from peftcore.adaptation.enclosing import LOCK, lock_of
from peftcore.engine.trained import TrainedParameters

Facts = Mapping[str, tuple[int, ...]]


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
