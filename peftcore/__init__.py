"""peftcore: parameter-efficient fine-tuning as plugins. `peftcore.apply(model, "METHOD")` and train.

Names are imported when first used, so that the command line answers before PyTorch is loaded.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the public names, each once: type checkers read this, and so does `_homes`
    # Rooms that are reached through the package, which are no public names of it.
    from peftcore import experts as experts
    from peftcore import observation as observation
    from peftcore import optim as optim
    from peftcore import quantization as quantization
    from peftcore import targets as targets
    from peftcore import testing as testing
    from peftcore import validation as validation
    from peftcore.adaptation.call import Call as Call
    from peftcore.adaptation.call import current_call as current_call
    from peftcore.architecture import Architecture as Architecture
    from peftcore.checkpoint import load as load
    from peftcore.checkpoint import save as save
    from peftcore.checkpoint import set_resident_limit as set_resident_limit
    from peftcore.composing.combining import combine as combine
    from peftcore.composing.converting import convert as convert
    from peftcore.composing.swapping import state_dict as state_dict
    from peftcore.composing.swapping import swap as swap
    from peftcore.engine import activate as activate
    from peftcore.engine import after_step as after_step
    from peftcore.engine import apply as apply
    from peftcore.engine import disabled as disabled
    from peftcore.engine import extra_loss as extra_loss
    from peftcore.engine import loss_terms as loss_terms
    from peftcore.engine import parameter_groups as parameter_groups
    from peftcore.engine import remove as remove
    from peftcore.engine.calling import call_arguments as call_arguments
    from peftcore.engine.scaling import scale as scale
    from peftcore.engine.summary import plan as plan
    from peftcore.engine.summary import summary as summary
    from peftcore.errors import CheckpointError as CheckpointError
    from peftcore.errors import PeftcoreError as PeftcoreError
    from peftcore.errors import PluginError as PluginError
    from peftcore.estimating import Estimate as Estimate
    from peftcore.estimating import Step as Step
    from peftcore.estimating import Suggestion as Suggestion
    from peftcore.estimating import estimate as estimate
    from peftcore.estimating import suggest as suggest
    from peftcore.exporting.export import export as export
    from peftcore.hookspecs import hookimpl as hookimpl
    from peftcore.merging.merge import merge as merge
    from peftcore.merging.merge import merge_error as merge_error
    from peftcore.merging.merge import unmerge as unmerge
    from peftcore.method import After as After
    from peftcore.method import Around as Around
    from peftcore.method import Factors as Factors
    from peftcore.method import FileFormat as FileFormat
    from peftcore.method import FileLayout as FileLayout
    from peftcore.method import ForeignFormat as ForeignFormat
    from peftcore.method import Method as Method
    from peftcore.method import OnWeight as OnWeight
    from peftcore.method import PrefixKV as PrefixKV
    from peftcore.method import SoftPrompt as SoftPrompt
    from peftcore.method import StateRules as StateRules
    from peftcore.method import Train as Train
    from peftcore.method import WeightFormat as WeightFormat
    from peftcore.method import prompt_tensor_name as prompt_tensor_name
    from peftcore.method import tensor_name as tensor_name
    from peftcore.parallel import TrainingState as TrainingState
    from peftcore.parallel import load_sharded as load_sharded
    from peftcore.parallel import shard as shard
    from peftcore.quantization import dequantize as dequantize
    from peftcore.quantization import quantize as quantize
    from peftcore.quantization.huggingface import FourBitConfig as FourBitConfig
    from peftcore.registry import methods as methods

    __version__: str
    __all__: list[str]


@cache
def _homes() -> dict[str, str]:
    """{public name: the module that has it}, as this file says above."""
    import ast

    tree = ast.parse(Path(__file__).read_text("utf-8"))
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != __name__)
    return {alias.asname: str(node.module) for node in imports for alias in node.names if alias.asname}


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("peftcore")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0"


if not TYPE_CHECKING:  # a type checker that sees it lets any name pass

    def __getattr__(name: str) -> Any:
        if name in _homes():
            value = getattr(import_module(_homes()[name]), name)
        elif name == "__version__":
            value = _installed_version()
        elif name == "__all__":
            value = sorted(_homes())
        elif not name.startswith("_") and find_spec(f"peftcore.{name}"):
            value = import_module(f"peftcore.{name}")
        else:
            raise AttributeError(f"module 'peftcore' has no attribute '{name}'")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return ["__version__", *sorted(_homes())]


import_module("peftcore.integrations")  # they subscribe to events of rooms below, and import no library yet
