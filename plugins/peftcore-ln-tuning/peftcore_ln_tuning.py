"""LN tuning (Zhao et al. 2023, arXiv 2312.11420): only the gains and shifts of the norms are trained.

    y = g ⊙ (x - mean x) / std x + b        g, b [hidden] of every LayerNorm; of an RMSNorm g

Trained: one or two vectors per norm, which merge.
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
        target_modules: "all-norms": every norm without running statistics (LayerNorm, RMSNorm, GroupNorm); or suffixes,
            or a regular expression for whole paths, of modules of any class, which are trained in full.
        exclude_modules: suffixes, or a regular expression, of modules to leave out.
        modules_to_save: modules to train in full as well. None: a classifier's head.
    """

    target_modules: str | Sequence[str] = ALL_NORMS
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        validation.check_types(self)

    def resolved(self, model: nn.Module, architecture: Architecture) -> LNTuningConfig:
        """Return the config with explicit module names, only the outermost of nested modules.

        PEFT refuses a config that selects a module and one inside it.
        """
        chosen = selected(model, self, architecture)
        outermost = [path for path in chosen if not any(outer in chosen for outer in [*ancestors(path)][:-1])]
        if self.target_modules != ALL_NORMS and len(outermost) == len(chosen):
            return self
        named = targets.minimal_suffixes(model, outermost)
        return LNTuningConfig(named, self.exclude_modules, self.modules_to_save)


def matcher(patterns: str | Sequence[str]) -> Callable[[str], bool]:
    """Return whether a regular expression, or one of a list of suffixes, means a path, as a function of the path."""
    if isinstance(patterns, str):
        return targets.compiled(patterns, "target_modules")
    return lambda path: any(targets.matches(pattern, path) for pattern in patterns)


def ancestors(path: str) -> Iterator[str]:
    """Yield the paths of the modules around `path`, the outermost first, and `path` itself."""
    names = path.split(".")
    return (".".join(names[: i + 1]) for i in range(len(names)))


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm without running statistics: a class named ...Norm with one or two vectors."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    is_one = original_class(module).__name__.rstrip("123d").endswith("Norm")
    return is_one and bool(own) and all(p.dim() == 1 for p in own) and not module._buffers and not module._modules


def selected(model: nn.Module, config: LNTuningConfig, architecture: Architecture) -> dict[str, nn.Module]:
    """Return the modules that the config selects, by path."""
    every = config.target_modules == ALL_NORMS
    chosen = targets.select(
        model,
        architecture,
        target_modules=".*" if every else config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        supported=is_norm if every else lambda module: bool(base_parameters(module)),
        own_parameters=True,
    )
    return chosen


def place(model: nn.Module, config: LNTuningConfig, architecture: Architecture) -> list[Placement]:
    chosen = selected(model, config, architecture)
    return [Train([f"{p}.{name}" for p, module in chosen.items() for name, _ in base_parameters(module)])]


def tensor_name(placement: Any, name: str) -> str:
    """Return `PATH.ln_tuning_layers.NAME`, also for a module inside a selected one; see `write`."""
    if placement.saved:  # a `Train`
        return plugin.tensor_name(placement, name)
    path, _, parameter = name.rpartition(".")
    return plugin.tensor_name(placement, f"{path}{COPY}{parameter}")


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Name tensors as in PEFT's copy of a chosen module: with its buffers, and the adapter before modules inside it."""
    if not tensors:
        return tensors, fields
    named, without = matcher(fields["target_modules"]), matcher(fields["exclude_modules"] or ())
    written = {}
    for name, tensor in tensors.items():
        path, _, own = name.removeprefix(BASE).replace(COPY, ".").rpartition(".")
        saved = any(targets.is_inside(entry, path) for entry in fields["modules_to_save"] or ())
        outer = None if saved else next((p for p in ancestors(path) if named(p) and not without(p)), None)
        inside = "" if outer in (None, path) else f"default.{path.removeprefix(f'{outer}.')}."
        written[name if outer is None else f"{BASE}{outer}{COPY}{inside}{own}"] = tensor
    return written, fields


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Return the tensors under the names of `tensor_name`, whatever adapter `write` or PEFT named."""
    if model is None:
        return tensors, fields
    buffers = {name for name, _ in model.named_buffers()}
    found = {}
    for name, tensor in tensors.items():
        outer, copied, inside = name.removeprefix(BASE).partition(COPY)
        _adapter, *modules = inside.rpartition(".")[0].split(".")
        path, own = ".".join([outer, *modules]), inside.rpartition(".")[2]
        of_copy = f"{BASE}{path}.{own}" if f"{path}.{own}" in buffers else f"{BASE}{path}{COPY}{own}"
        found[of_copy if copied else name] = tensor
    return found, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="LN_TUNING", tensor_name=tensor_name, read=read, write=write)
    return [Method("ln-tuning", LNTuningConfig, place, rules, learning_rate=1e-3)]
