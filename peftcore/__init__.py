"""peftcore: parameter-efficient fine-tuning as plugins. `peftcore.apply(model, "METHOD")` and train."""

from importlib.metadata import PackageNotFoundError, version

from peftcore.architecture import Architecture
from peftcore.checkpoint import load, save
from peftcore.engine import activate, after_step, apply, disabled, remove
from peftcore.errors import CheckpointError, PeftcoreError, PluginError
from peftcore.hookspecs import hookimpl
from peftcore.merge import merge, unmerge
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
    tensor_name,
)
from peftcore.registry import methods
from peftcore.summary import plan, summary

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
    "PeftcoreError",
    "PluginError",
    "PrefixKV",
    "SoftPrompt",
    "StateRules",
    "Train",
    "WeightFormat",
    "activate",
    "after_step",
    "apply",
    "disabled",
    "hookimpl",
    "load",
    "merge",
    "methods",
    "plan",
    "remove",
    "save",
    "summary",
    "tensor_name",
    "unmerge",
]
