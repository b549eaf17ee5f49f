"""`remove`: detach adapters, and restore the base when the last one is removed."""

from __future__ import annotations

from itertools import chain

from torch import nn

from peftcore.engine.activating import refuse_needed, release_branches, set_active, update_call_context
from peftcore.engine.adaptation import adapted, ancestors, fast_path, frozen_linear
from peftcore.engine.changed_modules import moved_with_adapter, with_adapter
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
from peftcore.engine.trained_parameters import TrainedParameters, enclosing_paths
from peftcore.errors import warn, with_argument_hints
from peftcore.model.base_modules import base_modules, base_parameters
from peftcore.plugin import sharded
from peftcore.plugin.method import Model


@with_argument_hints
@exclusive("remove adapters", base=True)
def remove(model: Model, adapter: str | None = None) -> Model:
    """Remove one adapter, or all. Removing the last one restores the model bit for bit to its state before `apply`.

    Args:
        model: the model.
        adapter: the adapter's name; by default all adapters are removed.

    Examples:
        >>> peftcore.remove(model, "style")             # one adapter
        >>> peftcore.remove(model)                      # all of them
    """
    state = require_state(model)
    if adapter is not None:
        applied(model, adapter)
    refuse_merged(state, f"remove '{adapter}'" if adapter is not None else "remove adapters")
    remains: dict[str, str] = {}
    # In reverse order: an adapter that combines others is removed before them.
    for name in reversed(list(state.applied)) if adapter is None else (adapter,):
        remains |= detach_adapter(model, name)
    if remains:
        warn(f"remove did not restore modules that were changed after apply: {as_text(remains)}")
    return model


def detach_adapter(model: nn.Module, adapter: str) -> dict[str, str]:
    """Detach an adapter, and restore the base if it was the last one.

    Returns:
        {path: description of the change} for modules that were changed after `apply`; these are left unchanged.
    """
    state = require_state(model)
    refuse_needed(state, adapter)
    remains = dict(changes_of(model, state, adapter))
    modules = set(with_adapter(model, adapter, state.applied[adapter].paths))
    if not all(adapted.is_outermost(module) for module in modules if adapted.is_adapted(module)):
        # `fully_shard` has subclassed the swapped class, so the original class cannot be restored.
        sharded.refuse_sharded(model, f"remove '{adapter}'")
    if remains:
        modules.update(moved_with_adapter(model, adapter, state.lock))
    if adapter in state.active:
        inactive = {adapter, *state.applied[adapter].branches}
        set_active(model, tuple(name for name in state.active if name not in inactive), state.samples)
    release_branches(state, adapter)
    for module in modules:
        adapted.detach(module, adapter)
    fast_path.guard(model)
    TrainedParameters.detach(model, adapter)
    if len(state.applied) == 1:
        _restore_base(model, state)
    for path in state.applied[adapter].paths:
        site = state.sites[path]
        site.adapters -= 1
        if not site.adapters:
            del state.sites[path]
    del state.applied[adapter]
    update_call_context(state)
    trained = dict.fromkeys(chain.from_iterable(entry.trained for entry in state.applied.values()))
    enclosing = set(enclosing_paths(model, state.sites, tuple(trained))) if state.applied else set()
    for path, module in base_modules(model):
        if path in enclosing and module in modules:
            ancestors.enclose(module, state.lock)  # it has no adapter any more, but contains adapted modules
    return remains


def _restore_base(model: nn.Module, state: State) -> None:
    for name, parameter in base_parameters(model):
        parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
    for _, module in base_modules(model):
        ancestors.release(module)
        frozen_linear.unfold(module)
    if state.watching is not None:
        state.watching.remove()
    if state.loading is not None:
        state.loading.remove()
    state.lock.retired = True
    model.__dict__.pop(STATE, None)
