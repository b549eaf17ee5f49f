"""Selection of experts' weights: parameters `[experts, out, in]` that do not belong to linear layers.

`all-linear` selects all of them if the method supports them. An entry of `target_modules` that matches no module that
the method adapts may match a module of experts (`experts`) or a weight of one (`gate_up_proj`,
`mlp.experts.down_proj`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import takewhile
from types import CodeType
from typing import Any

from torch import nn

from peftcore.adaptation.adapted import base_modules, base_parameters, has_forward_of_instance
from peftcore.adaptation.class_swap import original_class, original_forward
from peftcore.errors import PeftcoreError
from peftcore.experts import (
    expert_linear,
    expert_path,
    experts_layout,
    split_expert_path,
    stacked_weights,
    why_not_fused,
)
from peftcore.layers import is_linear, shape_of, sizes
from peftcore.observation import bypassed, once_a_model
from peftcore.targets.names import excluded, is_inside, layer_indices, matches, shortest_suffixes
from peftcore.targets.patterns import compiled

ALL_LINEAR = "all-linear"


@once_a_model
def expert_weights(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return {path of a module of experts: names of its weights}."""
    found = {}
    for path, module in base_modules(model):
        names = stacked_weights(module) if path else ()
        if names and (experts_layout(module) is not None or all(is_read_by_itself(module, name) for name in names)):
            found[path] = names
    return found


def is_read_by_itself(module: nn.Module, name: str) -> bool:
    """Return whether a method of the module's class reads its parameter `name`.

    Otherwise other modules read it past the module's forward, so an adapter would have no effect (DBRX's experts).
    """
    own = takewhile(lambda cls: cls is not nn.Module, original_class(module).__mro__)
    methods = (each for cls in own for key, each in vars(cls).items() if key not in ("__init__", "reset_parameters"))
    codes = [getattr(inspect.unwrap(getattr(each, "__func__", each)), "__code__", None) for each in methods]
    while codes:
        code = codes.pop()
        if code is not None:
            if name in code.co_names:
                return True
            codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return False


def routers(model: nn.Module) -> set[str]:
    """Return the paths of linear layers that choose among experts."""
    found: set[str] = set()
    for path, names in expert_weights(model).items():
        block = path.rpartition(".")[0]
        count = shape_of(model.get_submodule(path), names[0])[0]
        for inside, module in base_modules(model.get_submodule(block)):
            is_named = any(word in inside for word in ("gate", "router"))
            if is_linear(module) and is_named and sizes(module)[1] == count:
                found.add(f"{block}.{inside}" if block else inside)
    return found


def name_experts(
    model: nn.Module, target_modules: str | Sequence[str], supported: Callable[[nn.Module], bool]
) -> tuple[str | list[str], list[str]]:
    """Split `target_modules` into (entries for modules that the method adapts, full names of experts' weights)."""
    modules = [path for path, module in base_modules(model) if supported(module)]
    weights = [(path, f"{path}.{name}") for path, names in expert_weights(model).items() for name in names]

    def meant(test: Callable[[str], bool]) -> list[str]:
        """Return the weights that match, unless a module does."""
        return [] if any(map(test, modules)) else [name for path, name in weights if test(path) or test(name)]

    if isinstance(target_modules, str):
        if target_modules == ALL_LINEAR or not weights:
            return target_modules, []
        named = meant(compiled(target_modules, "target_modules"))
        return ([] if named else target_modules), named
    by_entry = {entry: meant(partial(matches, entry)) for entry in target_modules}
    names = dict.fromkeys(name for found in by_entry.values() for name in found)
    return [entry for entry, found in by_entry.items() if not found], list(names)


def expert_layers(model: nn.Module, path: str, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers of single experts of the weights `names` of the module at `path`, by paths as in a list.

    Raises:
        PeftcoreError: transformers' experts interface does not run the module, or runs it on several processes.
    """
    module = model.get_submodule(path)
    layout = experts_layout(module)
    why = why_not_fused(module, original_forward(module)) if layout is not None else "its weights have another layout"
    if has_forward_of_instance(module) or getattr(module, "_is_expert_parallel", False):
        why = "they are distributed over processes (tensor or expert parallelism), or have their own forward"
    if layout is None or why is not None:
        raise PeftcoreError(
            f"the experts at '{path}' cannot be adapted one by one: {why}. Leave them out, "
            f"exclude_modules=['{path.rpartition('.')[2]}'], or choose a method that changes their weights as a whole"
        )
    return {
        expert_path(path, name, expert): expert_linear(module, name, expert)
        for expert in range(layout.count)
        for name in names
    }


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, which may be that of one expert's layer."""
    found = split_expert_path(model, path)
    return model.get_submodule(path) if found is None else expert_linear(model.get_submodule(found[0]), *found[1:])


def weight_named(model: nn.Module, path: str) -> str:
    """Return the full name of the stacked weight that an expert's layer belongs to; other paths unchanged."""
    found = split_expert_path(model, path)
    return path if found is None else f"{found[0]}.{found[1]}"


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
    """Return the full names of the selected experts' weights in the model's order, with the arguments of `select`."""
    weights = {f"{path}.{name}": path for path, names in expert_weights(model).items() for name in names}
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


def experts_per_token(module: Any, model: Any) -> int:
    """Return the number of experts per token from the module's or the model's config; 1 if neither has it."""
    configs: list[Any] = [getattr(module, "config", None), getattr(model, "config", None)]
    configs += [each.get_text_config() for each in configs if hasattr(each, "get_text_config")]
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "num_selected_experts")
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            value = max(value, default=None) if isinstance(value, (list, tuple)) else value
            if type(value) is int and value > 0:
                return value
    return 1
