"""The contract of a plugin: all that the author of a method imports, next to `peftcore` and `peftcore.ops`.

    from peftcore.plugin import Adapter, Around, Base, LayersConfig, Method, Placement, StateRules, hookimpl, override

A plugin is a module with the hook `peftcore_methods`, which returns `Method` objects. A method's `place` turns a config
into placements, which say where in the model each adapter is attached. docs/plugins.md explains the contract with
examples. The names by subject:

    placements            Around, After, OnWeight, SoftPrompt, PrefixKV, Train; Placement, AdapterModules
    adapters              Adapter, LightAdapter, LowRank, Base, BranchedBase; implements; override, of typing_extensions
    method and hooks      Method, hookimpl, WeightFormat
    files                 StateRules, PeftRules, ForeignFormat, FileLayout, FileFormat, tensor_name,
                          prompt_tensor_name; Tensors, Fields
    configs               LayersConfig; validation: checks of fields
    layers                targets: choosing modules; sizes, shape_of, layer_at, is_linear, is_conv1d, base_modules,
                          base_parameters, original_class, has_forward_of_instance, modules_tied_to
    weights               weight_format, format_in_few_bits, inside_at; embed_scale, looks_up, odd_embedding,
                          own_output; quantized_layers, default_skip
    mixtures of experts   ExpertsLayout, experts_layout, expert_biases
    the model             Architecture, Sublayer, ATTENTION, CROSS_ATTENTION, FEED_FORWARD, detect; run, inputs_of,
                          gradients_of: forward passes over batches
    a call                Call, current_call, TokenCounter, cached_tokens, decoder_path, forward_arguments,
                          arguments_by_name, cache_argument; first_of, with_first
    other adapters        OtherAdapter, other_adapter, has_adapters, set_trainable
    distributed training  ranks: parameters that are sharded over ranks
    errors                PeftcoreError, CheckpointError, PluginError, nearest
    the conformance suite check_method, check_sharded, Family, FAMILIES, CHECKS, IDENTITY, MERGE, COMPILE, PEFT_READS,
                          PEFT_WRITES, disturb
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from peftcore import ranks, targets, validation
from peftcore.adaptation.adapted import base_modules, base_parameters, has_forward_of_instance, inside_at
from peftcore.adaptation.call import Call, current_call
from peftcore.adaptation.class_swap import original_class
from peftcore.adaptation.light import LightAdapter
from peftcore.adaptation.outputs import first_of, with_first
from peftcore.adapter import Adapter, Base, BranchedBase, LowRank, implements
from peftcore.architecture import ATTENTION, CROSS_ATTENTION, FEED_FORWARD, Architecture, Sublayer
from peftcore.engine import set_trainable
from peftcore.engine.other_adapters import OtherAdapter, has_adapters, other_adapter
from peftcore.engine.trained import modules_tied_to
from peftcore.errors import CheckpointError, PeftcoreError, PluginError, nearest
from peftcore.experts import ExpertsLayout, expert_biases, experts_layout
from peftcore.hookspecs import hookimpl
from peftcore.layers import is_conv1d, is_linear, shape_of, sizes
from peftcore.merging.lookup import embed_scale, looks_up, odd_embedding
from peftcore.merging.probe import own_output
from peftcore.method import (
    AdapterModules,
    After,
    Around,
    Fields,
    FileFormat,
    FileLayout,
    ForeignFormat,
    Method,
    OnWeight,
    PeftRules,
    Placement,
    PrefixKV,
    SoftPrompt,
    StateRules,
    Tensors,
    Train,
    WeightFormat,
    prompt_tensor_name,
    tensor_name,
)
from peftcore.observation import detect, gradients_of, inputs_of, run
from peftcore.prompts.backbone import arguments_by_name, cache_argument, decoder_path, forward_arguments
from peftcore.prompts.counting import TokenCounter, cached_tokens
from peftcore.quantization import default_skip, quantized_layers
from peftcore.targets import LayersConfig, layer_at
from peftcore.weight_formats import format_in_few_bits, weight_format

if TYPE_CHECKING:  # imported when first used: a plugin's tests need the suite, the plugin does not
    from peftcore.testing import (
        CHECKS,
        COMPILE,
        FAMILIES,
        IDENTITY,
        MERGE,
        PEFT_READS,
        PEFT_WRITES,
        Family,
        check_method,
        check_sharded,
        disturb,
    )

_OF_THE_SUITE = (
    "CHECKS", "COMPILE", "FAMILIES", "IDENTITY", "MERGE", "PEFT_READS", "PEFT_WRITES", "Family", "check_method",
    "check_sharded", "disturb",
)  # fmt: skip

__all__ = [
    "ATTENTION",
    "CHECKS",
    "COMPILE",
    "CROSS_ATTENTION",
    "FAMILIES",
    "FEED_FORWARD",
    "IDENTITY",
    "MERGE",
    "PEFT_READS",
    "PEFT_WRITES",
    "Adapter",
    "AdapterModules",
    "After",
    "Architecture",
    "Around",
    "Base",
    "BranchedBase",
    "Call",
    "CheckpointError",
    "ExpertsLayout",
    "Family",
    "Fields",
    "FileFormat",
    "FileLayout",
    "ForeignFormat",
    "LayersConfig",
    "LightAdapter",
    "LowRank",
    "Method",
    "OnWeight",
    "OtherAdapter",
    "PeftRules",
    "PeftcoreError",
    "Placement",
    "PluginError",
    "PrefixKV",
    "SoftPrompt",
    "StateRules",
    "Sublayer",
    "Tensors",
    "TokenCounter",
    "Train",
    "WeightFormat",
    "arguments_by_name",
    "base_modules",
    "base_parameters",
    "cache_argument",
    "cached_tokens",
    "check_method",
    "check_sharded",
    "current_call",
    "decoder_path",
    "default_skip",
    "detect",
    "disturb",
    "embed_scale",
    "expert_biases",
    "experts_layout",
    "first_of",
    "format_in_few_bits",
    "forward_arguments",
    "gradients_of",
    "has_adapters",
    "has_forward_of_instance",
    "hookimpl",
    "implements",
    "inputs_of",
    "inside_at",
    "is_conv1d",
    "is_linear",
    "layer_at",
    "looks_up",
    "modules_tied_to",
    "nearest",
    "odd_embedding",
    "original_class",
    "other_adapter",
    "override",
    "own_output",
    "prompt_tensor_name",
    "quantized_layers",
    "ranks",
    "run",
    "set_trainable",
    "shape_of",
    "sizes",
    "targets",
    "tensor_name",
    "validation",
    "weight_format",
    "with_first",
]


if not TYPE_CHECKING:  # a type checker that sees it lets any name pass

    def __getattr__(name: str) -> Any:
        if name in _OF_THE_SUITE:
            return getattr(import_module("peftcore.testing"), name)
        raise AttributeError(f"module 'peftcore.plugin' has no attribute '{name}'")
