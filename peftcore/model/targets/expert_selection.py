"""Select the stacked weights of experts, `[experts, out, in]`, which do not belong to linear layers.

`all-linear` selects all stacked weights if the method supports them. An entry of `target_modules` selects a module of
experts (`experts`) or one of its weights (`gate_up_proj`, `mlp.experts.down_proj`) if it does not match a module that
the method can adapt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import nn

from peftcore.model import bypassed_layers
from peftcore.model.base_modules import base_modules, base_parameters
from peftcore.model.experts.in_model import expert_weights
from peftcore.model.targets.patterns import (
    compile_pattern,
    excluded,
    is_inside,
    layer_indices,
    matches,
    shortest_suffixes,
)
from peftcore.plugin.layers import is_linear

ALL_LINEAR = "all-linear"


def weight_owners(model: nn.Module) -> dict[str, str]:
    """Return {full name of a stacked weight: path of its module}, in the model's order."""
    owners: dict[str, str] = {}
    for path, names in expert_weights(model).items():
        owners |= {f"{path}.{name}": path for name in names}
    return owners


def name_experts(
    model: nn.Module, target_modules: str | Sequence[str], supported: Callable[[nn.Module], bool]
) -> tuple[str | list[str], list[str]]:
    """Split `target_modules` into (entries for adaptable modules, full names of selected stacked weights).

    An entry selects experts if it matches a module of experts or one of its weights, but no `supported` module.
    `all-linear` is returned unchanged and without names; `select_experts` handles it.

    Args:
        model: the model.
        target_modules: as in `select`.
        supported: (module) -> whether the method can adapt it.
    """
    weights = weight_owners(model)
    if not weights or target_modules == ALL_LINEAR:
        return target_modules if isinstance(target_modules, str) else list(dict.fromkeys(target_modules)), []
    modules = [path for path, module in base_modules(model) if supported(module)]

    def matching_weights(test: Callable[[str], bool]) -> list[str]:
        """Return the stacked weights that match; an empty list if a module matches."""
        if any(map(test, modules)):
            return []
        return [name for name, path in weights.items() if test(path) or test(name)]

    if isinstance(target_modules, str):
        matching = matching_weights(compile_pattern(target_modules, "target_modules"))
        return ([] if matching else target_modules), matching
    by_entry = {entry: matching_weights(partial(matches, entry)) for entry in target_modules}
    names = dict.fromkeys(name for weights_of in by_entry.values() for name in weights_of)
    return [entry for entry, weights_of in by_entry.items() if not weights_of], list(names)


def select_experts(
    model: nn.Module,
    *,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    supported: Callable[[nn.Module], bool] = is_linear,
    modules_to_save: Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
) -> list[str]:
    """Return the full names of the selected stacked weights, in the model's order.

    The arguments are those of `select`. `all-linear` selects all stacked weights that are not bypassed.
    """
    weights = weight_owners(model)
    if target_modules == ALL_LINEAR:
        bypass_reasons = bypassed_layers(model) if weights else {}
        selected = [name for name, path in weights.items() if path not in bypass_reasons]
    else:
        selected = name_experts(model, target_modules, supported)[1]
    if not selected:
        return []
    excluded_names = excluded([*(path for path, _ in base_modules(model)), *weights], exclude_modules)
    selected = [name for name in selected if name not in excluded_names and weights[name] not in excluded_names]
    selected = [
        name for name in selected if not any(is_inside(entry, weights[name]) for entry in modules_to_save or ())
    ]
    if layers_to_transform is not None:
        layers = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
        indices = layer_indices(selected, layers_pattern)
        selected = [name for name in selected if indices[name] in layers]
    return selected


def parameter_suffixes(model: nn.Module, selected: Iterable[str]) -> list[str]:
    """Return the shortest list of suffixes, with at least the module's name, that selects exactly these parameters."""
    selected = set(selected)
    names: list[str] = [name for name, _ in base_parameters(model)] + [path for path, _ in base_modules(model)]
    return shortest_suffixes(selected, [name for name in names if name not in selected], parts=2)
