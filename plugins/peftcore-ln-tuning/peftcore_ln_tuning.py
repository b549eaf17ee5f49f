"""LN tuning (Zhao et al. 2023, arXiv 2312.11420): train only the gains and shifts of the norms.

    y = g ⊙ (x - mean x) / std x + b        g and b [hidden] of every LayerNorm; only g of an RMSNorm

They are parameters of the base model, so they can be merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftcore import plugin
from peftcore.plugin import (
    Architecture,
    Fields,
    Method,
    Placement,
    StateRules,
    Tensors,
    Train,
    base_parameters,
    hookimpl,
    original_class,
    targets,
    validation,
)

peftcore_api = ">=3.0,<4"

ALL_NORMS = "all-norms"
BASE, COPY = "base_model.model.", ".ln_tuning_layers."  # PEFT keeps a trained copy of each selected module


@dataclass(frozen=True)
class LNTuningConfig:
    """Config with the field names of Hugging Face PEFT's `LNTuningConfig`.

    Args:
        target_modules: "all-norms": every norm without running statistics (LayerNorm, RMSNorm, GroupNorm). Otherwise
            suffixes, or a regular expression for whole paths, of modules of any class, which are trained in full.
        exclude_modules: suffixes, or a regular expression, of modules to leave alone.
        modules_to_save: modules to train in full as well. None means a classifier's head.
    """

    target_modules: str | Sequence[str] = ALL_NORMS
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)

    def resolved(self, model: nn.Module, architecture: Architecture) -> LNTuningConfig:
        """Return the config with module names. Of nested modules only the outermost is named, as PEFT requires."""
        modules = selected(model, self, architecture)
        outermost = [path for path in modules if next(outer for outer in ancestors(path) if outer in modules) == path]
        if self.target_modules != ALL_NORMS and len(outermost) == len(modules):
            return self
        suffixes = targets.minimal_suffixes(model, outermost)
        return LNTuningConfig(suffixes, self.exclude_modules, self.modules_to_save)


def matcher(patterns: str | Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a path matches a regular expression, or one of a list of suffixes."""
    if isinstance(patterns, str):
        return targets.compile_pattern(patterns, "target_modules")
    return lambda path: any(targets.matches(pattern, path) for pattern in patterns)


def ancestors(path: str) -> Iterator[str]:
    """Yield the paths of the modules around `path`, outermost first, and then `path` itself."""
    names = path.split(".")
    return (".".join(names[: i + 1]) for i in range(len(names)))


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm without running statistics: a class ...Norm whose parameters are vectors."""
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    has_norm_name = original_class(module).__name__.rstrip("123d").endswith("Norm")
    only_vectors = bool(parameters) and all(parameter.dim() == 1 for parameter in parameters)
    return has_norm_name and only_vectors and not module._buffers and not module._modules


def selected(model: nn.Module, config: LNTuningConfig, architecture: Architecture) -> dict[str, nn.Module]:
    """Return the selected modules by path."""
    all_norms = config.target_modules == ALL_NORMS
    return targets.select(
        model,
        architecture,
        target_modules=".*" if all_norms else config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        supported=is_norm if all_norms else lambda module: bool(base_parameters(module)),
        own_parameters=True,
    )


def place(model: nn.Module, config: LNTuningConfig, architecture: Architecture) -> list[Placement]:
    names: list[str] = []
    for path, module in selected(model, config, architecture).items():
        names += [f"{path}.{name}" for name, _ in base_parameters(module)]
    return [Train(names)]


def tensor_name(placement: Any, name: str) -> str:
    """Return `PATH.ln_tuning_layers.NAME`, also for a module inside a selected one, whose name `write` corrects."""
    if placement.saved:  # a module of modules_to_save
        return plugin.tensor_name(placement, name)
    path, _, parameter = name.rpartition(".")
    return plugin.tensor_name(placement, f"{path}{COPY}{parameter}")


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Give tensors the names in PEFT, which copies a selected module.

    The copy has the module's buffers. Names of modules inside it begin with the adapter's name, "default".
    """
    if not tensors:
        return tensors, fields
    is_target, is_excluded = matcher(fields["target_modules"]), matcher(fields["exclude_modules"] or ())
    renamed = {}
    for name, tensor in tensors.items():
        path, _, parameter = name.removeprefix(BASE).replace(COPY, ".").rpartition(".")
        in_saved_module = any(targets.is_inside(entry, path) for entry in fields["modules_to_save"] or ())
        selected_ancestors = (p for p in ancestors(path) if is_target(p) and not is_excluded(p))
        copied_module = None if in_saved_module else next(selected_ancestors, None)
        if copied_module is None:
            renamed[name] = tensor
            continue
        subpath = "" if copied_module == path else f"default.{path.removeprefix(f'{copied_module}.')}."
        renamed[f"{BASE}{copied_module}{COPY}{subpath}{parameter}"] = tensor
    return renamed, fields


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Give tensors the names of `tensor_name`, whatever the adapter's name in the file."""
    if model is None:
        return tensors, fields
    buffers = {name for name, _ in model.named_buffers()}
    renamed = {}
    for name, tensor in tensors.items():
        copied_module, separator, subpath = name.removeprefix(BASE).partition(COPY)
        if not separator:
            renamed[name] = tensor
            continue
        _adapter, *modules = subpath.rpartition(".")[0].split(".")
        path, parameter = ".".join([copied_module, *modules]), subpath.rpartition(".")[2]
        is_buffer = f"{path}.{parameter}" in buffers
        renamed[f"{BASE}{path}.{parameter}" if is_buffer else f"{BASE}{path}{COPY}{parameter}"] = tensor
    return renamed, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="LN_TUNING", tensor_name=tensor_name, read=read, write=write)
    return [Method("ln-tuning", LNTuningConfig, place, rules, learning_rate=1e-3)]
