"""Record of a model's adapters. The record is an attribute of the model, so that deep copies and pickles include it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftcore.engine.adaptation import adapted
from peftcore.engine.adaptation.concurrency import ModelLock
from peftcore.engine.changed_modules import Site, Snapshot, find_changes, find_changes_of_trained, modules_with_adapter
from peftcore.engine.trained_parameters import TrainedParameters
from peftcore.errors import PeftcoreError, nearest
from peftcore.model.base_modules import TRAINED
from peftcore.plugin.method import WeightFormat
from peftcore.plugin.placements.placement import Placement

STATE = "_peftcore_state"

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class Applied:
    """One adapter of a model: its method, its resolved config, and its placements.

    Args:
        placements: {path of the adapted module: placements of the method}. A prompt has several modules, and one module
            may have changes of several parameters.
        trained: names of trained base parameters.
        multiplier: factor of the adapter's change, set by `peftcore.scale`.
        reads: names of the call arguments that the adapter's modules read, or None.
        whole_batch: whether a module of the adapter mixes the samples of a batch.
        frozen: whether `requires_grad` has been cleared on all the adapter's parameters.
        froze: branches that this adapter froze; removing it makes them trainable again.
        missed_steps: number of optimizer steps without `after_step`. None if the method has no `after_step`, once it
            has been called, and after the warning.
    """

    method: str
    config: Any
    placements: dict[str, tuple[Placement, ...]] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    trainable: bool = True
    multiplier: float = 1.0
    reads: frozenset[str] | None = None
    whole_batch: bool = False
    frozen: bool = False
    froze: set[str] = field(default_factory=set)
    missed_steps: int | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the modules to which the adapter is attached."""
        return tuple(self.placements)

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """Names of the adapters that this one combines."""
        names: list[str] = []
        for placement in chain.from_iterable(self.placements.values()):
            names += placement.branches
        return tuple(dict.fromkeys(names))


@dataclass
class Merged:
    """State for `unmerge`.

    Attributes:
        active: the adapters that were active before merging.
        aside: the original tensors, by name.
        tied: the model config's tie_word_embeddings, if merging untied them.
        lost: {path of a layer: fraction of the change that requantizing lost}.
        written: {name: (shape, dtype)} of the merged tensors.
        unpacked: formats of quantized weights that were replaced by dense ones.
        stopped: progress of a merge that cannot be undone and was interrupted, such as `3 of 12`.
    """

    active: tuple[str, ...]
    aside: dict[str, Tensor] = field(default_factory=dict)
    tied: bool | None = None
    lost: dict[str, float] = field(default_factory=dict)
    written: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    unpacked: tuple[WeightFormat, ...] = ()
    stopped: str = ""

    @property
    def reason(self) -> str:
        """Reason why other functions refuse a merged model, and what to do about it."""
        if not self.stopped:
            return "adapters are merged into the base. Call peftcore.unmerge(model) first"
        return (
            f"merging was interrupted after {self.stopped} layers, and their original weights were not kept. Load "
            "the base and the adapters again, and merge again"
        )


@dataclass
class State:
    """Adapters of a model, the active ones in chain order, and the original state of the base.

    `sites` allows changing one adapter without visiting the modules of all others.
    """

    applied: dict[str, Applied] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)  # {path of a module with adapters: its site}
    active: tuple[str, ...] = ()
    requires_grad: dict[str, bool] = field(default_factory=dict)
    merged: Merged | None = None
    samples: tuple[str | None, ...] | None = None  # the adapter of each sample, with activate(..., per_sample=True)
    lock: ModelLock = field(default_factory=ModelLock)
    own_parameters: list[tuple[str, str]] = field(default_factory=list)  # (path, adapter) of `OwnParameters`
    watching: RemovableHandle | None = None  # handle of the hook of `watch_batches`
    loading: RemovableHandle | None = None  # handle of the hook of `base_checkpoints`
    snapshot: Snapshot | None = None  # snapshot of `sites` when they were last known to be unchanged

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "snapshot": None}  # a copy has other modules


