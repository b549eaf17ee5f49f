"""Activate adapters for a whole batch or per sample (`activate`, `disabled`, `call_arguments`), and choose which train.

A combiner is an adapter that calls other adapters of its module as branches (`Placement.branches`). While a combiner
is active, its branches act only through it. Applying it freezes them; `set_trainable` lets them train with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

from peftcore.engine.adaptation import adapted
from peftcore.engine.adaptation.adapted import adapters_of, attach, detach
from peftcore.engine.adaptation.concurrency import Activation, Block
from peftcore.engine.changed_modules import module_at
from peftcore.engine.preflight import refuse_shared
from peftcore.engine.state import (
    State,
    applied,
    current_snapshot,
    exclusive,
    modules_with,
    refuse_changed,
    refuse_merged,
    require_state,
)
from peftcore.engine.trained_parameters import TrainedParameters, place_untrained_tensors, restored_buffers
from peftcore.errors import PeftcoreError, nearest, with_argument_hints
from peftcore.model import observe
from peftcore.model.base_modules import ROWS
from peftcore.model.rows import rows_of
from peftcore.plugin.adapter import Base
from peftcore.plugin.call import CallContext
from peftcore.plugin.events import adapter_names_given
from peftcore.plugin.method import Model
from peftcore.plugin.modules import parts


@with_argument_hints
@exclusive("activate adapters", base=True)
def activate(model: Model, adapters: str | Sequence[str | None], *, per_sample: bool = False) -> Model:
    """Activate `adapters`, in this order, and make them trainable; deactivate and freeze all others.

    Args:
        model: a model with adapters.
        adapters: one or several names of adapters; an empty list for the base alone. With `per_sample`, one entry per
            sample of the batch: the name of an adapter, or None for the base alone.
        per_sample: pass each sample through its own adapter. The batch (dimension 0 of every input) must have
            `len(adapters)` samples; `generate` may repeat them for beams and for several answers. Meant for inference:
            the fused operator runs only without gradients.

    Returns:
        The model. A forward pre-hook must not return it, because PyTorch would use it as the new input.

    Raises:
        PeftcoreError: a name is unknown, two adapters train the same parameter, or the model is merged. With
            per_sample, also if an adapter acts on the whole batch (prompts, prefixes, trained base parameters).

    Examples:
        >>> peftcore.activate(model, ["style", "domain"])                     # both, in this order
        >>> peftcore.activate(model, ["ann", None, "eve"], per_sample=True)   # for a batch of three
    """
    state = require_state(model)
    entries = _check_names(adapters, per_sample)
    names = tuple(name for name in entries if name is not None)
    if per_sample:
        names = tuple(dict.fromkeys(names))
    for name in names:
        applied(model, name)
    if len(set(names)) < len(names):
        raise PeftcoreError(
            f"activate got the same adapter twice: {list(names)}. Name each adapter once, or pass per_sample=True to "
            "choose an adapter for each sample of a batch"
        )
    refuse_changed(model)
    refuse_merged(state, "activate adapters")
    if per_sample:
        refuse_whole_batch(model, with_branches(state, names))
    else:
        refuse_shared(state, names)
    set_active(model, names, entries if per_sample else None)
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Disable all adapters inside the block; the active ones act again afterwards.

    As with `torch.no_grad`, this affects only the thread (and asyncio task) that entered the block. If active adapters
    train base parameters, the block restores the original values, and calls from other threads wait until it ends.

    Raises:
        PeftcoreError: no adapter is applied, the model is merged, or another thread keeps changing the model.

    Examples:
        >>> with peftcore.disabled(model):
        ...     base_logits = model(**batch).logits
        >>> logits = model(**batch).logits              # with adapters
    """
    state = require_state(model)
    block = Block(state.lock)
    replacements: list[TrainedParameters] = []
    try:
        state.lock.open_block(block)
        refuse_merged(state, "disable adapters")
        if any(True for _ in _in_place_of_base(model, state)):
            state.lock.hold(block)
            replacements = list(_in_place_of_base(model, state))
            place_untrained_tensors(model, ())
        for tensors in replacements:
            tensors.activate(model, False)
        with restored_buffers(model) if replacements else nullcontext():
            yield model
    finally:
        for tensors in replacements:
            tensors.activate(model, True)
        if replacements:
            place_untrained_tensors(model, state.active)
        state.lock.close_block(block)


