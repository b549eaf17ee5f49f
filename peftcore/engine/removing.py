"""Removal of adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from peftcore import ranks
from peftcore.adaptation import adapted, enclosing, fast_path, folding
from peftcore.adaptation.base_modules import base_modules, base_parameters
from peftcore.engine.activating import refuse_needed, release_branches, set_active, update_call_context
from peftcore.engine.changes import moved_with_adapter, with_adapter
from peftcore.engine.state import (
    STATE,
    State,
    applied,
    as_text,
    changes_of,
    exclusive,
    refuse_merged,
    require_state,
)
from peftcore.engine.trained import TrainedParameters, enclosing_paths
from peftcore.errors import warn
from peftcore.method import Model


@exclusive("remove adapters", base=True)
def remove(model: Model, adapter: str = "default") -> Model:
    """Remove an adapter. Removing the last one restores the model bit for bit to what it was before `apply`."""
    state = require_state(model)
    applied(model, adapter)
    refuse_merged(state, f"remove '{adapter}'")
    left = detach_adapter(model, adapter)
    if left:
        warn(f"remove left the following as it is: {as_text(left)}")
    return model


def detach_adapter(model: nn.Module, adapter: str) -> dict[str, str]:
    """Detach an adapter, and restore the base if it was the last one.

    An interruption leaves the adapter as it was, or is raised after it has been detached.

    Returns:
        {path: how the module was changed after `apply`}, for the modules that are left as they are.
    """
    state = require_state(model)
    refuse_needed(state, adapter)
    left = dict(changes_of(model, state, adapter))
    there = set(with_adapter(model, adapter, state.applied[adapter].paths))
    if not all(adapted.is_outermost(module) for module in there if adapted.is_adapted(module)):
        ranks.refuse_sharded(model, f"remove '{adapter}'")  # `fully_shard` has swapped a class once more
    if left:
        there.update(moved_with_adapter(model, adapter, state.lock))
    others = {path: state.sites[path].adapters - 1 for path in state.applied[adapter].paths}
    try:
        if adapter in state.active:
            inactive = {adapter, *state.applied[adapter].branches}
            set_active(model, tuple(name for name in state.active if name not in inactive), state.samples)
        detach_rest(model, state, adapter, there, others)
    except BaseException:
        if adapter not in state.active:
            detach_rest(model, state, adapter, there, others)
        raise
    return left


def detach_rest(model: nn.Module, state: State, adapter: str, there: set[nn.Module], others: Mapping[str, int]) -> None:
    """Detach the inactive `adapter`, or the rest of it.

    Args:
        there: the modules to which it is attached.
        others: the number of other adapters at each of its paths.
    """
    if adapter in state.applied:
        release_branches(state, adapter)
    for module in there:
        adapted.detach(module, adapter)
    fast_path.guard(model)
    TrainedParameters.detach(model, adapter)
    for path, count in others.items():
        if count:
            state.sites[path].adapters = count
        else:
            state.sites.pop(path, None)
    state.applied.pop(adapter, None)
    update_call_context(state)
    trained = dict.fromkeys(name for entry in state.applied.values() for name in entry.trained)
    inside = set(enclosing_paths(model, state.sites, tuple(trained))) if state.applied else set()
    for path, module in base_modules(model):
        if path in inside and module in there:
            enclosing.enclose(module, state.lock)  # it has lost this adapter, and contains others
    restore_base_if_free(model, state)


def restore_base_if_free(model: nn.Module, state: State) -> None:
    """Restore the base if no adapter is left. After an interruption it is restored, too."""
    if state.applied:
        return
    try:
        _restore_base(model, state)
    except BaseException:
        _restore_base(model, state)
        raise


def _restore_base(model: nn.Module, state: State) -> None:
    for name, parameter in base_parameters(model):
        parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
    for _, module in base_modules(model):
        enclosing.release(module)
        folding.unfold(module)
    if state.watching is not None:
        state.watching.remove()
    state.lock.retired = True
    model.__dict__.pop(STATE, None)
