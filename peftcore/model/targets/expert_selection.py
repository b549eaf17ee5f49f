"""Selection of experts' weights: parameters `[experts, out, in]` that do not belong to linear layers.

`all-linear` selects all of them if the method supports them. An entry of `target_modules` that matches no module that
the method adapts may match a module of experts (`experts`) or a weight of one (`gate_up_proj`,
`mlp.experts.down_proj`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import nn

from peftcore.model import bypassed
from peftcore.model.base_modules import base_modules, base_parameters
from peftcore.model.experts.in_model import expert_weights
from peftcore.model.targets.patterns import compiled, excluded, is_inside, layer_indices, matches, shortest_suffixes
from peftcore.plugin.layers import is_linear

ALL_LINEAR = "all-linear"


def weight_owners(model: nn.Module) -> dict[str, str]:
    """Return {full name of an experts' weight: path of the module that has it}, in the model's order."""
    owners: dict[str, str] = {}
    for path, names in expert_weights(model).items():
        owners |= {f"{path}.{name}": path for name in names}
    return owners


def name_experts(
    model: nn.Module, target_modules: str | Sequence[str], supported: Callable[[nn.Module], bool]
) -> tuple[str | list[str], list[str]]:
    """Split `target_modules` into (entries for modules that the method adapts, full names of experts' weights).

    An entry means experts if it matches a module of experts or a weight of theirs, and no module that is `supported`.
    `all-linear` is returned as it is, with no names: see `select_experts`.

    Args:
        model: the model.
        target_modules: as in `select`.
        supported: (module) -> whether the method can adapt it.
    """
    weights = weight_owners(model)
    if not weights or target_modules == ALL_LINEAR:
        return target_modules if isinstance(target_modules, str) else list(dict.fromkeys(target_modules)), []
    modules = [path for path, module in base_modules(model) if supported(module)]

    def meant(test: Callable[[str], bool]) -> list[str]:
        """Return the weights that match, unless a module does."""
        return [] if any(map(test, modules)) else [name for name, path in weights.items() if test(path) or test(name)]

    if isinstance(target_modules, str):
        named = meant(compiled(target_modules, "target_modules"))
        return ([] if named else target_modules), named
    by_entry = {entry: meant(partial(matches, entry)) for entry in target_modules}
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
    """Return the full names of the selected experts' weights in the model's order, with the arguments of `select`.

    `all-linear` selects all of them but those that are bypassed.
    """
    weights = weight_owners(model)
    if target_modules == ALL_LINEAR:
        past = bypassed(model) if weights else {}
        chosen = [name for name, path in weights.items() if path not in past]
    else:
        chosen = name_experts(model, target_modules, supported)[1]
    if not chosen:
        return []
    without = excluded([*(path for path, _ in base_modules(model)), *weights], exclude_modules)
    chosen = [name for name in chosen if name not in without and weights[name] not in without]
    chosen = [name for name in chosen if not any(is_inside(saved, weights[name]) for saved in modules_to_save or ())]
    if layers_to_transform is not None:
        wanted = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
        indices = layer_indices(chosen, layers_pattern)
        chosen = [name for name in chosen if indices[name] in wanted]
    return chosen


def parameter_suffixes(model: nn.Module, chosen: Iterable[str]) -> list[str]:
    """Return the shortest list of suffixes, including module names, that selects exactly the parameters `chosen`."""
    chosen = set(chosen)
    names: list[str] = [name for name, _ in base_parameters(model)] + [path for path, _ in base_modules(model)]
    return shortest_suffixes(chosen, [name for name in names if name not in chosen], parts=2)