def _in_place_of_base(model: nn.Module, state: State) -> Iterator[TrainedParameters]:
    """Yield the trained parameters of adapters that currently replace base tensors in the model."""
    for name in state.applied:
        tensors = TrainedParameters.of(model, name)
        if tensors is not None and (tensors.active or tensors.active_untrained):
            yield tensors


@exclusive("set what trains")
def set_trainable(model: nn.Module, adapter: str, trainable: bool) -> None:
    """Set whether `adapter` trains while it is active."""
    refuse_changed(model)
    entry, state = applied(model, adapter), require_state(model)
    _refuse_stopped_merge(state)
    entry.trainable = bool(trainable)
    for other_entry in state.applied.values():
        other_entry.froze.discard(adapter)
    set_active(model, state.active, state.samples)


def set_active(
    model: nn.Module,
    names: tuple[str, ...],
    samples: tuple[str | None, ...] | None = None,
    *,
    base_exchanged: bool = False,
) -> None:
    """Activate `names` in order, together with the branches of combiners among them, and make them trainable.

    Adapters that stay inactive are not visited. If `names` starts with all active adapters, only the modules of the
    added adapters are visited. After an error, the previous adapters are active.

    Args:
        base_exchanged: base tensors were replaced since the chains were built, so the weight format of each module is
            looked up again.
    """
    state = require_state(model)
    _refuse_stopped_merge(state)
    previous_names, previous_samples = state.active, state.samples
    try:
        _change_active(model, state, names, samples, same_base=not base_exchanged)
    except BaseException:
        if state.snapshot is not None:
            state.snapshot.per_sample = False  # the chains of some modules may have been built
        _change_active(model, state, previous_names, previous_samples, same_base=False)
        raise


def _refuse_stopped_merge(state: State) -> None:
    if state.merged is not None and state.merged.stopped:
        refuse_merged(state, "change the active adapters")


def _change_active(
    model: nn.Module,
    state: State,
    names: tuple[str, ...],
    samples: tuple[str | None, ...] | None,
    *,
    same_base: bool,
) -> None:
    names = with_branches(state, names)
    by_sample, was_by_sample = samples is not None, state.samples is not None
    grows = same_base and not by_sample and not was_by_sample and _extends_active(state, names)
    changed_names = names[len(state.active) :] if grows else _with_deactivated(state, names)
    own_tensors = _own_tensors(model, changed_names)
    in_model = () if by_sample else names  # the adapters whose trained tensors may be in the model
    remove_own_parameters(model, state)
    _exchange_own_tensors(model, own_tensors, [name for name in own_tensors if name not in in_model], active=False)
    state.active = names
    state.samples = samples and tuple(name if name in names else None for name in samples)
    if by_sample:
        place_own_parameters(model, state, names)
        _choose_by_sample(model, state)
    elif grows:
        _extend_chains(model, state, changed_names)
    else:
        _build_chains(model, state, None if was_by_sample else changed_names, same_base=same_base)
    _exchange_own_tensors(model, own_tensors, [name for name in own_tensors if name in in_model], active=True)
    place_untrained_tensors(model, names)
    if by_sample != was_by_sample:
        update_call_context(state)
    training = tuple(name for name in names if state.applied[name].trainable)
    _set_requires_grad(model, state, changed_names, training)
    state.lock.activation = Activation(state.active, state.samples, training)


def _with_deactivated(state: State, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of adapters that `names` deactivates, followed by `names`."""
    # Deactivate first: a new adapter may train the same parameter as a deactivated one.
    deactivated = [name for name in state.active if name not in names]
    return tuple(dict.fromkeys([*deactivated, *names]))


def _exchange_own_tensors(
    model: nn.Module, own_tensors: Mapping[str, TrainedParameters], names: Iterable[str], *, active: bool
) -> None:
    """Put the trained parameters of the adapters `names` into the model, or restore the base's."""
    for name in names:
        own_tensors[name].activate(model, active)


def _extends_active(state: State, names: tuple[str, ...]) -> bool:
    """Return whether `names` only adds adapters around the active ones, none of them a combiner."""
    count = len(state.active)
    return len(names) > count and names[:count] == state.active and not branches_of(state, names)


def _own_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, TrainedParameters]:
    """Return {adapter: its copies of base tensors} for the adapters that have some."""
    own_tensors: dict[str, TrainedParameters] = {}
    for name in names:
        tensors = TrainedParameters.of(model, name)
        if tensors is not None:
            own_tensors[name] = tensors
    return own_tensors


