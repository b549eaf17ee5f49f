"""What is applied to a model: the record of its adapters, kept on the model itself, and where they stand.

A deep copy or a pickle of the model carries it along.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from peftcore.adaptation import adapted
from peftcore.adaptation.adapted import TRAINED
from peftcore.adaptation.concurrency import ModelLock
from peftcore.engine.changes import Site, changes, changes_of_trained, standing
from peftcore.engine.intact import Intact
from peftcore.engine.trained import TrainedParameters
from peftcore.errors import PeftcoreError, nearest
from peftcore.events import adapters_wanted
from peftcore.method import AdapterPlacement, Around

STATE = "_peftcore_state"


@dataclass
class Applied:
    """One adapter on a model: its method, its config with all choices explicit, and where it stands.

    Args:
        placements: what the method placed, by the path of the module that carries it; a prompt has several modules, and
            several changes of parameters may stand on one.
        trained: parameters of the base, by name.
        multiplier: of its change, as `peftcore.scale` sets it.
        reads: the arguments of calls that its adapters read; None: they ask for none.
        whole_batch: one of its adapters does not treat the samples of a batch apart.
        frozen: since it came to rest, or trains no more, none of its parameters asks for gradients.
        froze: the branches that it froze, which are trainable again once it is removed.
        missed_steps: optimizer steps on it without `after_step`; None: its method needs none, it had one, or a warning
            was given.
    """

    method: str
    config: Any
    placements: dict[str, tuple[AdapterPlacement, ...]] = field(default_factory=dict)
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
        """Of the modules at which it stands."""
        return tuple(self.placements)

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """Names of the adapters that it combines."""
        placed = (placement for each in self.placements.values() for placement in each)
        return tuple(dict.fromkeys(name for p in placed if isinstance(p, Around) for name in p.branches))


@dataclass
class State:
    """What is applied to a model, the active adapters in the order of their chain, and what the base was.

    What is asked at each change costs what that change touches: `sites` are there so that nobody walks all adapters.
    """

    applied: dict[str, Applied] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)  # by the path of each module that has adapters
    active: tuple[str, ...] = ()
    requires_grad: dict[str, bool] = field(default_factory=dict)
    merged: Any = None  # peftcore.merging.merge.Merged
    samples: tuple[str | None, ...] | None = None  # with activate(..., per_sample=True): whose each sample is
    lock: ModelLock = field(default_factory=ModelLock)
    own_parameters: list[tuple[str, str]] = field(default_factory=list)  # (path, adapter) of `OwnParameters`
    resting: dict[str, Any] = field(default_factory=dict)  # `checkpoint.resident.Resting` by name, the last used last
    limit: int | None = None  # bytes of those of them that are in memory
    intact: Intact | None = None  # of `sites`, when they were last found to be what they were

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "intact": None}  # of a copy, whose modules are others


def state_of(model: nn.Module) -> State | None:
    """What is applied to `model`, or None."""
    return getattr(model, "__dict__", {}).get(STATE)


def require_state(model: nn.Module) -> State:
    """What is applied to `model`.

    Raises:
        PeftcoreError: nothing is, or it is no model.
    """
    check_model(model)
    state = state_of(model)
    if state is None:
        for attribute in ("_orig_mod", "module"):  # of torch.compile; of DistributedDataParallel and its kin
            inner = getattr(model, attribute, None)
            if isinstance(inner, nn.Module) and state_of(inner) is not None:
                raise PeftcoreError(f"the adapters are applied to the model inside: give model.{attribute}")
        raise PeftcoreError("no adapter is applied to this model. Try: peftcore.apply(model, 'METHOD')")
    return state


def applied(model: nn.Module, adapter: str) -> Applied:
    """The record of one adapter.

    Raises:
        PeftcoreError: no such adapter is applied.
    """
    state = require_state(model)
    if not isinstance(adapter, str):
        raise PeftcoreError(f"an adapter's name is a string, found {adapter!r}")
    if adapter not in state.applied:
        if adapter in state.resting:
            raise PeftcoreError(
                f"the adapter '{adapter}' rests on disk ('{state.resting[adapter].folder}'). It comes into memory with "
                f"peftcore.activate(model, '{adapter}')"
            )
        there = ", ".join(state.applied)
        near = nearest(adapter, [*state.applied, *state.resting])
        raise PeftcoreError(f"no adapter '{adapter}' is applied (applied: {there}){near}")
    return state.applied[adapter]


def call_in(model: nn.Module, *adapters: str) -> None:
    """Have those of `adapters` in memory that rest on disk, beside those that act."""
    state = state_of(model)
    if state is not None and state.resting:
        adapters_wanted.announce(model, adapters, state.active)


def adapter_modules(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    """(path of the adapted module, adapter) for every placement of `adapter` that is still there."""
    applied(model, adapter)
    for path, module in modules_with(model, require_state(model), adapter):
        yield path, adapted.adapters_at(module)[adapter]


def placements(model: nn.Module, adapter: str) -> list[AdapterPlacement]:
    """Each placement of `adapter` that is still there, once, in the order in which they were placed."""
    entry = applied(model, adapter)
    standing = (each for path, _ in adapter_modules(model, adapter) for each in entry.placements[path])
    return list({id(placement): placement for placement in standing}.values())


def adapter_parameters(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that `adapter` trains, those of the base included."""
    for path, module in adapter_modules(model, adapter):
        for name, parameter in module.named_parameters():
            yield (f"{path}.{name}" if path else name), parameter
    own = TrainedParameters.of(model, adapter)
    if own is not None:
        yield from own.values(model)


