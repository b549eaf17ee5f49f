"""Adapters of a model: apply, activate, disable and remove, and the record of them on the model."""

from peftcore.engine.applying import (
    activate,
    after_step,
    alone,
    apply,
    check_dtype,
    check_name,
    disabled,
    remove,
    set_active,
    set_trainable,
)
from peftcore.engine.changes import with_adapter
from peftcore.engine.placing import place
from peftcore.engine.state import (
    Applied,
    State,
    adapter_modules,
    adapter_parameters,
    applied,
    changed,
    check_model,
    placements,
    refuse_changed,
    refuse_merged,
    refuse_per_sample,
    require_state,
    state_of,
)

__all__ = [
    "Applied",
    "State",
    "activate",
    "adapter_modules",
    "adapter_parameters",
    "after_step",
    "alone",
    "applied",
    "apply",
    "changed",
    "check_dtype",
    "check_model",
    "check_name",
    "disabled",
    "place",
    "placements",
    "refuse_changed",
    "refuse_merged",
    "refuse_per_sample",
    "remove",
    "require_state",
    "set_active",
    "set_trainable",
    "state_of",
    "with_adapter",
]
