"""Names of the contract for type checkers; programs read the table in `__init__.py`."""

from typing_extensions import override as override

from peftcore.engine import set_trainable as set_trainable
from peftcore.engine.adaptation.adapted import (
    has_forward_of_instance as has_forward_of_instance,
    inside_at as inside_at,
)
from peftcore.engine.adaptation.modes import evaluation_mode as evaluation_mode
from peftcore.engine.adaptation.tensor_parallel import Division as Division, division_of as division_of
from peftcore.engine.current_optimizer import reset_optimizer_state as reset_optimizer_state
from peftcore.engine.initialization import takes_batches as takes_batches
from peftcore.engine.merging.merge_check import (
    embed_scale as embed_scale,
    looks_up as looks_up,
    odd_embedding as odd_embedding,
    own_output as own_output,
)
from peftcore.engine.prompts.backbone import (
    arguments_by_name as arguments_by_name,
    cache_argument as cache_argument,
    decoder_path as decoder_path,
    forward_arguments as forward_arguments,
    refuse_packed as refuse_packed,
    text_starts as text_starts,
)
from peftcore.engine.prompts.token_counter import TokenCounter as TokenCounter, cached_tokens as cached_tokens
from peftcore.engine.state import has_adapters as has_adapters, other_adapter as other_adapter
from peftcore.engine.trained_parameters import base_tensors as base_tensors, modules_tied_to as modules_tied_to
from peftcore.errors import (
    CheckpointError as CheckpointError,
    PeftcoreError as PeftcoreError,
    nearest as nearest,
    warn as warn,
)
from peftcore.exporting import adapter_products as adapter_products
from peftcore.model import (
    detect as detect,
    gradients_of as gradients_of,
    inputs_of as inputs_of,
    run as run,
    targets as targets,
)
from peftcore.model.base_modules import (
    base_modules as base_modules,
    base_parameters as base_parameters,
    original_class as original_class,
)
from peftcore.model.experts import (
    ExpertsLayout as ExpertsLayout,
    expert_biases as expert_biases,
    experts_forward as experts_forward,
    experts_layout as experts_layout,
)
from peftcore.model.meta import MetaFloats as MetaFloats, meta_copy as meta_copy
from peftcore.model.positions import number_of_positions as number_of_positions
from peftcore.model.weight_formats import (
    find_weight_format as find_weight_format,
    quantized_format as quantized_format,
    weight_format as weight_format,
)
from peftcore.plugin import ranks as ranks, safe_reading as safe_reading, validation as validation
from peftcore.plugin.adapter import (
    Adapter as Adapter,
    Base as Base,
    BranchedBase as BranchedBase,
    LowRank as LowRank,
    implements as implements,
)
from peftcore.plugin.architecture import (
    Architecture as Architecture,
    Sublayer as Sublayer,
    text_config as text_config,
)
from peftcore.plugin.call import Call as Call, current_call as current_call
from peftcore.plugin.checkpoints import (
    CheckpointFormat as CheckpointFormat,
    CheckpointLayout as CheckpointLayout,
)
from peftcore.plugin.discovery import method_names as method_names
from peftcore.plugin.exporter import Exporter as Exporter
from peftcore.plugin.extensions import Command as Command, Integration as Integration
from peftcore.plugin.field_types import fits as fits, in_words as in_words
from peftcore.plugin.hooks import hookimpl as hookimpl
from peftcore.plugin.layers import shape_of as shape_of
from peftcore.plugin.link import Link as Link
from peftcore.plugin.method import (
    AdapterModules as AdapterModules,
    Fields as Fields,
    FileFormat as FileFormat,
    FileLayout as FileLayout,
    ForeignFormat as ForeignFormat,
    Method as Method,
    PeftRules as PeftRules,
    StateRules as StateRules,
    Tensors as Tensors,
    WeightFormat as WeightFormat,
)
from peftcore.plugin.outputs import first_of as first_of, with_first as with_first
from peftcore.plugin.peft_keys import prompt_tensor_name as prompt_tensor_name, tensor_name as tensor_name
from peftcore.plugin.placements.after import After as After
from peftcore.plugin.placements.around import Around as Around
from peftcore.plugin.placements.on_weight import OnWeight as OnWeight
from peftcore.plugin.placements.placement import (
    AtModule as AtModule,
    Attachments as Attachments,
    Placement as Placement,
)
from peftcore.plugin.placements.prefix_kv import PrefixKV as PrefixKV
from peftcore.plugin.placements.soft_prompt import SoftPrompt as SoftPrompt
from peftcore.plugin.placements.train import Train as Train
from peftcore.plugin.registry import (
    builtin as builtin,
    commands as commands,
    offered as offered,
    register as register,
)
from peftcore.quantization import (
    PackedParameters as PackedParameters,
    default_skip as default_skip,
    quantized_layers as quantized_layers,
)
from peftcore.testing import (
    CHECKS as CHECKS,
    COMPILE as COMPILE,
    FAMILIES as FAMILIES,
    IDENTITY as IDENTITY,
    MERGE as MERGE,
    PEFT_READS as PEFT_READS,
    PEFT_WRITES as PEFT_WRITES,
    Family as Family,
    check_method as check_method,
    check_sharded as check_sharded,
    disturb as disturb,
)
from peftcore.training.integrations.late_import import when_imported as when_imported
