"""Find the experts of a model: stacked weights, linear layers of single experts, routers, experts per token."""

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
    """Return {path of a module of experts: names of its stacked weights}."""
    weights = {}
    for path, module in base_modules(model):
        names = stacked_weights(module) if path else ()
        if names and (experts_layout(module) is not None or not is_read_elsewhere(model, path, names)):
            weights[path] = names
    return weights


def is_read_elsewhere(model: nn.Module, path: str, names: Iterable[str]) -> bool:
    """Return whether a parameter in `names` is read only by other modules than its own (DBRX's experts).

    An adapter of the module would not affect such reads. Parameters that the forward does not reach count as read by
    their own module.
    """
    observation = observe(model)
    full_names = {f"{path}.{name}" for name in names}
    return bool(full_names & observation.other_reads.keys() - observation.own_reads)


def routers(model: nn.Module) -> set[str]:
    """Return the paths of the linear layers that route tokens to experts."""
    paths: set[str] = set()
    for path, names in expert_weights(model).items():
        block = path.rpartition(".")[0]
        count = shape_of(model.get_submodule(path), names[0])[0]
        for name, module in base_modules(model.get_submodule(block)):
            is_named = any(word in name for word in ("gate", "router"))
            if is_linear(module) and is_named and sizes(module)[1] == count:
                paths.add(f"{block}.{name}" if block else name)
    return paths


def expert_layers(model: nn.Module, path: str, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return {path as in a list of experts, `experts.3.down_proj`: linear layer} for experts of stacked weights.

    Raises:
        PeftcoreError: the module does not use transformers' experts interface, or its experts are on several processes.
    """
    module = model.get_submodule(path)
    layout = experts_layout(module)
    reason = (
        why_not_fused(module, original_forward(module)) if layout is not None else "its weights have another layout"
    )
    if has_own_forward(module) or getattr(module, "_is_expert_parallel", False):
        reason = "they are sharded (tensor or expert parallelism), or their instance has its own forward"
    if layout is None or reason is not None:
        raise PeftcoreError(
            f"the experts at '{path}' cannot be adapted one by one: {reason}. Exclude them with "
            f"exclude_modules=['{path.rpartition('.')[2]}'], or choose a method that changes stacked weights"
        )
    return {
        expert_path(path, name, expert): expert_linear(module, name, expert)
        for expert in range(layout.count)
        for name in names
    }


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, which may name a single expert (`expert_path`)."""
    split = split_expert_path(model, path)
    return model.get_submodule(path) if split is None else expert_linear(model.get_submodule(split[0]), *split[1:])


def dense_weight(model: nn.Module, path: str) -> Tensor:
    """Return the dense weight `[out, in]` of the layer at `path`.

    `StateRules.read` uses the weight to compute tensors that other libraries do not store.

    Raises:
        PeftcoreError: the weight is quantized, so tensors computed from it would differ.
    """
    layer = layer_at(model, path)
    layer_format = weight_format(layer)
    if layer_format.decode is not None:
        raise PeftcoreError(
            "the file does not contain all tensors, and the missing ones must be computed from the dense weight of "
            f"'{path}', but this model has the weight in {layer_format.name}. Load the file on the dense base and "
            "save it again (peftcore.save(model, folder)); the new file loads on this model"
        )
    return layer_format.read(layer).detach()


def stacked_weight_name(model: nn.Module, path: str) -> str:
    """Map the path of a single expert to the full name of its stacked weight; return other paths unchanged."""
    split = split_expert_path(model, path)
    return path if split is None else f"{split[0]}.{split[1]}"


def experts_per_token(module: Any, model: Any) -> int:
    """Return the number of experts per token from the module's or the model's config, or 1 by default."""
    configs: list[Any] = [getattr(module, "config", None), getattr(model, "config", None)]
    configs += [config.get_text_config() for config in configs if hasattr(config, "get_text_config")]
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "num_selected_experts")
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            value = max(value, default=None) if isinstance(value, (list, tuple)) else value
            if type(value) is int and value > 0:
                return value
    return 1
