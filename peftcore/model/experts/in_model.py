"""Experts in a model: where their weights are, the layers of single experts, their routers, how many a token takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from peftcore.errors import PeftcoreError
from peftcore.model import cached_by_model, observe
from peftcore.model.base_modules import base_modules, has_own_forward, original_forward
from peftcore.model.experts.layout import (
    expert_linear,
    expert_path,
    experts_layout,
    split_expert_path,
    stacked_weights,
    why_not_fused,
)
from peftcore.model.weight_formats import weight_format
from peftcore.plugin.layers import is_linear, shape_of, sizes


@cached_by_model
def expert_weights(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return {path of a module of experts: names of its weights}."""
    found = {}
    for path, module in base_modules(model):
        names = stacked_weights(module) if path else ()
        if names and (experts_layout(module) is not None or not read_elsewhere(model, path, names)):
            found[path] = names
    return found


def read_elsewhere(model: nn.Module, path: str, names: Iterable[str]) -> bool:
    """Return whether only other modules read one of the parameters `names` of the module at `path` (DBRX's experts).

    An adapter would have no effect there. What a forward does not reach counts as read by its own module.
    """
    seen = observe(model)
    full = {f"{path}.{name}" for name in names}
    return bool(full & seen.other_reads.keys() - seen.own_reads)


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


def expert_layers(model: nn.Module, path: str, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers of single experts of the weights `names` of the module at `path`, by paths as in a list.

    Raises:
        PeftcoreError: transformers' experts interface does not run the module, or runs it on several processes.
    """
    module = model.get_submodule(path)
    layout = experts_layout(module)
    why = why_not_fused(module, original_forward(module)) if layout is not None else "its weights have another layout"
    if has_own_forward(module) or getattr(module, "_is_expert_parallel", False):
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


def dense_weight(model: nn.Module, path: str) -> Tensor:
    """Return the weight `[out, in]` of the layer at `path`.

    For `StateRules.read`, to compute what files of other libraries leave out.

    Raises:
        PeftcoreError: the weight is quantized, so other values would be computed from it.
    """
    layer = layer_at(model, path)
    found = weight_format(layer)
    if found.decode is not None:
        raise PeftcoreError(
            f"the file lacks values that were computed from the dense weight of '{path}', which here is in "
            f"{found.name}. Load the file on the dense base and save it again: peftcore.save(model, folder). That file "
            "can be loaded here"
        )
    return found.read(layer).detach()


def weight_named(model: nn.Module, path: str) -> str:
    """Return the full name of the stacked weight that an expert's layer belongs to; other paths unchanged."""
    found = split_expert_path(model, path)
    return path if found is None else f"{found[0]}.{found[1]}"


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
