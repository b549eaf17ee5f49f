"""What has become of a model since adapters were applied: modules that were replaced, resized or parametrized.

An adapter at such a module is not called any more, or does not fit it. Nothing is repaired: whoever reads or changes
adapters is told which module it is, and `remove` takes off what is still there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from peftcore.adaptation.adapted import CHILD, adapters_at, is_adapted
from peftcore.adaptation.class_swap import original_class
from peftcore.adaptation.concurrency import ModelLock
from peftcore.adaptation.enclosing import lock_of
from peftcore.engine.trained import TrainedParameters

Facts = Mapping[str, tuple[int, ...]]


def facts(module: nn.Module) -> Facts:
    """The shape of each parameter of `module` itself, by name; of one that is parametrized an empty one."""
    # Of other classes, such as bitsandbytes' or DTensor, the shape may change with the device. ZeRO-3 empties its own.
    plain = {name: p for name, p in module._parameters.items() if p is not None}
    found = {n: tuple(getattr(p, "ds_shape", p.shape)) if type(p) is nn.Parameter else () for n, p in plain.items()}
    return {**found, **{f"parametrizations.{name}": () for name in getattr(module, "parametrizations", ())}}


def changes(
    model: nn.Module, adapter: str, before: Mapping[str, Facts], lock: ModelLock, *, shapes: bool = True
) -> Iterator[tuple[str, str]]:
    """(path, what has become of it) of every module that `adapter` stands at, or trains, and that is not as it was.

    Args:
        before: the facts of the modules at which it stands.
        lock: of the model.
        shapes: compare the parameters, too; not while the model is merged.
    """
    for path, was in before.items():
        module = _submodule(model, path)
        change = _replaced(module, adapter, lock)
        if change is None and shapes and module is not None:
            change = _differs(module, was)
        if change:
            yield path, change
    own = TrainedParameters.of(model, adapter)
    if own is None:
        return
    for slot, change in own.changes(model):
        yield slot, change
    for owner in {slot.rpartition(".")[0] for slots in own.slots.values() for slot in slots}:
        module = _submodule(model, owner)
        if module is not None and lock_of(module) is not lock:
            yield owner, f"was replaced by another {original_class(module).__name__}"


def standing(model: nn.Module, adapter: str, paths: Iterable[str], lock: ModelLock) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of those at which `adapter` still stands."""
    for path in paths:
        module = _submodule(model, path)
        if module is not None and _replaced(module, adapter, lock) is None:
            yield path, module


def with_adapter(model: nn.Module, adapter: str, paths: Iterable[str]) -> Iterator[nn.Module]:
    """What has `adapter` at these paths, copies and modules of another class included."""
    for path in paths:
        module = _submodule(model, path)
        if module is not None and CHILD in module._modules and adapter in adapters_at(module):
            yield module


def _replaced(module: nn.Module | None, adapter: str, lock: ModelLock) -> str | None:
    if module is None:
        return "is gone"
    kind = type(module).__name__
    if not is_adapted(module):
        return f"was given another class, {kind}" if CHILD in module._modules else f"was replaced by another {kind}"
    if lock_of(module) is not lock:
        return f"was replaced by a {kind} of another model, or a copy"
    return None if adapter in adapters_at(module) else "has lost its adapter"


def _differs(module: nn.Module, was: Facts) -> str | None:
    now = facts(module)
    gone, new = sorted(was.keys() - now.keys()), sorted(now.keys() - was.keys())
    if gone or new:
        return f"has the parameters {new} in place of {gone}"
    for name, shape in was.items():
        if shape and now[name] and now[name] != shape:
            return f"has '{name}' of shape {list(now[name])}, which was {list(shape)}"
    return None


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """That of `get_submodule`, in a fifth of its time where every step is a child."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = module._modules.get(name)  # type: ignore[union-attr]
        if module is None:
            break
    else:
        return module
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