def _extend_chains(model: nn.Module, state: State, names: Sequence[str]) -> None:
    """Append the adapters `names` to the chains of their modules, as the outermost links."""
    for name in names:
        for _, module in modules_with(model, state, name):
            adapted.activate_outermost(module, name)


def _build_chains(model: nn.Module, state: State, changed_names: Sequence[str] | None, *, same_base: bool) -> None:
    """Build the chains of the modules to which adapters `changed_names` are attached, or of all modules if None."""
    branches = branches_of(state, state.active)
    acting = [name for name in state.active if name not in branches]
    snapshot = current_snapshot(model, state)
    modules = _all_modules(model, state) if changed_names is None else _modules_of(model, state, changed_names)
    for module in modules:
        adapters = adapted.adapters_at(module)
        names = [name for name in acting if name in adapters]
        adapted.activate(module, names, same_base=same_base and snapshot is not None)
    if snapshot is not None:
        snapshot.per_sample = False


def _choose_by_sample(model: nn.Module, state: State) -> None:
    """Make all modules look up the adapter of each sample at every call."""
    snapshot = current_snapshot(model, state)
    if snapshot is not None and snapshot.per_sample:
        return
    observe_rows(model, state)
    for _, module in modules_by_sample(model, state):
        if not adapted.is_per_sample(module):
            adapted.activate(module, None)
    if snapshot is not None:
        snapshot.per_sample = True


def _all_modules(model: nn.Module, state: State) -> list[nn.Module]:
    """Return the modules to which adapters are attached."""
    if state.snapshot is not None:
        return list(state.snapshot.modules.values())
    return _modules_of(model, state, state.applied)


def _modules_of(model: nn.Module, state: State, names: Iterable[str]) -> list[nn.Module]:
    """Return the modules to which one of the adapters `names` is attached."""
    modules: dict[nn.Module, None] = {}  # a dictionary preserves the order
    for name in names:
        modules.update((module, None) for _, module in modules_with(model, state, name))
    return list(modules)


def _set_requires_grad(model: nn.Module, state: State, touched: Iterable[str], training: Collection[str]) -> None:
    """Set `requires_grad` on the adapters that train; clear it on the others in `touched`."""
    for name in touched:
        entry, trains = state.applied[name], name in training
        if trains or not entry.frozen:
            for parameter in _parameters(model, state, name):
                parameter.requires_grad_(trains)
            entry.frozen = not trains


def _parameters(model: nn.Module, state: State, name: str) -> list[nn.Parameter]:
    """Return the parameters of an adapter, like `adapter_parameters` but without names and three times faster."""
    parameters: list[nn.Parameter] = []
    for _, module in modules_with(model, state, name):
        for part in parts(adapted.adapters_at(module)[name]):
            for parameter in part._parameters.values():
                if parameter is not None:
                    parameters.append(parameter)
    tensors = TrainedParameters.of(model, name)
    if tensors is not None:
        parameters += [parameter for _, parameter in tensors.values(model)]
    return parameters


def _check_names(names: object, per_sample: bool) -> tuple[str | None, ...]:
    """Return the argument `adapters` of `activate` as a tuple of names; raise a PeftcoreError if it is invalid."""
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(name is None or isinstance(name, str) for name in names):
        raise PeftcoreError(
            f"activate takes an adapter name or a list of names, found {names!r}. To deactivate all adapters, pass []"
        )
    if None in names and not per_sample:
        raise PeftcoreError(
            f"activate got None in {list(names)}, which stands for a sample without an adapter and needs "
            "per_sample=True. For one choice for all samples, leave None out"
        )
    return tuple(names)


