"""Apply, activate, disable and remove adapters, and keep the record of them on the model."""

from peftcore.engine.activating import activate, disabled, set_active, set_trainable
from peftcore.engine.applying import apply, apply_to_fill, check_dtype, check_name, refuse_on_disk, remove, take_off
from peftcore.engine.branches import refuse_needed
from peftcore.engine.changes import with_adapter
from peftcore.engine.divided import follows_plan
from peftcore.engine.first_values import takes_batches
from peftcore.engine.missed_steps import watch
from peftcore.engine.placing import placements_for, refuse_adapters_of_others
from peftcore.engine.resizing import refuse_resize
from peftcore.engine.state import (
    STATE,
    Applied,
    State,
    adapter_modules,
    adapter_parameters,
    applied,
    call_in,
    changed,
    check_model,
    exclusive,
    modules_with,
    placements,
    refuse_changed,
    refuse_merged,
    refuse_per_sample,
    require_state,
    state_of,
)
from peftcore.engine.training_hooks import (
    after_step,
    call_losses,
    extra_loss,
    has_loss,
    has_parameter_groups,
    loss_terms,
    method_groups,
    method_modules,
    not_in,
    parameter_groups,
)

__all__ = [
    "STATE",
    "Applied",
    "State",
    "activate",
    "adapter_modules",
    "adapter_parameters",
    "after_step",
    "applied",
    "apply",
    "apply_to_fill",
    "call_in",
    "call_losses",
    "changed",
    "check_dtype",
    "check_model",
    "check_name",
    "disabled",
    "exclusive",
    "extra_loss",
    "follows_plan",
    "has_loss",
    "has_parameter_groups",
    "loss_terms",
    "method_groups",
    "method_modules",
    "modules_with",
    "not_in",
    "parameter_groups",
    "placements",
    "placements_for",
    "refuse_adapters_of_others",
    "refuse_changed",
    "refuse_merged",
    "refuse_needed",
    "refuse_on_disk",
    "refuse_per_sample",
    "refuse_resize",
    "remove",
    "require_state",
    "set_active",
    "set_trainable",
    "state_of",
    "take_off",
    "takes_batches",
    "watch",
    "with_adapter",
]
