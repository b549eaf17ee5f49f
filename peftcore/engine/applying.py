"""Apply, activate, disable and remove adapters."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import nn

from peftcore import ranks
from peftcore.adaptation import adapted, enclosing, fast_path
from peftcore.adaptation.call import asked
from peftcore.adaptation.concurrency import Activation, refuse_running
from peftcore.engine.branches import check_branches, combined, refuse_needed, with_branches
from peftcore.engine.calling import ask_of_calls
from peftcore.engine.changes import facts, with_adapter
from peftcore.engine.first_values import give_first_values, initializer
from peftcore.engine.placing import (
    device_and_dtype,
    placements_for,
    recorded,
    refuse_shared,
    refuse_without_gradient,
    tell_if_little,
    with_memory,
)
from peftcore.engine.state import (
    STATE,
    Applied,
    State,
    adapter_modules,
    adapter_parameters,
    applied,
    changes_of,
    check_model,
    in_words,
    modules_with,
    refuse_changed,
    refuse_merged,
    refuse_per_sample,
    require_state,
    state_of,
)
from peftcore.engine.trained import TrainedParameters, hold_of_last, tied_to, unmoved_buffers
from peftcore.errors import PeftcoreError
from peftcore.events import adapter_applied
from peftcore.method import After, Around, Model

Function = TypeVar("Function", bound=Callable[..., Any])


def alone(what: str, *, base: bool = False) -> Callable[[Function], Function]:
    """For functions that change a model, their first argument: other threads neither call nor change it meanwhile.

    Args:
        what: for messages, such as `merge`.
        base: the base is changed too, which `disabled` shows, so open blocks of other threads are waited for.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def changing(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            check_model(model)
            state = state_of(model)
            if state is None:
                refuse_running(model, what)
                return function(model, *args, **kwargs)
            with state.lock.changing(what, base=base):
                return function(model, *args, **kwargs)

        return cast(Function, changing)

    return decorate


@alone("apply another adapter", base=True)
def apply(
    model: Model,
    method: str | Any,
    /,
    *,
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    batches: Iterable[Any] | None = None,
    **fields: Any,
) -> Model:
    """Fine-tune `model` by `method`: freeze its parameters and give it a trainable, active adapter.

    Args:
        method: name of an installed method, with the fields of its config as keywords, or a config object: its own, or
            one of Hugging Face PEFT's, which means what it would mean in a file.
        adapter: name of the new adapter. Adapters that stand already stay, active and trainable.
        dtype: of the adapter's parameters; by default float32 beside a 16-bit or quantized base, so that
            small updates are not rounded away, else the dtype of the layer.
        batches: for methods whose first values depend on data. Each is what the model is called with: a mapping of
            keyword arguments (with `labels`, where a method asks for gradients), a tuple of others, or a tensor. They
            are read while adapters that act already do, and this one rests.

    Returns:
        The same model, changed in place.

    Raises:
        PluginError: the method is not installed or broken.
        PeftcoreError: a field, pattern or name is wrong, or first values cannot be found. The model is then as it was
            but for what the method has prepared, such as a base in 4 bits.
    """
    return _apply(model, method, fields, adapter, dtype, batches, first_values=True)


@alone("apply another adapter", base=True)
def apply_to_fill(model: Model, config: Any, *, adapter: str = "default", dtype: torch.dtype | None = None) -> Model:
    """As `apply`, for an adapter whose values are there already and will be filled in."""
    return _apply(model, config, {}, adapter, dtype, None, first_values=False)


def _apply(
    model: Model,
    method: str | Any,
    fields: dict[str, Any],
    adapter: str,
    dtype: torch.dtype | None,
    batches: Iterable[Any] | None,
    *,
    first_values: bool,
) -> Model:
    state = state_of(model) or State()
    _check_new(adapter, state)
    refuse_merged(state, "apply another adapter")
    refuse_per_sample(state, "apply another adapter")
    check_dtype(dtype)
    if state.applied:
        refuse_changed(model)
    with with_memory():
        placed = placements_for(model, method, fields)
    initialize, its_config = initializer(placed.method, placed.config) if first_values else (None, None)
    if batches is not None and initialize is None:
        raise PeftcoreError(f"{placed.method.name} takes no first values from data. Leave batches out")
    check_branches(model, state, adapter, placed.around)
    refuse_without_gradient(model, placed)
    tell_if_little(model, placed)
    if placed.method.prepare is not None:
        placed.method.prepare(model, placed.config)
    of_method, config = recorded(placed)
    for placement in placed.around:
        module = model.get_submodule(placement.path)
        placement.adapter.to(*device_and_dtype(module, dtype)).train(model.training)

    before = {placement.path: facts(model.get_submodule(placement.path)) for placement in placed.around}
    for path in _enclosing_paths(model, [placement.path for placement in placed.around], placed.trained):
        enclosing.enclose(model.get_submodule(path), state.lock, root=not path)
    if not state.applied:
        state.requires_grad = {name: p.requires_grad for name, p in adapted.base_parameters(model)}
        for _, parameter in adapted.base_parameters(model):
            parameter.requires_grad_(False)
    for placement in placed.around:
        module = model.get_submodule(placement.path)
        behind = isinstance(placement, After)
        branches = placement.branches if isinstance(placement, Around) else ()
        adapted.attach(module, adapter, placement.adapter, behind=behind, branches=branches, lock=state.lock)
    TrainedParameters.attach(model, adapter, placed.trained, placed.apart)
    fast_path.guard(model)
    state.applied[adapter] = Applied(of_method.name, config, placed.placements, placed.trained, facts=before)
    model.__dict__[STATE] = state
    if initialize is not None:
        set_active(model, state.active)
        try:
            give_first_values(model, adapter, initialize, placed.method.name, its_config, batches)
        except BaseException:
            remove(model, adapter)
            raise
    set_active(model, (*state.active, adapter))
    adapter_applied.announce(model)
    return model


def _enclosing_paths(model: nn.Module, paths: Iterable[str], trained: Sequence[str]) -> list[str]:
    """The model, and every module in which something is placed: calls of them are calls of the model."""
    owners = {name.rpartition(".")[0] for name in (*trained, *tied_to(model, trained))}
    inner = [*paths, *(f"{owner}.parameter" for owner in owners)]
    enclosing_paths = {""}
    for path in inner:
        while path:
            path = path.rpartition(".")[0]
            enclosing_paths.add(path)
    return sorted(enclosing_paths)


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
    state = require_state(model)
    given = _names(names, per_sample)
    chosen = tuple(name for name in given if name is not None)
    if per_sample:
        chosen = tuple(dict.fromkeys(chosen))
    for name in chosen:
        applied(model, name)
    if len(set(chosen)) < len(chosen):
        raise PeftcoreError(
            f"activate: an adapter is named twice in {list(chosen)}. For a name for each sample of a batch: "
            "per_sample=True"
        )
    refuse_changed(model)
    refuse_merged(state, "activate adapters")
    if per_sample:
        _refuse_whole_batch(model, with_branches(state, chosen))
    refuse_shared(state, chosen)
    set_active(model, chosen, given if per_sample else None)


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Within the block the model computes what its base computes; afterwards its adapters act again.

    As with `torch.no_grad`, that holds in the thread (and asyncio task) that entered the block, and in no other. Where
    active adapters train parameters of the base, which the block must exchange, calls of other threads wait for its
    end.

    Raises:
        PeftcoreError: no adapter is applied, the model is merged, or another thread keeps changing it.
    """
    state = require_state(model)
    block = state.lock.open_block()
    exchanged: list[TrainedParameters] = []
    try:
        refuse_merged(state, "disable adapters")
        if any(True for _ in _in_place_of_base(model, state)):
            state.lock.hold(block)
            exchanged = list(_in_place_of_base(model, state))
            hold_of_last(model, ())
        for own in exchanged:
            own.activate(model, False)
        with unmoved_buffers(model) if exchanged else nullcontext():
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
def remove(model: Model, adapter: str = "default") -> Model:
    """Take an adapter off. With the last one gone the model is, bit for bit, what it was before `apply`."""
    state = require_state(model)
    applied(model, adapter)
    refuse_merged(state, f"remove '{adapter}'")
    refuse_needed(state, adapter, "remove")
    left = dict(changes_of(model, state, adapter))
    there = list(with_adapter(model, adapter, state.applied[adapter].paths))
    if not all(adapted.is_outermost(module) for module in there if adapted.is_adapted(module)):
        ranks.refuse_sharded(model, f"remove '{adapter}'")  # `fully_shard` has swapped a class once more
    resting = {adapter, *state.applied[adapter].branches} if adapter in state.active else {adapter}
    set_active(model, tuple(name for name in state.active if name not in resting), state.samples)
    for module in there:
        adapted.detach(module, adapter)
    fast_path.guard(model)
    TrainedParameters.detach(model, adapter)
    del state.applied[adapter]
    ask_of_calls(model, state)
    inside = {p for e in state.applied.values() for p in _enclosing_paths(model, e.paths, e.trained)}
    for path, module in adapted.base_modules(model):
        if path in inside and module in there:
            enclosing.enclose(module, state.lock)  # what has lost this adapter holds those of others
    if not state.applied:
        for name, parameter in adapted.base_parameters(model):
            parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
        for _, module in adapted.base_modules(model):
            enclosing.release(module)
        state.lock.retired = True
        del model.__dict__[STATE]
    if left:
        warnings.warn(f"remove left the following as it is: {in_words(left)}", stacklevel=3)
    return model


@alone("set what trains")
def set_trainable(model: nn.Module, adapter: str, trainable: bool) -> None:
    """Let `adapter` train when active, or keep it frozen."""
    refuse_changed(model)
    applied(model, adapter).trainable = bool(trainable)
    state = require_state(model)
    set_active(model, state.active, state.samples)


def set_active(model: nn.Module, names: tuple[str, ...], samples: tuple[str | None, ...] | None = None) -> None:
    """Let `names` act and train in this order, and what combiners among them combine."""
    state = require_state(model)
    names = with_branches(state, names)
    own = {name: TrainedParameters.of(model, name) for name in state.applied}
    for name, tensors in own.items():
        if tensors is not None and name not in names:
            tensors.activate(model, False)
    state.active = names
    state.samples = samples and tuple(name if name in names else None for name in samples)
    acting = [name for name in names if name not in combined(state, names) or name in (samples or ())]
    for module in dict.fromkeys(module for name in state.applied for _, module in modules_with(model, state, name)):
        adapted.activate(module, [name for name in acting if name in adapted.adapters_at(module)], state.samples)
    for name in names:
        if (tensors := own[name]) is not None:
            tensors.activate(model, True)
    hold_of_last(model, names)
    ask_of_calls(model, state)
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


def _refuse_whole_batch(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        entry = applied(model, name)
        whole = (a for _, a in adapter_modules(model, name) if getattr(a, "whole_batch", False) or asked([a]))
        own = TrainedParameters.of(model, name)
        if entry.trained or (own is not None and own.has_moved(model)) or next(whole, None) is not None:
            raise PeftcoreError(
                f"'{name}' ({entry.method}) acts on a batch as a whole, so it cannot be given to single samples"
            )


def check_dtype(dtype: Any) -> None:
    """Raise a PeftcoreError unless `dtype` is None or one that an adapter can have."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise PeftcoreError(f"dtype must be a floating torch.dtype such as torch.bfloat16, found {dtype!r}")