def changed(model: nn.Module) -> dict[str, str]:
    """By path, what has become of modules with adapters since `apply`."""
    state = state_of(model)
    if state is None:
        return {}
    return {path: change for name in state.applied for path, change in changes_of(model, state, name)}


def refuse_changed(model: nn.Module) -> None:
    """Raise a PeftcoreError if modules with adapters were replaced, resized or parametrized since `apply`."""
    state = require_state(model)
    if intact(model, state) is not None:
        return
    anything = next(changes(model, state.sites.items(), state.lock, shapes=state.merged is None), None)
    for name in state.applied:
        modules = (
            dict(changes_of_trained(model, name, state.lock))
            if anything is None
            else dict(changes_of(model, state, name))
        )
        if modules:
            raise PeftcoreError(
                f"the model was changed after the adapter '{name}' was applied: {in_words(modules)}. "
                f"Undo the change, or take the adapter off, peftcore.remove(model, '{name}'), and apply it to the "
                "changed model"
            )


def intact(model: nn.Module, state: State) -> Intact | None:
    """The modules with adapters, where nothing has become of one, and no adapter has something of the base's own."""
    if state.intact is None or not state.intact.still(state.sites):
        state.intact = None
        if TRAINED not in model._modules and state.merged is None:
            state.intact = Intact.of(model, state.sites, state.lock)
    return state.intact


def changes_of(model: nn.Module, state: State, adapter: str) -> Iterator[tuple[str, str]]:
    """(path, what has become of it) of the modules of `adapter` that are not what they were."""
    sites = ((path, state.sites[path]) for path in state.applied[adapter].paths)
    yield from changes(model, sites, state.lock, adapter=adapter, shapes=state.merged is None)
    yield from changes_of_trained(model, adapter, state.lock)


def modules_with(model: nn.Module, state: State, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of those at which `adapter` still stands."""
    if state.intact is not None and state.intact.still(state.sites):
        return ((path, state.intact.modules[path]) for path in state.applied[adapter].paths)
    return standing(model, adapter, state.applied[adapter].paths, state.lock)


def in_words(changes: dict[str, str], most: int = 3) -> str:
    """The first of these changes, in words."""
    parts = [f"'{path}' {what}" for path, what in list(changes.items())[:most]]
    return "; ".join(parts) + (f"; and {len(changes) - most} more" if len(changes) > most else "")


def refuse_merged(state: State, what: str) -> None:
    """Raise a PeftcoreError if adapters are merged. `what`: what cannot be done then, such as `save`."""
    if state.merged is not None:
        raise PeftcoreError(f"cannot {what}: adapters are merged into the base. First peftcore.unmerge(model)")


def refuse_per_sample(state: State, what: str) -> None:
    """Raise a PeftcoreError if each sample of a batch has an adapter of its own."""
    if state.samples is not None:
        raise PeftcoreError(
            f"cannot {what} while each sample has its own. First let some act on all: peftcore.activate(model, [...])"
        )


def check_model(model: Any) -> None:
    """Raise a PeftcoreError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise PeftcoreError(f"the model must be a torch.nn.Module, found {model!r:.200}")
