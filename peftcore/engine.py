"""Apply, activate, disable and remove adapters.

What is applied to a model is kept on the model itself (`state_of`), so that a deep copy or a pickle
carries it along.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

from peftcore import adapted, fast_path, prompts, ranks
from peftcore.architecture import Architecture, detect
from peftcore.changed import Facts, changes, facts, standing, with_adapter
from peftcore.concurrency import Activation, ModelLock, refuse_running
from peftcore.errors import PeftcoreError, nearest
from peftcore.method import After, Around, Method, Train
from peftcore.registry import registry
from peftcore.targets import refuse_targeted, trained_modules
from peftcore.trained import TrainedParameters, hold_of_last, tied_to
from peftcore.validation import check_types

_STATE = "_peftcore_state"


@dataclass
class Applied:
    """One adapter on a model: its method, its config with all choices explicit, and where it stands."""

    method: str
    config: Any
    paths: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    trainable: bool = True
    facts: dict[str, Facts] = field(default_factory=dict)  # of the modules where it stands, as they were


@dataclass
class State:
    """What is applied to a model, the active adapters in the order of their chain, and what the base was."""

    applied: dict[str, Applied] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    requires_grad: dict[str, bool] = field(default_factory=dict)
    merged: Any = None  # peftcore.merge.Merged
    samples: tuple[str | None, ...] | None = None  # with activate(..., per_sample=True): whose each sample is
    lock: ModelLock = field(default_factory=ModelLock)


@dataclass(frozen=True)
class Placed:
    """A method's placements on one model: adapters at modules, and names of parameters that are trained."""

    method: Method
    config: Any
    around: tuple[Around | After, ...]
    trained: tuple[str, ...]
    apart: tuple[str, ...] = ()  # of those trained: apart from the parameters that they are tied to


