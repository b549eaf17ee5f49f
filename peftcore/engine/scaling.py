"""`scale`: multiply an adapter's change by a factor, stored as `multiplier` on its modules and its record."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from peftcore.engine.state import (
    adapter_modules,
    applied,
    exclusive,
    refuse_changed,
    refuse_merged,
    require_state,
)
from peftcore.errors import PeftcoreError
from peftcore.plugin.adapter import Adapter, neutral_of
from peftcore.plugin.method import Model
from peftcore.plugin.registry import registry


@exclusive("scale an adapter")
def scale(model: Model, adapter: str, factor: float) -> Model:
    """Multiply the change that `adapter` makes by `factor`, replacing any earlier factor.

    The factor applies in forward, training, `merge`, per-sample batches, copies and files. The config in a file
    includes it in a form that Hugging Face PEFT reads. `scale(model, adapter, 1.0)` restores the original output bit
    for bit.

    Raises:
        PeftcoreError: the adapter cannot be scaled (prompts, parameters of the base), or is merged.

    Examples:
        >>> peftcore.scale(model, "default", 0.5)    # half the change
        >>> peftcore.scale(model, "default", 1.0)
    """
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
        raise PeftcoreError(f"factor must be a finite number, found {factor!r}")
    applied(model, adapter)
    refuse_changed(model)
    refuse_merged(require_state(model), f"scale '{adapter}'")
    _refuse_unscalable(model, adapter)
    set_multiplier(model, adapter, float(factor))
    return model


def set_multiplier(model: nn.Module, adapter: str, factor: float) -> None:
    """Set the factor of an adapter, without the checks of `scale`."""
    entry = applied(model, adapter)
    if entry.multiplier == factor:
        return
    modules = adapter_modules(model, adapter)
    entry.multiplier = factor
    for _, root in modules:
        for module in root.modules():
            if isinstance(module, Adapter) and module.multiplier is not None:
                module.multiplier = factor


def scaled_config(model: nn.Module, adapter: str) -> Any:
    """Return the config of an applied adapter, with its multiplier folded in."""
    entry = applied(model, adapter)
    scaled = registry.method(entry.method).state.peft.scaled
    return entry.config if entry.multiplier == 1.0 or scaled is None else scaled(entry.config, entry.multiplier)


def _has_multiplier(adapter: nn.Module) -> bool:
    return isinstance(adapter, Adapter) and adapter.multiplier is not None


def _refuse_unscalable(model: nn.Module, adapter: str) -> None:
    entry = applied(model, adapter)
    modules = dict(adapter_modules(model, adapter))
    fixed_path = next((path for path, module in modules.items() if not _has_multiplier(module)), None)
    if entry.trained:
        reason = f"it trains the base parameter '{entry.trained[0]}', which cannot be scaled"
    elif fixed_path is not None:
        reason = f"its effect on '{fixed_path}' cannot be scaled" if fixed_path else "its effect cannot be scaled"
    elif registry.method(entry.method).state.peft.scaled is None:
        reason = "the method's file format cannot store a factor"
    else:
        return
    linear = all(neutral_of(module) is not None for module in modules.values())
    hint = (
        f". To make an adapter with a fraction of its change, call peftcore.combine(model, ['{adapter}'], "
        "weights=[...], adapter=...)"
    )
    raise PeftcoreError(f"'{adapter}' ({entry.method}) cannot be scaled: {reason}{hint if linear else ''}")
