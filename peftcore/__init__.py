"""peftcore: parameter-efficient fine-tuning as plugins. `peftcore.apply(model, "METHOD")` and train.

Names are imported on first use, so that the command line responds before PyTorch is loaded.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

# {module: its public names}. `__init__.pyi` repeats them for type checkers; `tests/test_public_names.py` compares the
# two.
_PUBLIC = {
    "peftcore.files.adapter_state": ("set_state_dict", "state_dict"),
    "peftcore.engine.composing.combining": ("combine",),
    "peftcore.engine.composing.converting": ("convert",),
    "peftcore.engine": (
        "activate",
        "after_step",
        "apply",
        "disabled",
        "extra_loss",
        "loss_terms",
        "parameter_groups",
        "remove",
    ),
    "peftcore.engine.activating": ("call_arguments",),
    "peftcore.engine.configs": ("config",),
    "peftcore.training.fusing": ("fuse",),
    "peftcore.training.loss_without_logits": ("loss_without_logits",),
    "peftcore.engine.scaling": ("scale",),
    "peftcore.engine.summary": ("Plan", "Summary", "plan", "summary"),
    "peftcore.errors": ("CheckpointError", "PeftcoreError", "PluginError"),
    "peftcore.estimating": ("Estimate", "Purpose", "Step", "Suggestion", "estimate", "suggest"),
    "peftcore.exporting.export": ("export",),
    "peftcore.files.inspecting": ("AdapterInfo", "inspect"),
    "peftcore.files.loading": ("load",),
    "peftcore.files.saving": ("save",),
    "peftcore.training.integrations.reference_model": ("reference_model",),
    "peftcore.engine.merging.merged_layers": ("can_merge",),
    "peftcore.engine.merging.merge": ("merge", "merge_error", "unmerge"),
    "peftcore.distributed": ("TrainingState", "load_sharded", "shard"),
    "peftcore.quantization": ("dequantize", "quantize"),
    "peftcore.quantization.huggingface": ("FourBitConfig",),
    "peftcore.plugin.registry": ("PluginInfo", "method", "methods", "plugins"),
}
# PEFT names that users may look for, with hints.
_OF_PEFT = {
    "PeftModel": "peftcore.load(model, folder)",
    "add_adapter": "peftcore.apply(model, method, adapter=NAME)",
    "convert_to_lora": "peftcore.convert",
    "delete_adapter": "peftcore.remove",
    "disable_adapter": "peftcore.disabled",
    "get_peft_model": "peftcore.apply(model, method)",
    "get_peft_model_state_dict": "peftcore.state_dict",
    "load_adapter": "peftcore.load(model, folder, adapter=NAME)",
    "merge_and_unload": "peftcore.merge",
    "prepare_model_for_kbit_training": "peftcore.quantize",
    "print_trainable_parameters": "peftcore.summary",
    "set_adapter": "peftcore.activate",
    "set_peft_model_state_dict": "peftcore.set_state_dict",
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name == "__version__":
        value = import_module("peftcore.version").installed_version()
    elif name == "__all__":
        value = sorted(_HOMES)
    elif not name.startswith("_") and find_spec(f"peftcore.{name}"):
        value = import_module(f"peftcore.{name}")
    else:
        hint = f". Try: {_OF_PEFT[name]}" if name in _OF_PEFT else ""
        raise AttributeError(f"module 'peftcore' has no attribute '{name}'{hint}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return ["__version__", *sorted(_HOMES)]


import_module("peftcore.training.integrations")  # subscribes to `apply`; patches nothing and imports no library
