"""peftcore: parameter-efficient fine-tuning as plugins. `peftcore.apply(model, "METHOD")` and train.

Names are imported when first used, so that the command line answers before PyTorch is loaded.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftcore.architecture import Architecture
    from peftcore.checkpoint import load, save
    from peftcore.engine import activate, after_step, apply, disabled, remove
    from peftcore.engine.summary import plan, summary
    from peftcore.errors import CheckpointError, PeftcoreError, PluginError
    from peftcore.hookspecs import hookimpl
    from peftcore.merging.merge import merge, merge_loss, unmerge
    from peftcore.method import (
        After,
        Around,
        ForeignFormat,
        Method,
        PrefixKV,
        SoftPrompt,
        StateRules,
        Train,
        WeightFormat,
        prompt_tensor_name,
        tensor_name,
    )
    from peftcore.parallel import TrainingState, load_sharded, shard
    from peftcore.quantization import dequantize, quantize
    from peftcore.quantization.huggingface import NF4Config
    from peftcore.registry import methods

try:
    __version__ = version("peftcore")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0"

__all__ = [
    "After",
    "Architecture",
    "Around",
    "CheckpointError",
    "ForeignFormat",
    "Method",
    "NF4Config",
    "PeftcoreError",
    "PluginError",
    "PrefixKV",
    "SoftPrompt",
    "StateRules",
    "Train",
    "TrainingState",
    "WeightFormat",
    "activate",
    "after_step",
    "apply",
    "dequantize",
    "disabled",
    "hookimpl",
    "load",
    "load_sharded",
    "merge",
    "merge_loss",
    "methods",
    "plan",
    "prompt_tensor_name",
    "quantize",
    "remove",
    "save",
    "shard",
    "summary",
    "tensor_name",
    "unmerge",
]

_HOMES = {
    "Architecture": "architecture",
    "load": "checkpoint",
    "save": "checkpoint",
    "activate": "engine",
    "after_step": "engine",
    "apply": "engine",
    "disabled": "engine",
    "remove": "engine",
    "CheckpointError": "errors",
    "PeftcoreError": "errors",
    "PluginError": "errors",
    "hookimpl": "hookspecs",
    "merge": "merging.merge",
    "merge_loss": "merging.merge",
    "unmerge": "merging.merge",
    "After": "method",
    "Around": "method",
    "ForeignFormat": "method",
    "Method": "method",
    "PrefixKV": "method",
    "SoftPrompt": "method",
    "StateRules": "method",
    "Train": "method",
    "WeightFormat": "method",
    "prompt_tensor_name": "method",
    "tensor_name": "method",
    "TrainingState": "parallel",
    "load_sharded": "parallel",
    "shard": "parallel",
    "NF4Config": "quantization.huggingface",
    "dequantize": "quantization",
    "quantize": "quantization",
    "methods": "registry",
    "plan": "engine.summary",
    "summary": "engine.summary",
}


class _Package(ModuleType):
    """This package; `peftcore.merge` is the function, though a module has the same name."""

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(f"peftcore.{_HOMES[name]}"), name)
        elif name.startswith("__"):
            raise AttributeError(f"module 'peftcore' has no attribute '{name}'")
        else:
            try:
                value = import_module(f"peftcore.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"peftcore.{name}":
                    raise
                raise AttributeError(f"module 'peftcore' has no attribute '{name}'") from None
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):  # importing a submodule sets it here
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
