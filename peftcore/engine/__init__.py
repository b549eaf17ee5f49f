"""Apply, activate, disable and remove adapters, and record them on the model.

It imports `model` and what is below it.
"""

from peftcore.engine.activating import (
    activate as activate,
    disabled as disabled,
    refuse_needed as refuse_needed,
    set_active as set_active,
    set_trainable as set_trainable,
)
from peftcore.engine.applying import (
    add_adapter as add_adapter,
    apply as apply,
)
from peftcore.engine.changed_modules import with_adapter as with_adapter
from peftcore.engine.initialization import takes_batches as takes_batches
from peftcore.engine.method_placements import placements_for as placements_for
from peftcore.engine.model_parallel import follows_plan as follows_plan
from peftcore.engine.preflight import (
    check_name as check_name,
    refuse_adapters_of_others as refuse_adapters_of_others,
)
from peftcore.engine.removing import (
    detach_adapter as detach_adapter,
    remove as remove,
)
from peftcore.engine.resizing import refuse_resize as refuse_resize
from peftcore.engine.state import (
    Applied as Applied,
    State as State,
    adapter_modules as adapter_modules,
    adapter_parameters as adapter_parameters,
    applied as applied,
    exclusive as exclusive,
    modules_with as modules_with,
    placements as placements,
    refuse_changed as refuse_changed,
    refuse_merged as refuse_merged,
    refuse_per_sample as refuse_per_sample,
    require_state as require_state,
    state_of as state_of,
)
from peftcore.engine.training_hooks import (
    after_step as after_step,
    extra_loss as extra_loss,
    has_loss as has_loss,
    has_parameter_groups as has_parameter_groups,
    has_schedule as has_schedule,
    loss_terms as loss_terms,
    method_groups as method_groups,
    method_modules as method_modules,
    not_in as not_in,
    parameter_groups as parameter_groups,
    scheduled as scheduled,
    set_trained_fields as set_trained_fields,
    watch as watch,
)