def state_of(model: nn.Module) -> State | None:
    """Return the record of the adapters of `model`, or None."""
    return getattr(model, "__dict__", {}).get(STATE)


def require_state(model: nn.Module) -> State:
    """Return the record of the adapters of `model`.

    Raises:
        PeftcoreError: no adapter is applied, or `model` is not a module.
    """
    check_model(model)
    state = state_of(model)
    if state is None:
        for attribute in ("_orig_mod", "module"):  # torch.compile; DistributedDataParallel and others
            inner = getattr(model, attribute, None)
            if isinstance(inner, nn.Module) and state_of(inner) is not None:
                raise PeftcoreError(f"the adapters are applied to the wrapped model. Pass model.{attribute}")
        raise PeftcoreError("no adapter is applied to this model. Apply one first: peftcore.apply(model, 'METHOD')")
    return state


def applied(model: nn.Module, adapter: str) -> Applied:
    """Return the record of one adapter.

    Raises:
        PeftcoreError: no such adapter is applied.
    """
    state = require_state(model)
    if not isinstance(adapter, str):
        raise PeftcoreError(f"the name of an adapter must be a string, found {adapter!r}")
    if adapter not in state.applied:
        names = ", ".join(state.applied)
        hint = nearest(adapter, list(state.applied))
        raise PeftcoreError(f"no adapter '{adapter}' is applied (applied: {names}){hint}")
    return state.applied[adapter]


def adapter_modules(model: nn.Module, adapter: str) -> list[tuple[str, nn.Module]]:
    """Return (path of the adapted module, adapter module) for every placement of `adapter` that is still attached."""
    applied(model, adapter)
    return [
        (path, adapted.adapter_at(module, adapter))
        for path, module in modules_with(model, require_state(model), adapter)
    ]


def placements(model: nn.Module, adapter: str) -> list[Placement]:
    """Return the distinct placements of `adapter` that are still attached, in the order of placing."""
    entry = applied(model, adapter)
    by_id: dict[int, Placement] = {}
    for path, _ in adapter_modules(model, adapter):
        by_id.update((id(placement), placement) for placement in entry.placements[path])
    return list(by_id.values())


