"""peftcore: parameter-efficient fine-tuning as plugins. `peftcore.apply(model, "METHOD")` and train.

Names are imported when first used, so that the command line answers before PyTorch is loaded.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers read the public names here, programs in `_PUBLIC`
    # Packages that are reached as attributes and are not public names.
    from peftcore import optim as optim, quantization as quantization
    from peftcore.composing.adapter_state import set_state_dict as set_state_dict, state_dict as state_dict
    from peftcore.composing.combining import combine as combine
    from peftcore.composing.converting import convert as convert
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
    from peftcore.engine.configs import config as config
    from peftcore.engine.fusing import fuse as fuse
    from peftcore.engine.loss_without_logits import loss_without_logits as loss_without_logits
    from peftcore.engine.scaling import scale as scale
    from peftcore.engine.summary import plan as plan, summary as summary
    from peftcore.errors import (
        CheckpointError as CheckpointError,
        PeftcoreError as PeftcoreError,
        PluginError as PluginError,
    )
    from peftcore.estimating import (
        Estimate as Estimate,
        Step as Step,
        Suggestion as Suggestion,
        estimate as estimate,
        suggest as suggest,
    )
    from peftcore.exporting.export import export as export
    from peftcore.files.loading import load as load
    from peftcore.files.saving import save as save
    from peftcore.integrations.reference_model import reference_model as reference_model
    from peftcore.merging.merge import merge as merge, merge_error as merge_error, unmerge as unmerge
    from peftcore.parallel import TrainingState as TrainingState, load_sharded as load_sharded, shard as shard
    from peftcore.quantization import dequantize as dequantize, quantize as quantize
    from peftcore.quantization.huggingface import FourBitConfig as FourBitConfig
    from peftcore.registry import methods as methods

    __version__: str
    __all__: list[str]


# {module: its public names}; `tests/test_public_names.py` compares the names with the imports above.
_PUBLIC = {
    "peftcore.composing.adapter_state": ("set_state_dict", "state_dict"),
    "peftcore.composing.combining": ("combine",),
    "peftcore.composing.converting": ("convert",),
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
    "peftcore.engine.fusing": ("fuse",),
    "peftcore.engine.loss_without_logits": ("loss_without_logits",),
    "peftcore.engine.scaling": ("scale",),
    "peftcore.engine.summary": ("plan", "summary"),
    "peftcore.errors": ("CheckpointError", "PeftcoreError", "PluginError"),
    "peftcore.estimating": ("Estimate", "Step", "Suggestion", "estimate", "suggest"),
    "peftcore.exporting.export": ("export",),
    "peftcore.files.loading": ("load",),
    "peftcore.files.saving": ("save",),
    "peftcore.integrations.reference_model": ("reference_model",),
    "peftcore.merging.merge": ("merge", "merge_error", "unmerge"),
    "peftcore.parallel": ("TrainingState", "load_sharded", "shard"),
    "peftcore.quantization": ("dequantize", "quantize"),
    "peftcore.quantization.huggingface": ("FourBitConfig",),
    "peftcore.registry": ("methods",),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("peftcore")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0"


if not TYPE_CHECKING:  # a type checker that sees it lets any name pass

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        elif name == "__version__":
            value = _installed_version()
        elif name == "__all__":
            value = sorted(_HOMES)
        elif not name.startswith("_") and find_spec(f"peftcore.{name}"):
            value = import_module(f"peftcore.{name}")
        else:
            raise AttributeError(f"module 'peftcore' has no attribute '{name}'")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return ["__version__", *sorted(_HOMES)]


import_module("peftcore.integrations")  # subscribes to `apply`; patches nothing and imports no library
