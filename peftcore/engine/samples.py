"""Adapters per sample: where samples are in each adapted module's tensors, and PEFT's `adapter_names` of a call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from peftcore.engine.adaptation.adapted import adapters_of, attach, detach
from peftcore.engine.adaptation.concurrency import Activation
from peftcore.engine.changes import module_at
from peftcore.engine.state import (
    State,
    applied,
    modules_with,
    refuse_changed,
    refuse_merged,
    require_state,
)
from peftcore.engine.trained import TrainedParameters
from peftcore.errors import PeftcoreError
from peftcore.model import observe
from peftcore.model.rows import ROWS
from peftcore.model.sample_rows import rows_of
from peftcore.plugin.call import CallContext
from peftcore.plugin.events import adapter_names_given

_BASE = "__base__"  # PEFT's name for no adapter


def observe_rows(model: nn.Module, state: State) -> None:
    """Record at each module with adapters where samples are in its tensors."""
    modules = modules_by_sample(model, state)
    found = {} if all(ROWS in module.__dict__ for _, module in modules) else rows_of(model)
    for path, module in modules:
        if ROWS not in module.__dict__:
            known = found.get(path, "the model has changed since it was observed")
            module.__dict__[ROWS] = f"at '{path}', {known}" if isinstance(known, str) else known
    if found:
        model.__dict__[ROWS] = found[""]


def modules_by_sample(model: nn.Module, state: State) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of modules with attached adapters or with adapter-owned parameters."""
    attached: Iterable[tuple[str, nn.Module]]
    if state.snapshot is not None:
        attached = state.snapshot.modules.items()
    else:
        attached = (each for name in state.applied for each in modules_with(model, state, name))
    own = ((path, model.get_submodule(path)) for path, _ in state.own_parameters)
    return list(dict.fromkeys((*attached, *own)))


class OwnParameters(nn.Module):
    """The values that an adapter trains for one module's parameters, used for the samples that have the adapter.

    Args:
        own: the adapter's own parameters.
        names: {name of a parameter in the module: its name in `own`}.
    """

    def __init__(self, own: TrainedParameters, names: dict[str, str]) -> None:
        super().__init__()
        self.__dict__["own"] = own  # not a child: its values are in the state dict already
        self.names = names

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        values = {name: partial(self._value, key) for name, key in self.names.items()}
        return base.on_weights(values)(*args, **kwargs)

    def _value(self, key: str, _base: Tensor) -> Tensor:
        own: TrainedParameters = self.__dict__["own"]
        return own.aside(key)


def place_own_parameters(model: nn.Module, state: State, names: Iterable[str]) -> None:
    """Make modules whose parameters some of the adapters `names` train compute with each sample's own values."""
    for name in names:
        own = TrainedParameters.of(model, name)
        for path, keys in ({} if own is None else own.by_module()).items():
            module = module_at(model, path)
            there = None if module is None else adapters_of(module)
            if module is not None and (there is None or name not in there):
                attach(module, name, OwnParameters(own, keys), lock=state.lock)  # type: ignore[arg-type]  # not None
                state.own_parameters.append((path, name))


def remove_own_parameters(model: nn.Module, state: State) -> None:
    """Undo `place_own_parameters`."""
    while state.own_parameters:
        path, name = state.own_parameters.pop()
        module = module_at(model, path)
        there = None if module is None else adapters_of(module)
        if module is not None and there is not None and isinstance(there._modules.get(name), OwnParameters):
            detach(module, name)


def refuse_whole_batch(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a PeftcoreError if one of these adapters cannot act on single samples of a batch."""
    for name in names:
        entry, own = applied(model, name), TrainedParameters.of(model, name)
        why = None if own is None else _not_by_sample(model, own, set(entry.paths))
        if entry.whole_batch or why is not None:
            raise PeftcoreError(
                f"'{name}' ({entry.method}) acts on a batch as a whole, so it cannot be given to single samples"
                + (f": {why}" if why else "")
            )


def _not_by_sample(model: nn.Module, own: TrainedParameters, adapted_paths: Collection[str]) -> str | None:
    """Return why trained parameters cannot differ between the samples of a batch; None if they can."""
    if own.has_moved(model):
        return "it has buffers of its own, such as statistics"
    rows: dict[str, Any] = rows_of(model) if own.slots else {}
    read = {name.rpartition(".")[0] for name in observe(model).other_reads} if own.slots else set()
    for path in own.by_module():
        known = rows.get(path, "the module is missing")
        if isinstance(known, str):
            return f"it trains parameters of '{path}', whose input cannot be divided into samples: {known}"
        if path in read or not path:
            return f"it trains parameters of '{path}', which are read without a call of that module"
        if path in adapted_paths:
            return f"it trains parameters of '{path}', to which it also adds an adapter"
    return None


def _choose(model: nn.Module, names: Any, use: Callable[[Activation], object]) -> None:
    """Call `use` with the activation for `model(..., adapter_names=names)`."""
    state = require_state(model)
    is_list = isinstance(names, Sequence) and not isinstance(names, str) and len(names) > 0
    if not is_list or not all(isinstance(name, str) for name in names):
        raise PeftcoreError(
            f"adapter_names must be a list with the name of an adapter for each sample, '{_BASE}' for none, found "
            f"{names!r:.200}"
        )
    if model.training:
        raise PeftcoreError(
            "adapter_names are for inference, but the model is in training mode. Call model.eval() first"
        )
    samples = tuple(None if name == _BASE else name for name in names)
    wanted = tuple(name for name in dict.fromkeys(samples) if name is not None)
    refuse_changed(model)
    refuse_merged(state, "give each sample its adapter")
    refuse_whole_batch(model, wanted)
    for name in state.active:
        own = TrainedParameters.of(model, name)
        if own is not None and (own.active or own.held):
            raise PeftcoreError(
                f"the active adapter '{name}' trains parameters of the base, which all samples would share. Deactivate "
                "it first: peftcore.activate(model, [])"
            )
    place_own_parameters(model, state, wanted)
    observe_rows(model, state)
    require_call_context(state)
    use(Activation(wanted, samples))


adapter_names_given.subscribe(_choose)


def require_call_context(state: State) -> CallContext:
    """Return what adapters read of the model's calls; made here if no adapter has read any."""
    if state.lock.context is None:
        state.lock.context = CallContext()
    return state.lock.context