def adapter_parameters(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of all parameters that `adapter` trains, including base parameters."""
    for path, module in adapter_modules(model, adapter):
        for name, parameter in module.named_parameters():
            yield (f"{path}.{name}" if path else name), parameter
    tensors = TrainedParameters.of(model, adapter)
    if tensors is not None:
        yield from tensors.values(model)


def changed_paths(model: nn.Module) -> dict[str, str]:
    """Return {path: description of the change} for modules with adapters that changed after `apply`."""
    state = state_of(model)
    if state is None:
        return {}
    return dict(chain.from_iterable(changes_of(model, state, name) for name in state.applied))


def refuse_changed(model: nn.Module) -> None:
    """Raise a PeftcoreError if modules with adapters were replaced, resized or parametrized since `apply`."""
    state = require_state(model)
    if current_snapshot(model, state) is not None:
        return
    first_change = next(find_changes(model, state.sites.items(), state.lock, shapes=state.merged is None), None)
    for name in state.applied:
        if first_change is None:
            modules = dict(find_changes_of_trained(model, name, state.lock))
        else:
            modules = dict(changes_of(model, state, name))
        if modules:
            raise PeftcoreError(
                f"the model was changed after the adapter '{name}' was applied: {as_text(modules)}. "
                f"Undo the change, or remove the adapter, peftcore.remove(model, '{name}'), and apply it to the "
                "changed model"
            )


def current_snapshot(model: nn.Module, state: State) -> Snapshot | None:
    """Return the snapshot of the modules with adapters; None if one has changed or base parameters are trained."""
    if state.snapshot is None or not state.snapshot.matches(state.sites):
        state.snapshot = None
        if TRAINED not in model._modules and state.merged is None:
            state.snapshot = Snapshot.take(model, state.sites, state.lock)
    return state.snapshot


def changes_of(model: nn.Module, state: State, adapter: str) -> Iterator[tuple[str, str]]:
    """Yield (path, description of the change) for the modules of `adapter` that changed."""
    sites = ((path, state.sites[path]) for path in state.applied[adapter].paths)
    yield from find_changes(model, sites, state.lock, adapter=adapter, shapes=state.merged is None)
    yield from find_changes_of_trained(model, adapter, state.lock)


def modules_with(model: nn.Module, state: State, adapter: str) -> list[tuple[str, nn.Module]]:
    """Return (path, module) for each module to which `adapter` is still attached."""
    if state.snapshot is not None and state.snapshot.matches(state.sites):
        modules = state.snapshot.modules
        return [(path, modules[path]) for path in state.applied[adapter].paths]
    return modules_with_adapter(model, adapter, state.applied[adapter].paths, state.lock)


def as_text(changes: dict[str, str], limit: int = 3) -> str:
    """Format the first `limit` changes as text."""
    parts = [f"'{path}' {change}" for path, change in list(changes.items())[:limit]]
    return "; ".join(parts) + (f"; and {len(changes) - limit} more" if len(changes) > limit else "")


def refuse_merged(state: State, action: str) -> None:
    """Raise a PeftcoreError if adapters are merged; `action` names the refused operation, such as `save`."""
    if state.merged is not None:
        raise PeftcoreError(f"cannot {action}: {state.merged.reason}")


def refuse_per_sample(state: State, action: str) -> None:
    """Raise a PeftcoreError if activation is per sample; `action` names the refused operation."""
    if state.samples is not None:
        raise PeftcoreError(
            f"cannot {action} while each sample has its own adapter. First activate adapters for the whole batch: "
            "peftcore.activate(model, [...])"
        )


def check_model(model: object) -> None:
    """Raise a PeftcoreError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise PeftcoreError(f"the model must be a torch.nn.Module, found {model!r:.200}")


@contextmanager
def exclusively(model: nn.Module, action: str, *, base: bool = False) -> Iterator[None]:
    """Change `model` inside the block, while no other thread calls or changes it.

    A model without adapters does not track calls, so apply adapters before starting threads.

    Args:
        action: name of the operation for error messages, such as `merge`.
        base: the base also changes, so wait for `disabled` blocks of other threads to end.
    """
    check_model(model)
    state = state_of(model)
    if state is None:
        yield
        return
    with state.lock.changing(action, base=base):
        yield


def exclusive(action: str, *, base: bool = False) -> Callable[[Function], Function]:
    """Decorate a function whose first argument is a model to run inside `exclusively`."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def run_exclusively(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with exclusively(model, action, base=base):
                return function(model, *args, **kwargs)

        return cast(Function, run_exclusively)

    return decorate


@dataclass(frozen=True)
class OtherAdapter:
    """An adapter of a model and its modules.

    Args:
        name: name of the adapter.
        method: name of its method.
        config: config of its method, with all defaults resolved.
        modules: {path of the adapted module: the adapter there}. They are the adapter's own modules, not copies.
    """

    name: str
    method: str
    config: Any
    modules: Mapping[str, nn.Module]


def has_adapters(model: nn.Module) -> bool:
    """Return whether an adapter is on `model`, active or not."""
    return state_of(model) is not None


def other_adapter(model: nn.Module, name: str) -> OtherAdapter:
    """Return the adapter `name` of `model`, for a method that builds on an existing adapter (a router, a fusion).

    Raises:
        PeftcoreError: `model` has no adapter with this name.
    """
    if not has_adapters(model):
        raise PeftcoreError(f"the model has no adapter '{name}'. Apply or load it first, with adapter='{name}'")
    entry = applied(model, name)
    return OtherAdapter(name, entry.method, entry.config, dict(adapter_modules(model, name)))
