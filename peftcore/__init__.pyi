"""The public names for type checkers; programs read the table in `__init__.py`."""

# Packages that are reached as attributes and are not public names.
from peftcore import optim as optim, quantization as quantization
from peftcore.distributed import TrainingState as TrainingState, load_sharded as load_sharded, shard as shard
from peftcore.engine import (
    activate as activate,
    after_step as after_step,
    apply as apply,
    disabled as disabled,
    extra_loss as extra_loss,
    loss_terms as loss_terms,
    parameter_groups as parameter_groups,
    remove as remove,
)
from peftcore.engine.activating import call_arguments as call_arguments
from peftcore.engine.composing.combining import combine as combine
from peftcore.engine.composing.converting import convert as convert
from peftcore.engine.configs import config as config
from peftcore.engine.merging.merge import merge as merge, merge_error as merge_error, unmerge as unmerge
from peftcore.engine.merging.merged_layers import can_merge as can_merge
from peftcore.engine.scaling import scale as scale
from peftcore.engine.summary import Plan as Plan, Summary as Summary, plan as plan, summary as summary
from peftcore.errors import (
    CheckpointError as CheckpointError,
    PeftcoreError as PeftcoreError,
    PluginError as PluginError,
)
from peftcore.estimating import (
    Estimate as Estimate,
    Purpose as Purpose,
    Step as Step,
    Suggestion as Suggestion,
    estimate as estimate,
    suggest as suggest,
)
from peftcore.exporting.export import export as export
from peftcore.files.adapter_state import set_state_dict as set_state_dict, state_dict as state_dict
from peftcore.files.inspecting import AdapterInfo as AdapterInfo, inspect as inspect
from peftcore.files.loading import load as load
from peftcore.files.saving import save as save
from peftcore.plugin.registry import (
    PluginInfo as PluginInfo,
    method as method,
    methods as methods,
    plugins as plugins,
)
from peftcore.quantization import dequantize as dequantize, quantize as quantize
from peftcore.quantization.huggingface import FourBitConfig as FourBitConfig
from peftcore.training.fusing import fuse as fuse
from peftcore.training.integrations.reference_model import reference_model as reference_model
from peftcore.training.loss_without_logits import loss_without_logits as loss_without_logits

__version__: str
__all__: list[str]