def alone(what: str, *, base: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For functions that change a model, their first argument: other threads neither call nor change it meanwhile.

    Args:
        what: for messages, such as `merge`.
        base: the base is changed too, which `disabled` shows, so open blocks of other threads are waited for.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def changing(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            check_model(model)
            state = state_of(model)
            if state is None:
                refuse_running(model, what)
                return function(model, *args, **kwargs)
            with state.lock.changing(what, base=base):
                return function(model, *args, **kwargs)

        return changing

    return decorate


@alone("apply another adapter", base=True)
def apply(
    model: nn.Module,
    method: str | Any,
    /,
    *,
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    **fields: Any,
) -> nn.Module:
    """Fine-tune `model` by `method`: freeze its parameters and give it a trainable, active adapter.

    Args:
        method: name of an installed method, with the fields of its config as keywords, or a config object.
        adapter: name of the new adapter. Adapters that stand already stay, active and trainable.
        dtype: of the adapter's parameters; by default float32 beside a 16-bit or quantized base, so that
            small updates are not rounded away, else the dtype of the layer.

    Returns:
        The same model, changed in place.

    Raises:
        PluginError: the method is not installed or broken.
        PeftcoreError: a field, pattern or name is wrong. The model is then as it was.
    """
    state = state_of(model) or State()
    _check_new(adapter, state)
    _refuse_merged(state, "apply another adapter")
    refuse_per_sample(state, "apply another adapter")
    check_dtype(dtype)
    if state.applied:
        refuse_changed(model)
    with _with_memory():
        placed = place(model, method, fields)
    if placed.method.prepare is not None:
        placed.method.prepare(model, placed.config)
    method, config = _recorded(placed)
    for placement in placed.around:
        module = model.get_submodule(placement.path)
        placement.adapter.to(*device_and_dtype(module, dtype)).train(model.training)

    before = {placement.path: facts(model.get_submodule(placement.path)) for placement in placed.around}
    for path in _enclosing_paths(model, [placement.path for placement in placed.around], placed.trained):
        adapted.enclose(model.get_submodule(path), state.lock)
    if not state.applied:
        state.requires_grad = {name: p.requires_grad for name, p in adapted.base_parameters(model)}
        for _, parameter in adapted.base_parameters(model):
            parameter.requires_grad_(False)
    for placement in placed.around:
        module = model.get_submodule(placement.path)
        behind = isinstance(placement, After)
        adapted.attach(module, adapter, placement.adapter, behind=behind, lock=state.lock)
    TrainedParameters.attach(model, adapter, placed.trained, placed.apart)
    fast_path.guard(model)
    paths = tuple(placement.path for placement in placed.around)
    state.applied[adapter] = Applied(method.name, config, paths, placed.trained, facts=before)
    model.__dict__[_STATE] = state
    _set_active(model, (*state.active, adapter))
    if "transformers" in sys.modules and hasattr(model, "save_pretrained"):  # it must know how to save such a model
        import_module("peftcore.integrations.pretrained")
    return model


def _enclosing_paths(model: nn.Module, paths: Iterable[str], trained: Sequence[str]) -> list[str]:
    """The model, and every module in which something is placed: calls of them are calls of the model."""
    owners = {name.rpartition(".")[0] for name in (*trained, *tied_to(model, trained))}
    inner = [*paths, *(f"{owner}.parameter" for owner in owners)]
    found = {""}
    for path in inner:
        while path:
            path = path.rpartition(".")[0]
            found.add(path)
    return sorted(found)


def place(model: nn.Module, method: str | Any, fields: dict[str, Any]) -> Placed:
    """What a method would put where on `model`, checked; the model is left alone."""
    check_model(model)
    if hasattr(model, "_orig_mod"):
        raise PeftcoreError("the model is compiled. Apply to the model itself, then torch.compile it")
    _refuse_adapters_of_others(model)
    chosen, config = _method_and_config(method, fields)
    architecture = detect(model)
    config, saved, apart = _saved_modules(model, config, architecture)
    if hasattr(config, "resolved"):
        config = config.resolved(model, architecture)
    around: list[Around | After] = []
    trained: list[str] = []
    for placement in [*chosen.place(model, config, architecture), saved]:
        if isinstance(placement, Train):
            trained += placement.names
        elif isinstance(placement, (Around, After)):
            around.append(placement)
        else:
            around += prompts.compiled(model, architecture, placement)
    placed = Placed(chosen, config, tuple(around), tuple(dict.fromkeys(trained)), apart)
    _check_placed(model, placed)
    return placed


def _with_memory() -> AbstractContextManager[Any]:
    """Adapters have values, though the caller be under `torch.device("meta")` to build models without memory."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def _saved_modules(model: nn.Module, config: Any, architecture: Architecture) -> tuple[Any, Train, tuple[str, ...]]:
    """(config with all that `modules_to_save` means, its parameters, those of them that are trained apart).

    A module that is tied to one of them (the head to the embedding) is trained with it, as one parameter, unless
    the config says `ensure_weight_tying=False`.
    """
    saved = getattr(config, "modules_to_save", ())
    if saved is None and architecture.task_heads:
        saved = list(architecture.task_heads)
    names = trained_modules(model, saved or ()).names
    tied = tied_to(model, names)
    together = getattr(config, "ensure_weight_tying", True)
    if tied and together:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in tied)
        saved = [*saved, *(path for path in modules if not model.get_submodule(path)._modules)]
        refuse_targeted(getattr(config, "target_modules", None), modules, f"tied to {names[0]!r}")
        names = trained_modules(model, saved).names
    if saved != getattr(config, "modules_to_save", ()):
        config = dataclasses.replace(config, modules_to_save=saved)
    return config, Train(names), () if together else names


def device_and_dtype(module: nn.Module, dtype: torch.dtype | None) -> tuple[torch.device | None, torch.dtype]:
    """Where an adapter of `module` lives, and in what dtype, by `apply`'s rule."""
    device = next((p.device for _, p in adapted.base_parameters(module)), None)
    own = next((p.dtype for _, p in adapted.base_parameters(module) if p.is_floating_point()), torch.float32)
    return device, dtype or (own if own.itemsize >= 4 else torch.float32)


@alone("activate adapters", base=True)
def activate(model: nn.Module, names: str | Sequence[str | None], *, per_sample: bool = False) -> None:
    """Let the adapters `names` act, in this order, and train; all others rest and are frozen.

    Args:
        per_sample: `names` has an adapter, or None, for each sample of a batch, and each sample passes through its
            own. The batch, dimension 0 of every input, must then be as long as `names`. For inference: the fused
            operator is used without gradients.

    Raises:
        PeftcoreError: a name is unknown, two of them train one parameter, or the model is merged. With per_sample
            an adapter that acts on a whole batch: prompts, prefixes and parameters of the base.
    """
    state = _require_state(model)
    names = _names(names, per_sample)
    samples = names if per_sample else None
    if per_sample:
        names = tuple(dict.fromkeys(name for name in names if name is not None))
    for name in names:
        applied(model, name)
    if len(set(names)) < len(names):
        raise PeftcoreError(
            f"activate: an adapter is named twice in {list(names)}. For a name for each sample of a batch: "
            "per_sample=True"
        )
    refuse_changed(model)
    _refuse_merged(state, "activate adapters")
    if per_sample:
        _refuse_whole_batch(model, names)
    _refuse_shared(state, names)
    _set_active(model, names, samples)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes what its base computes; afterwards its adapters act again.

    As with `torch.no_grad`, that holds in the thread (and asyncio task) that entered the block, and in no other. Where
    active adapters train parameters of the base, which the block must exchange, calls of other threads wait for its
    end.

    Raises:
        PeftcoreError: no adapter is applied, the model is merged, or another thread keeps changing it.
    """
    state = _require_state(model)
    block = state.lock.open_block()
    exchanged: list[TrainedParameters] = []
    try:
        _refuse_merged(state, "disable adapters")
        if any(True for _ in _in_place_of_base(model, state)):
            state.lock.hold(block)
            exchanged = list(_in_place_of_base(model, state))
            hold_of_last(model, ())
        for own in exchanged:
            own.activate(model, False)
        yield model
    finally:
        for own in exchanged:
            own.activate(model, True)
        if exchanged:
            hold_of_last(model, state.active)
        state.lock.close_block(block)


def _in_place_of_base(model: nn.Module, state: State) -> Iterator[TrainedParameters]:
    """What adapters have of their own that stands in the base's place now."""
    for name in state.applied:
        own = TrainedParameters.of(model, name)
        if own is not None and (own.active or own.held):
            yield own


@alone("remove adapters", base=True)
def remove(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Take an adapter off. With the last one gone the model is, bit for bit, what it was before `apply`."""
    state = _require_state(model)
    applied(model, adapter)
    _refuse_merged(state, f"remove '{adapter}'")
    left = dict(_changes(model, state, adapter))
    there = list(with_adapter(model, adapter, state.applied[adapter].paths))
    if not all(adapted.is_outermost(module) for module in there if adapted.is_adapted(module)):
        ranks.refuse_sharded(model, f"remove '{adapter}'")  # `fully_shard` has swapped a class once more
    _set_active(model, tuple(name for name in state.active if name != adapter), state.samples)
    for module in there:
        adapted.detach(module, adapter)
    fast_path.guard(model)
    TrainedParameters.detach(model, adapter)
    del state.applied[adapter]
    inside = {p for e in state.applied.values() for p in _enclosing_paths(model, e.paths, e.trained)}
    for path, module in adapted.base_modules(model):
        if path in inside and module in there:
            adapted.enclose(module, state.lock)  # what has lost this adapter holds those of others
    if not state.applied:
        for name, parameter in adapted.base_parameters(model):
            parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
        for _, module in adapted.base_modules(model):
            adapted.release(module)
        state.lock.retired = True
        del model.__dict__[_STATE]
    if left:
        warnings.warn(f"remove left the following as it is: {_told(left)}", stacklevel=3)
    return model


def after_step(model: nn.Module, step: int, total_steps: int) -> None:
    """Tell the methods of the active adapters that an optimizer step is done; trainers call this."""
    state = _require_state(model)
    for name in state.active:
        entry = state.applied[name]
        method = registry.method(entry.method)
        if method.after_step is not None:
            adapters = [adapter for _, adapter in adapter_modules(model, name)]
            method.after_step(adapters, entry.config, step, total_steps)


def state_of(model: nn.Module) -> State | None:
    """What is applied to `model`, or None."""
    return getattr(model, "__dict__", {}).get(_STATE)


def applied(model: nn.Module, adapter: str) -> Applied:
    """The record of one adapter.

    Raises:
        PeftcoreError: no such adapter is applied.
    """
    state = _require_state(model)
    if not isinstance(adapter, str):
        raise PeftcoreError(f"an adapter's name is a string, found {adapter!r}")
    if adapter not in state.applied:
        there = ", ".join(state.applied)
        raise PeftcoreError(f"no adapter '{adapter}' is applied (applied: {there}){nearest(adapter, state.applied)}")
    return state.applied[adapter]


def adapter_modules(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    """(path of the adapted module, adapter) for every placement of `adapter` that is still there."""
    applied(model, adapter)
    for path, module in _standing(model, state_of(model), adapter):
        yield path, adapted.adapters_of(module)[adapter]


def refuse_changed(model: nn.Module) -> None:
    """Raise a PeftcoreError if modules with adapters were replaced, resized or parametrized since `apply`."""
    state = _require_state(model)
    for name in state.applied:
        found = dict(_changes(model, state, name))
        if found:
            raise PeftcoreError(
                f"the model was changed after the adapter '{name}' was applied: {_told(found)}. Undo the change, or "
                f"take the adapter off, peftcore.remove(model, '{name}'), and apply it to the changed model"
            )


def changed(model: nn.Module) -> dict[str, str]:
    """By path, what has become of modules with adapters since `apply`."""
    state = state_of(model)
    names = state.applied if state is not None else ()
    return {path: told for name in names for path, told in _changes(model, state, name)}


def _changes(model: nn.Module, state: State, adapter: str) -> Iterator[tuple[str, str]]:
    return changes(model, adapter, state.applied[adapter].facts, state.lock, shapes=state.merged is None)


def _standing(model: nn.Module, state: State, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    return standing(model, adapter, state.applied[adapter].paths, state.lock)


def _told(changes: dict[str, str], most: int = 3) -> str:
    told = [f"'{path}' {what}" for path, what in list(changes.items())[:most]]
    return "; ".join(told) + (f"; and {len(changes) - most} more" if len(changes) > most else "")


def adapter_parameters(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that `adapter` trains, those of the base included."""
    for path, module in adapter_modules(model, adapter):
        for name, parameter in module.named_parameters():
            yield (f"{path}.{name}" if path else name), parameter
    own = TrainedParameters.of(model, adapter)
    if own is not None:
        yield from own.values(model)


@alone("set what trains")
def set_trainable(model: nn.Module, adapter: str, trainable: bool) -> None:
    """Let `adapter` train when active, or keep it frozen."""
    refuse_changed(model)
    applied(model, adapter).trainable = bool(trainable)
    _set_active(model, state_of(model).active, state_of(model).samples)


def _set_active(model: nn.Module, names: tuple[str, ...], samples: tuple[str | None, ...] | None = None) -> None:
    state = state_of(model)
    own = {name: TrainedParameters.of(model, name) for name in state.applied}
    for name, tensors in own.items():
        if tensors is not None and name not in names:
            tensors.activate(model, False)
    state.active = names
    state.samples = samples and tuple(name if name in names else None for name in samples)
    for module in dict.fromkeys(module for name in state.applied for _, module in _standing(model, state, name)):
        adapted.activate(module, [name for name in names if name in adapted.adapters_of(module)], state.samples)
    for name in names:
        if own[name] is not None:
            own[name].activate(model, True)
    hold_of_last(model, names)
    for name, entry in state.applied.items():
        for _, parameter in adapter_parameters(model, name):
            parameter.requires_grad_(entry.trainable and name in names)
    training = tuple(name for name in names if state.applied[name].trainable)
    state.lock.activation = Activation(state.active, state.samples, training)


def _names(names: Any, per_sample: bool) -> tuple[str | None, ...]:
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(name is None or isinstance(name, str) for name in names):
        raise PeftcoreError(f"activate takes a name or a list of names, found {names!r}. To let none act: []")
    if None in names and not per_sample:
        raise PeftcoreError(
            f"activate: None in {list(names)} leaves a sample of a batch without an adapter, with per_sample=True. "
            "For the whole batch leave it out"
        )
    return tuple(names)


def _method_and_config(method: str | Any, fields: dict[str, Any]) -> tuple[Method, Any]:
    if not isinstance(method, str):
        if fields:
            raise PeftcoreError(f"give the fields {sorted(fields)} in the config, or the method by its name")
        chosen = registry.method_of_config(method)
        check_types(method)
        return chosen, method
    chosen = registry.method(method)
    known = [f.name for f in dataclasses.fields(chosen.config_class)]
    for name in fields:
        if name not in known:
            raise PeftcoreError(
                f"{chosen.config_class.__name__} has no field '{name}'{nearest(name, known)}. "
                f"Its fields: {', '.join(known)}"
            )
    check_types(chosen.config_class, fields)
    try:
        return chosen, chosen.config_class(**fields)
    except TypeError as error:
        raise PeftcoreError(f"{chosen.config_class.__name__}: {error}") from error


def _recorded(placed: Placed) -> tuple[Method, Any]:
    """The method whose adapter this is, and its config."""
    if placed.method.recorded_as is None:
        return placed.method, placed.config
    config = placed.method.recorded_as(placed.config)
    return registry.method_of_config(config), config


def check_name(adapter: Any) -> None:
    """Raise a PeftcoreError unless `adapter` can be the name of an adapter, a part of keys and paths."""
    if not isinstance(adapter, str) or not adapter:
        raise PeftcoreError(f"an adapter's name is a non-empty string, found {adapter!r}")
    for wrong in "./\\\0":
        if wrong in adapter:
            raise PeftcoreError(
                f"the adapter name {adapter!r} contains {wrong!r}, which paths and keys use. Choose another"
            )
    if hasattr(nn.Module, adapter):
        raise PeftcoreError(f"the adapter name '{adapter}' is an attribute of torch.nn.Module. Choose another")


def _check_new(adapter: str, state: State) -> None:
    check_name(adapter)
    if adapter in state.applied:
        raise PeftcoreError(
            f"an adapter '{adapter}' is applied already ({state.applied[adapter].method}). "
            f"Give another name (adapter=...), or take it off first: peftcore.remove(model, '{adapter}')"
        )


def _check_placed(model: nn.Module, placed: Placed) -> None:
    method = placed.method.name
    modules = dict(adapted.base_modules(model))
    seen: set[str] = set()
    for path in (placement.path for placement in placed.around):
        if path not in modules:
            raise PeftcoreError(f"{method} places an adapter at '{path}', which is no module{nearest(path, modules)}")
        if path in seen:
            raise PeftcoreError(f"{method} places two adapters at '{path}'; one module takes one of each name")
        seen.add(path)
    if not placed.around and not placed.trained:
        raise PeftcoreError(f"{method} places nothing on {type(model).__name__}")
    parameters = dict(adapted.base_parameters(model))
    for name in placed.trained:
        if name not in parameters:
            raise PeftcoreError(f"{method} trains '{name}', which is no parameter{nearest(name, parameters)}")
        dtype = parameters[name].dtype
        if not dtype.is_floating_point:
            raise PeftcoreError(f"{method} trains '{name}' of dtype {dtype}, which has no gradient")
    state = state_of(model) or State()
    entry = Applied(method, None, trained=placed.trained)  # it joins the active ones
    _refuse_shared(State({**state.applied, "(new)": entry}), (*state.active, "(new)"))


def _refuse_shared(state: State, active: Sequence[str]) -> None:
    owner: dict[str, str] = {}
    for name in active:
        for parameter in state.applied[name].trained:
            other = owner.setdefault(parameter, name)
            if other != name:
                raise PeftcoreError(
                    f"'{parameter}' is trained by the active adapter '{other}' already. Two at a time cannot train "
                    f"one parameter: let '{other}' rest first, with peftcore.activate(model, [...])"
                )


def _refuse_merged(state: State, what: str) -> None:
    if state.merged is not None:
        raise PeftcoreError(f"cannot {what}: adapters are merged into the base. First peftcore.unmerge(model)")


def refuse_per_sample(state: State, what: str) -> None:
    """Raise a PeftcoreError if each sample of a batch has an adapter of its own."""
    if state.samples is not None:
        raise PeftcoreError(
            f"cannot {what} while each sample has its own. First let some act on all: peftcore.activate(model, [...])"
        )


def _refuse_whole_batch(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        entry = applied(model, name)
        whole = (a for _, a in adapter_modules(model, name) if getattr(a, "whole_batch", False))
        own = TrainedParameters.of(model, name)
        if entry.trained or (own is not None and own.has_moved(model)) or next(whole, None) is not None:
            raise PeftcoreError(
                f"'{name}' ({entry.method}) acts on a batch as a whole, so it cannot be given to single samples"
            )


def _require_state(model: nn.Module) -> State:
    check_model(model)
    state = state_of(model)
    if state is None:
        for attribute in ("_orig_mod", "module"):  # of torch.compile; of DistributedDataParallel and its kin
            inner = getattr(model, attribute, None)
            if isinstance(inner, nn.Module) and state_of(inner) is not None:
                raise PeftcoreError(f"the adapters are applied to the model inside: give model.{attribute}")
        raise PeftcoreError("no adapter is applied to this model. Try: peftcore.apply(model, 'METHOD')")
    return state


def check_model(model: Any) -> None:
    """Raise a PeftcoreError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise PeftcoreError(f"the model must be a torch.nn.Module, found {model!r:.200}")


def check_dtype(dtype: Any) -> None:
    """Raise a PeftcoreError unless `dtype` is None or one that an adapter can have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise PeftcoreError(f"dtype must be a floating torch.dtype such as torch.bfloat16, found {dtype!r}")


def _refuse_adapters_of_others(model: nn.Module) -> None:
    """Adapters in adapters: another library's, or those of a model that this is a part of, or that is a part of it."""
    state = state_of(model)
    for path, module in model.named_modules():
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            raise PeftcoreError(
                f"the model has adapters of Hugging Face PEFT already ({path or 'the model itself'!r} is a "
                f"{type(module).__module__}.{type(module).__name__}). Save them with its save_pretrained(folder), and "
                "load them here on the plain base: peftcore.load(base, folder)"
            )
        lock = adapted.lock_of(module)
        if lock is not None and not lock.retired and (state is None or lock is not state.lock):
            raise PeftcoreError(
                f"{path or 'the model'!r} has adapters that were applied to another model, of which it is a part, or "
                "which is a part of this one. Apply all to one of them"
            )
