"""What a config trains besides its adapters: `modules_to_save` and biases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from peftcore.adaptation.base_modules import base_modules, base_parameters
from peftcore.errors import PeftcoreError, nearest
from peftcore.experts import expert_biases
from peftcore.experts.in_model import weight_named
from peftcore.placements.train import Train
from peftcore.targets.expert_selection import ALL_LINEAR
from peftcore.targets.names import matches
from peftcore.targets.patterns import compiled


def trained_modules(model: nn.Module, modules_to_save: Sequence[str]) -> Train:
    """Return the parameters of the modules that `modules_to_save` selects, to be trained themselves.

    Raises:
        PeftcoreError: an entry matches no module with parameters.
    """
    names = [name for name, _ in base_parameters(model)]
    trained: list[str] = []
    for pattern in modules_to_save:
        paths = [path for path, _ in base_modules(model) if path and matches(pattern, path)]
        inside = [name for name in names if any(name.startswith(f"{path}.") for path in paths)]
        if not inside:
            known = {part for path, _ in base_modules(model) for part in (path, path.rpartition(".")[2])}
            raise PeftcoreError(
                f"modules_to_save: '{pattern}' matches no module with parameters{nearest(pattern, known)}"
            )
        trained += inside
    return Train(tuple(dict.fromkeys(trained)))


def refuse_targeted(target_modules: Any, paths: Iterable[str], why: str) -> None:
    """Raise a PeftcoreError if `target_modules` selects one of the modules `paths`, which are trained as a whole."""
    if not target_modules or target_modules == ALL_LINEAR:
        return
    for path in paths:
        if isinstance(target_modules, str):
            named = compiled(target_modules, "target_modules")(path)
        else:
            named = any(matches(pattern, path) for pattern in target_modules)
        if named:
            raise PeftcoreError(
                f"target_modules={target_modules!r} selects '{path}', whose weight is {why}, which modules_to_save "
                "trains as a whole. Remove it from target_modules, or untie the two: ensure_weight_tying=False"
            )


def biases(model: nn.Module, paths: Iterable[str] | None = None) -> Train:
    """Return the parameters named `bias` of the whole model or of the modules `paths`."""
    names = [name for name, _ in base_parameters(model) if name.rpartition(".")[2] == "bias"]
    if paths is not None:
        paths = set(paths)
        names = [name for name in names if name.rpartition(".")[0] in paths]
    return Train(tuple(names))


def trained_biases(model: nn.Module, bias: str, paths: Iterable[str]) -> list[Train]:
    """Return what PEFT's field `bias` trains: "none", "all" biases of the model, or otherwise those of `paths`."""
    if bias == "none":
        return []
    of_experts = next((path for path in paths if weight_named(model, path) != path), None)
    if of_experts is not None and any(expert_biases(module) for _, module in base_modules(model)):
        raise PeftcoreError(
            f"bias={bias!r} is not supported for the expert '{of_experts}', whose biases have other names. "
            "Choose bias='none'"
        )
    return [biases(model, None if bias == "all" else paths)]