@contextmanager
def call_arguments(model: nn.Module, **values: Any) -> Iterator[None]:
    """Pass `values`, such as task_ids, to the adapters in each call of `model` inside the block.

    `model(..., task_ids=t)` passes them for one call, and takes precedence. The block affects the thread (and asyncio
    task) that entered it. `generate` repeats tensors for the beams of each row.

    Raises:
        PeftcoreError: no adapter is applied, or none reads an argument of that name.

    Examples:
        >>> with peftcore.call_arguments(model, task_ids=task_ids):
        ...     loss = model(**batch).loss
    """
    context = require_state(model).lock.context
    names = context.names if context is not None else frozenset()
    for name in values:
        if name not in names:
            hint = f"Arguments that adapters read: {', '.join(sorted(names))}" if names else "They read no arguments"
            raise PeftcoreError(f"no adapter on the model reads the argument '{name}'{nearest(name, names)}. {hint}")
    if context is None:
        yield
        return
    with context.given(values):
        yield


def update_call_context(state: State) -> None:
    """Track calls of the model if any adapter, active or not, reads the call, or if activation is per sample."""
    reads = [entry.reads for entry in state.applied.values() if entry.reads is not None]
    if not reads and state.samples is None:
        state.lock.context = None
        return
    require_call_context(state).names = frozenset().union(*reads)


def freeze_branches(state: State, adapter: str) -> None:
    """Freeze the adapters that `adapter` combines, until it is removed or `set_trainable` is called."""
    for name in state.applied[adapter].branches:
        if state.applied[name].trainable:
            state.applied[name].trainable = False
            state.applied[adapter].froze.add(name)


def release_branches(state: State, adapter: str) -> None:
    """Make the branches that `adapter` froze trainable again."""
    for name in state.applied[adapter].froze & state.applied.keys():
        state.applied[name].trainable = True


def with_branches(state: State, names: Sequence[str]) -> tuple[str, ...]:
    """Return `names` with the missing branches of each combiner inserted before the combiner."""
    all_names: list[str] = []
    for name in names:
        all_names += [branch for branch in state.applied[name].branches if branch not in names]
        all_names.append(name)
    return tuple(dict.fromkeys(all_names))


def branches_of(state: State, names: Sequence[str]) -> set[str]:
    """Return the branches of the combiners among `names`; branches are not active by themselves."""
    return set(chain.from_iterable(state.applied[name].branches for name in names))


def refuse_needed(state: State, adapter: str) -> None:
    """Raise a PeftcoreError if `adapter` cannot be removed because another adapter combines it."""
    combiner = next((name for name, entry in state.applied.items() if adapter in entry.branches), None)
    if combiner is not None:
        raise PeftcoreError(
            f"cannot remove '{adapter}': '{combiner}' combines it. First peftcore.remove(model, '{combiner}')"
        )


_BASE = "__base__"  # PEFT's name for no adapter


def observe_rows(model: nn.Module, state: State) -> None:
    """Record for each module with adapters which rows of its tensors belong to which sample."""
    modules = modules_by_sample(model, state)
    rows_by_path = {} if all(ROWS in module.__dict__ for _, module in modules) else rows_of(model)
    for path, module in modules:
        if ROWS not in module.__dict__:
            rows = rows_by_path.get(path, "the model has changed since its last traced forward")
            module.__dict__[ROWS] = f"at '{path}', {rows}" if isinstance(rows, str) else rows
    if rows_by_path:
        model.__dict__[ROWS] = rows_by_path[""]


