"""The plugin API: everything that the author of a method imports, in addition to `peftcore` and `peftcore.ops`.

    from peftcore.plugin import Adapter, Around, Base, Method, Placement, StateRules, hookimpl, override, targets

A plugin is a module with the hook `peftcore_methods`, which returns `Method` objects. A method's `place` turns a config
into placements, which say where in the model each adapter is attached. docs/plugins.md explains the contract with
examples. The names by subject:

    placements            Around, After, OnWeight, SoftPrompt, PrefixKV, Train; AdapterModules; Placement, AtModule,
                          Attachments, Link: kinds of a plugin's own
    adapters              Adapter, LowRank, Base, BranchedBase; implements; override, of typing_extensions
    method and hooks      Method, hookimpl, WeightFormat, Exporter, Command, Integration
    programs with hooks   builtin, register, offered, commands, method_names
    models in programs    evaluation_mode, number_of_positions, takes_batches; meta_copy, MetaFloats: models without
                          values
    checkpoints in 4 bits CheckpointFormat, CheckpointLayout: how other tools store weights
    export                adapter_products: an adapter as low-rank products; base_tensors
    strangers' files      safe_reading: files read with limits
    files                 StateRules, PeftRules, ForeignFormat, FileLayout, FileFormat, tensor_name,
                          prompt_tensor_name; Tensors, Fields
    configs               validation: checks of fields; fits, in_words: types of fields; targets.LayersConfig
    layers                targets: choosing modules; shape_of, base_modules, base_parameters, original_class,
                          has_forward_of_instance, modules_tied_to
    weights               weight_format, find_weight_format, quantized_format, inside_at; embed_scale, looks_up,
                          odd_embedding, own_output; quantized_layers, default_skip, PackedParameters
    mixtures of experts   ExpertsLayout, experts_layout, expert_biases, experts_forward
    the model             Architecture, Sublayer, detect, text_config; run, inputs_of, gradients_of: forward passes over
                          batches
    a call                Call, current_call, TokenCounter, cached_tokens, decoder_path,
                          forward_arguments, arguments_by_name, cache_argument; first_of, with_first;
                          text_starts, refuse_packed: rows of several texts
    training              reset_optimizer_state
    other libraries       when_imported: run a function once a module is imported
    other adapters        other_adapter, has_adapters, set_trainable
    distributed training  ranks: parameters that are sharded over ranks; Division, division_of: layers that tensor
                          parallelism divides
    errors                PeftcoreError, CheckpointError, nearest; warn
    the conformance suite check_method, check_sharded, Family, FAMILIES, CHECKS, IDENTITY, MERGE, COMPILE, PEFT_READS,
                          PEFT_WRITES, disturb

The modules of this package only import `ops`. Names from higher packages in the table below are for plugins. Names are
imported on first use, so that a package of commands does not load PyTorch before a command runs.
"""

from importlib import import_module
from typing import Any

# {module: its names in the plugin API}. `__init__.pyi` repeats them for type checkers, and a test compares the two.
_MODULES = {
    "typing_extensions": "override",
    "peftcore.plugin": "ranks safe_reading validation",
    "peftcore.engine.adaptation.adapted": "has_forward_of_instance inside_at",
    "peftcore.model.base_modules": "base_modules base_parameters original_class",
    "peftcore.plugin.call": "Call current_call",
    "peftcore.plugin.link": "Link",
    "peftcore.engine.adaptation.tensor_parallel": "Division division_of",
    "peftcore.plugin.outputs": "first_of with_first",
    "peftcore.plugin.adapter": "Adapter Base BranchedBase LowRank implements",
    "peftcore.plugin.architecture": "Architecture Sublayer text_config",
    "peftcore.engine": "set_trainable",
    "peftcore.engine.adaptation.modes": "evaluation_mode",
    "peftcore.engine.initialization": "takes_batches",
    "peftcore.model.meta": "MetaFloats meta_copy",
    "peftcore.model.positions": "number_of_positions",
    "peftcore.engine.current_optimizer": "reset_optimizer_state",
    "peftcore.engine.state": "has_adapters other_adapter",
    "peftcore.engine.trained_parameters": "base_tensors modules_tied_to",
    "peftcore.errors": "CheckpointError PeftcoreError nearest warn",
    "peftcore.model.experts": "ExpertsLayout expert_biases experts_forward experts_layout",
    "peftcore.plugin.exporter": "Exporter",
    "peftcore.exporting": "adapter_products",
    "peftcore.plugin.extensions": "Command Integration",
    "peftcore.plugin.hooks": "hookimpl",
    "peftcore.plugin.registry": "builtin commands offered register",
    "peftcore.plugin.discovery": "method_names",
    "peftcore.plugin.field_types": "fits in_words",
    "peftcore.plugin.layers": "shape_of",
    "peftcore.engine.merging.merge_check": "embed_scale looks_up odd_embedding own_output",
    "peftcore.plugin.method": (
        "AdapterModules Fields FileFormat FileLayout ForeignFormat Method PeftRules StateRules Tensors WeightFormat"
    ),
    "peftcore.plugin.peft_keys": "prompt_tensor_name tensor_name",
    "peftcore.model": "detect gradients_of inputs_of run targets",
    "peftcore.plugin.placements.after": "After",
    "peftcore.plugin.placements.around": "Around",
    "peftcore.plugin.placements.on_weight": "OnWeight",
    "peftcore.plugin.placements.placement": "AtModule Attachments Placement",
    "peftcore.plugin.placements.prefix_kv": "PrefixKV",
    "peftcore.plugin.placements.soft_prompt": "SoftPrompt",
    "peftcore.plugin.placements.train": "Train",
    "peftcore.engine.prompts.backbone": (
        "arguments_by_name cache_argument decoder_path forward_arguments refuse_packed text_starts"
    ),
    "peftcore.engine.prompts.token_counter": "TokenCounter cached_tokens",
    "peftcore.quantization": "PackedParameters default_skip quantized_layers",
    "peftcore.training.integrations.late_import": "when_imported",
    "peftcore.plugin.checkpoints": "CheckpointFormat CheckpointLayout",
    "peftcore.testing": (
        "CHECKS COMPILE FAMILIES Family IDENTITY MERGE PEFT_READS PEFT_WRITES check_method check_sharded disturb"
    ),
    "peftcore.model.weight_formats": "find_weight_format quantized_format weight_format",
}
_SUBMODULES = ("ranks", "safe_reading", "targets", "validation")
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'peftcore.plugin' has no attribute '{name}'")
    home = import_module(_HOMES[name])
    # The name may be a module of the package.
    value = import_module(f"{home.__name__}.{name}") if name in _SUBMODULES else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOMES)
