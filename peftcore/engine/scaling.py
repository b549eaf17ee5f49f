"""An adapter's change, multiplied: its adapters have a `multiplier`, which the record of the adapter knows, too."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from peftcore.engine.alone import alone
from peftcore.engine.state import adapter_modules, applied, call_in, refuse_changed, refuse_merged, require_state
from peftcore.errors import PeftcoreError
from peftcore.method import Model
from peftcore.registry import registry


@alone("scale an adapter")
def scale(model: Model, adapter: str, factor: float) -> Model:
    """Multiply the change that `adapter` makes by `factor`, in place of the factor that was set before.

    It holds wherever the adapter acts: in forward, training, `merge`, batches with `per_sample`, copies, and files,
    where it is worked into the config as Hugging Face PEFT reads it. `scale(model, adapter, 1.0)` gives back, bit for
    bit, what the adapter computed before.

    Raises:
        PeftcoreError: the adapter's change has no factor (prompts, parameters of the base), or is merged.
    """
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
        raise PeftcoreError(f"scale takes a finite number, found {factor!r}")
    call_in(model, adapter)
    applied(model, adapter)
    refuse_changed(model)
    refuse_merged(require_state(model), f"scale '{adapter}'")
    _refuse_unscalable(model, adapter)
    set_multiplier(model, adapter, float(factor))
    return model


def set_multiplier(model: nn.Module, adapter: str, factor: float) -> None:
    """As `scale`, of an adapter that can be scaled, or with the factor that it has."""
    entry = applied(model, adapter)
    if entry.multiplier == factor:
        return
    entry.multiplier = factor
    module: Any
    for _, placed in adapter_modules(model, adapter):
        for module in placed.modules():
            if hasattr(module, "multiplier"):
                module.multiplier = factor


def scaled_config(model: nn.Module, adapter: str) -> Any:
    """The config of an applied adapter, with its multiplier worked in."""
    entry = applied(model, adapter)
    scaled = registry.method(entry.method).state.scaled
    return entry.config if entry.multiplier == 1.0 or scaled is None else scaled(entry.config, entry.multiplier)


def _refuse_unscalable(model: nn.Module, adapter: str) -> None:
    entry = applied(model, adapter)
    placed = dict(adapter_modules(model, adapter))
    whole = next((path for path, module in placed.items() if not hasattr(module, "multiplier")), None)
    if entry.trained:
        why = f"it trains '{entry.trained[0]}' of the base, whose change has no factor"
    elif whole is not None:
        why = f"what it does at '{whole}' has no factor" if whole else "what it does has no factor"
    elif registry.method(entry.method).state.scaled is None:
        why = "its files have no place for a factor"
    else:
        return
    linear = all(hasattr(module, "neutral") for module in placed.values())
    other = f". peftcore.combine(model, ['{adapter}'], weights=[...], name=...) makes one with a share of its change"
    raise PeftcoreError(f"'{adapter}' ({entry.method}) cannot be scaled: {why}{other if linear else ''}")