def modules_by_sample(model: nn.Module, state: State) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of modules with attached adapters or with adapter-owned parameters."""
    with_adapters: Iterable[tuple[str, nn.Module]]
    if state.snapshot is not None:
        with_adapters = state.snapshot.modules.items()
    else:
        with_adapters = chain.from_iterable(modules_with(model, state, name) for name in state.applied)
    with_own_parameters = ((path, model.get_submodule(path)) for path, _ in state.own_parameters)
    return list(dict.fromkeys((*with_adapters, *with_own_parameters)))


class OwnParameters(nn.Module):
    """Trained values of one module's parameters, used for the samples that have the adapter.

    Args:
        tensors: the adapter's trained parameters.
        names: {name of a parameter in the module: its name in `tensors`}.
    """

    def __init__(self, tensors: TrainedParameters, names: dict[str, str]) -> None:
        super().__init__()
        self.__dict__["tensors"] = tensors  # not a submodule: its values are already in the state dict
        self.names = names

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        values = {name: partial(self._value, key) for name, key in self.names.items()}
        return base.on_weights(values)(*args, **kwargs)

    def _value(self, key: str, _base: Tensor) -> Tensor:
        tensors: TrainedParameters = self.__dict__["tensors"]
        return tensors.counterpart(key)


def place_own_parameters(model: nn.Module, state: State, names: Iterable[str]) -> None:
    """Make modules use, for each sample, the parameter values that its adapter trains."""
    for name in names:
        tensors = TrainedParameters.of(model, name)
        for path, keys in ({} if tensors is None else tensors.by_module()).items():
            module = module_at(model, path)
            adapters = None if module is None else adapters_of(module)
            if module is not None and (adapters is None or name not in adapters):
                attach(module, name, OwnParameters(tensors, keys), lock=state.lock)  # type: ignore[arg-type]  # not None
                state.own_parameters.append((path, name))


def remove_own_parameters(model: nn.Module, state: State) -> None:
    """Undo `place_own_parameters`."""
    while state.own_parameters:
        path, name = state.own_parameters.pop()
        module = module_at(model, path)
        adapters = None if module is None else adapters_of(module)
        if module is not None and adapters is not None and isinstance(adapters._modules.get(name), OwnParameters):
            detach(module, name)


def refuse_whole_batch(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a PeftcoreError if one of these adapters cannot act on single samples of a batch."""
    for name in names:
        entry, tensors = applied(model, name), TrainedParameters.of(model, name)
        reason = None if tensors is None else _why_not_by_sample(model, tensors, set(entry.paths))
        if entry.whole_batch or reason is not None:
            raise PeftcoreError(
                f"'{name}' ({entry.method}) acts on the batch as a whole, so it cannot be active for single samples. "
                "Run the samples of this adapter in a separate batch" + (f": {reason}" if reason else "")
            )


def _why_not_by_sample(model: nn.Module, tensors: TrainedParameters, adapted_paths: Collection[str]) -> str | None:
    """Return the reason why trained parameters cannot differ between samples of a batch; None if they can."""
    if tensors.differs_from_base(model):
        return "it has its own copies of buffers, such as the statistics of a norm"
    if not tensors.trained:
        return None
    rows_by_path = rows_of(model)
    paths_read_elsewhere = {name.rpartition(".")[0] for name in observe(model).other_reads}
    for path in tensors.by_module():
        rows = rows_by_path.get(path, "the module is missing")
        if isinstance(rows, str):
            return f"it trains parameters of '{path}', whose input cannot be split into samples: {rows}"
        if path in paths_read_elsewhere or not path:
            return f"it trains parameters of '{path}', which are read without calling that module"
        if path in adapted_paths:
            return f"it trains parameters of '{path}', to which it also adds an adapter"
    return None


def _activate_for_call(model: nn.Module, names: Any, use: Callable[[Activation], object]) -> None:
    """Call `use` with the activation for `model(..., adapter_names=names)`."""
    state = require_state(model)
    is_list = isinstance(names, Sequence) and not isinstance(names, str) and len(names) > 0
    if not is_list or not all(isinstance(name, str) for name in names):
        raise PeftcoreError(
            f"adapter_names must be a list with one adapter name per sample, or '{_BASE}' for the base alone, found "
            f"{names!r:.200}"
        )
    if model.training:
        raise PeftcoreError(
            "adapter_names only work in inference, but the model is in training mode. Call model.eval() first"
        )
    samples = tuple(None if name == _BASE else name for name in names)
    requested_names = tuple(name for name in dict.fromkeys(samples) if name is not None)
    refuse_changed(model)
    refuse_merged(state, "give each sample its adapter")
    refuse_whole_batch(model, requested_names)
    for name in state.active:
        tensors = TrainedParameters.of(model, name)
        if tensors is not None and (tensors.active or tensors.active_untrained):
            raise PeftcoreError(
                f"the active adapter '{name}' trains base parameters, which all samples would share. First call "
                "peftcore.activate(model, [])"
            )
    place_own_parameters(model, state, requested_names)
    observe_rows(model, state)
    require_call_context(state)
    use(Activation(requested_names, samples))


adapter_names_given.subscribe(_activate_for_call)


def require_call_context(state: State) -> CallContext:
    """Return the context through which adapters read the model's calls, and create it if there is none."""
    if state.lock.context is None:
        state.lock.context = CallContext()
    return state.lock.context
