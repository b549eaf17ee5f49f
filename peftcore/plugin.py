"""The contract of a plugin: all that the author of a method imports, next to `peftcore` and `peftcore.ops`.

    from peftcore.plugin import Adapter, Around, Base, Method, Placement, StateRules, hookimpl, override, targets

A plugin is a module with the hook `peftcore_methods`, which returns `Method` objects. A method's `place` turns a config
into placements, which say where in the model each adapter is attached. docs/plugins.md explains the contract with
examples. The names by subject:

    placements            Around, After, OnWeight, SoftPrompt, PrefixKV, Train; AdapterModules; Placement, AtModule,
                          Attachments, Link: kinds of a plugin's own
    adapters              Adapter, LowRank, Base, BranchedBase; implements; override, of typing_extensions
    method and hooks      Method, hookimpl, WeightFormat, Exporter, Command, Integration
    checkpoints in 4 bits CheckpointFormat, CheckpointLayout: how other tools store weights
    export                adapter_products: an adapter as low-rank products; base_tensors
    files                 StateRules, PeftRules, ForeignFormat, FileLayout, FileFormat, tensor_name,
                          prompt_tensor_name; Tensors, Fields
    configs               validation: checks of fields; targets.LayersConfig
    layers                targets: choosing modules; shape_of, base_modules, base_parameters, original_class,
                          has_forward_of_instance, modules_tied_to
    weights               weight_format, quantized_format, inside_at; embed_scale, looks_up, odd_embedding,
                          own_output; quantized_layers, default_skip
    mixtures of experts   ExpertsLayout, experts_layout, expert_biases
    the model             Architecture, Sublayer, detect; run, inputs_of, gradients_of: forward passes over batches
    a call                Call, current_call, TokenCounter, cached_tokens, decoder_path,
                          forward_arguments, arguments_by_name, cache_argument; first_of, with_first;
                          text_starts, refuse_packed: rows of several texts
    training              reset_optimizer_state
    other adapters        other_adapter, has_adapters, set_trainable
    distributed training  ranks: parameters that are sharded over ranks; Division, division_of: layers that tensor
                          parallelism divides
    errors                PeftcoreError, CheckpointError, nearest; warn
    the conformance suite check_method, check_sharded, Family, FAMILIES, CHECKS, IDENTITY, MERGE, COMPILE, PEFT_READS,
                          PEFT_WRITES, disturb

Names are imported when first used, so that a package of commands needs no PyTorch before a command runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers read the names here, programs in `_HOMES`
    from typing_extensions import override as override

    from peftcore import ranks as ranks, targets as targets, validation as validation
    from peftcore.adaptation.adapted import has_forward_of_instance as has_forward_of_instance, inside_at as inside_at
    from peftcore.adaptation.base_modules import (
        base_modules as base_modules,
        base_parameters as base_parameters,
        original_class as original_class,
    )
    from peftcore.adaptation.call import Call as Call, current_call as current_call
    from peftcore.adaptation.chain import Link as Link
    from peftcore.adaptation.division import Division as Division, division_of as division_of
    from peftcore.adaptation.outputs import first_of as first_of, with_first as with_first
    from peftcore.adapter import (
        Adapter as Adapter,
        Base as Base,
        BranchedBase as BranchedBase,
        LowRank as LowRank,
        implements as implements,
    )
    from peftcore.architecture import Architecture as Architecture, Sublayer as Sublayer
    from peftcore.engine import set_trainable as set_trainable
    from peftcore.engine.current_optimizer import reset_optimizer_state as reset_optimizer_state
    from peftcore.engine.other_adapters import has_adapters as has_adapters, other_adapter as other_adapter
    from peftcore.engine.trained import base_tensors as base_tensors, modules_tied_to as modules_tied_to
    from peftcore.errors import (
        CheckpointError as CheckpointError,
        PeftcoreError as PeftcoreError,
        nearest as nearest,
        warn as warn,
    )
    from peftcore.experts import (
        ExpertsLayout as ExpertsLayout,
        expert_biases as expert_biases,
        experts_layout as experts_layout,
    )
    from peftcore.exporter import Exporter as Exporter
    from peftcore.exporting import adapter_products as adapter_products
    from peftcore.extensions import Command as Command, Integration as Integration
    from peftcore.hookspecs import hookimpl as hookimpl
    from peftcore.layers import shape_of as shape_of
    from peftcore.merging.lookup import embed_scale as embed_scale, looks_up as looks_up, odd_embedding as odd_embedding
    from peftcore.merging.probe import own_output as own_output
    from peftcore.method import (
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
        prompt_tensor_name as prompt_tensor_name,
        tensor_name as tensor_name,
    )
    from peftcore.observation import detect as detect, gradients_of as gradients_of, inputs_of as inputs_of, run as run
    from peftcore.placements.after import After as After
    from peftcore.placements.around import Around as Around
    from peftcore.placements.attachments import Attachments as Attachments
    from peftcore.placements.on_weight import OnWeight as OnWeight
    from peftcore.placements.placement import AtModule as AtModule, Placement as Placement
    from peftcore.placements.prefix_kv import PrefixKV as PrefixKV
    from peftcore.placements.soft_prompt import SoftPrompt as SoftPrompt
    from peftcore.placements.train import Train as Train
    from peftcore.prompts.backbone import (
        arguments_by_name as arguments_by_name,
        cache_argument as cache_argument,
        decoder_path as decoder_path,
        forward_arguments as forward_arguments,
    )
    from peftcore.prompts.counting import TokenCounter as TokenCounter, cached_tokens as cached_tokens
    from peftcore.prompts.packed import refuse_packed as refuse_packed, text_starts as text_starts
    from peftcore.quantization import default_skip as default_skip, quantized_layers as quantized_layers
    from peftcore.quantization.checkpoint_layouts import (
        CheckpointFormat as CheckpointFormat,
        CheckpointLayout as CheckpointLayout,
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
    from peftcore.weight_formats import quantized_format as quantized_format, weight_format as weight_format

# {module: its names in the contract}. `tests/test_plugin.py` compares them with the imports above.
_MODULES = {
    "typing_extensions": "override",
    "peftcore": "ranks targets validation",
    "peftcore.adaptation.adapted": "has_forward_of_instance inside_at",
    "peftcore.adaptation.base_modules": "base_modules base_parameters original_class",
    "peftcore.adaptation.call": "Call current_call",
    "peftcore.adaptation.chain": "Link",
    "peftcore.adaptation.division": "Division division_of",
    "peftcore.adaptation.outputs": "first_of with_first",
    "peftcore.adapter": "Adapter Base BranchedBase LowRank implements",
    "peftcore.architecture": "Architecture Sublayer",
    "peftcore.engine": "set_trainable",
    "peftcore.engine.current_optimizer": "reset_optimizer_state",
    "peftcore.engine.other_adapters": "has_adapters other_adapter",
    "peftcore.engine.trained": "base_tensors modules_tied_to",
    "peftcore.errors": "CheckpointError PeftcoreError nearest warn",
    "peftcore.experts": "ExpertsLayout expert_biases experts_layout",
    "peftcore.exporter": "Exporter",
    "peftcore.exporting": "adapter_products",
    "peftcore.extensions": "Command Integration",
    "peftcore.hookspecs": "hookimpl",
    "peftcore.layers": "shape_of",
    "peftcore.merging.lookup": "embed_scale looks_up odd_embedding",
    "peftcore.merging.probe": "own_output",
    "peftcore.method": (
        "AdapterModules Fields FileFormat FileLayout ForeignFormat Method PeftRules StateRules Tensors WeightFormat "
        "prompt_tensor_name tensor_name"
    ),
    "peftcore.observation": "detect gradients_of inputs_of run",
    "peftcore.placements.after": "After",
    "peftcore.placements.around": "Around",
    "peftcore.placements.attachments": "Attachments",
    "peftcore.placements.on_weight": "OnWeight",
    "peftcore.placements.placement": "AtModule Placement",
    "peftcore.placements.prefix_kv": "PrefixKV",
    "peftcore.placements.soft_prompt": "SoftPrompt",
    "peftcore.placements.train": "Train",
    "peftcore.prompts.backbone": "arguments_by_name cache_argument decoder_path forward_arguments",
    "peftcore.prompts.counting": "TokenCounter cached_tokens",
    "peftcore.prompts.packed": "refuse_packed text_starts",
    "peftcore.quantization": "default_skip quantized_layers",
    "peftcore.quantization.checkpoint_layouts": "CheckpointFormat CheckpointLayout",
    "peftcore.testing": (
        "CHECKS COMPILE FAMILIES Family IDENTITY MERGE PEFT_READS PEFT_WRITES check_method check_sharded disturb"
    ),
    "peftcore.weight_formats": "quantized_format weight_format",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


if not TYPE_CHECKING:  # a type checker that sees it lets any name pass
    __all__ = sorted(_HOMES)

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'peftcore.plugin' has no attribute '{name}'")
        home = _HOMES[name]
        value = import_module(f"peftcore.{name}") if home == "peftcore" else getattr(import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(_HOMES)
