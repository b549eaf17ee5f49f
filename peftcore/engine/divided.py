"""Adapters of models under tensor or pipeline parallelism: which are refused, and what the others need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

from torch import nn

from peftcore import ranks
from peftcore.adaptation.adapted import is_adapted, rebuild
from peftcore.adaptation.base_modules import base_modules, original_class
from peftcore.adaptation.chain import OWN_FORWARD
from peftcore.adaptation.divided_experts import divide_factors, follows_experts, mesh_of_experts
from peftcore.adaptation.division import division_of, has_plan, plan_of
from peftcore.adaptation.parallel_hooks import divides_tokens, mesh_of_hooks, without_hooks
from peftcore.engine.placing import Placed
from peftcore.errors import PeftcoreError
from peftcore.placements.on_weight import WeightLink


def refuse_stage(model: nn.Module) -> None:
    """Raise a PeftcoreError if this rank has only a pipeline stage of the model."""
    if getattr(model, "_pp_stage", None) is not None:  # of transformers, for pp_size > 1
        raise PeftcoreError(
            "the model is divided into stages of a pipeline (pp_size), and this rank has only some of its layers: an "
            "adapter would cover these alone, and no gradient crosses the stages. Load the model without pp_size, "
            "apply, and call peftcore.shard(model), or load it with peftcore.load_sharded(folder)"
        )


def is_divided(model: nn.Module) -> bool:
    """Return whether tensor parallelism has divided layers of `model` over the ranks."""
    return ranks.count() > 1 and any(has_plan(module) for _, module in base_modules(model))


def refuse_divided(model: nn.Module, placed: Placed) -> None:
    """Raise a PeftcoreError if tensor parallelism splits a layer that an adapter would change and cannot follow.

    Adapters around and after linear layers follow a plan of transformers (`peftcore.adaptation.division`). Other layers
    of which every parameter is whole, and their gradients, are as in one process.
    """
    if ranks.count() == 1 and not ranks.is_sharded(model):
        return
    paths = {id(module): path for path, module in base_modules(model)}
    divided = {
        f"{paths[id(module)]}.{name}".removeprefix("."): parameter
        for fsdp, module in ranks.enclosed(model)
        for name, parameter in module._parameters.items()
        if id(module) in paths and parameter is not None and ranks.is_divided(ranks.behind(parameter), fsdp=fsdp)
    }
    tokens = divides_tokens(model)
    if not divided and not tokens:
        return
    for each in placed.attached:
        module = model.get_submodule(each.path)
        if each.link.follows_division and division_of(module) is not None:
            continue
        if each.link is WeightLink and mesh_of_experts(module) is not None:
            if follows_experts(module, WeightLink.changes_of(each.adapter)):
                continue
            raise PeftcoreError(
                f"{placed.method.name} cannot be applied: the ranks share out the experts of '{each.path}' (ep_size), "
                "and only low-rank products of single experts can follow them. Exclude the module, "
                f"exclude_modules=['{each.path.rpartition('.')[2]}'], or load the model without ep_size"
            )
        held = [name for name, parameter in module._parameters.items() if parameter is not None]
        own = [f"{each.path}.{name}".removeprefix(".") for name in held]
        found = f"the work of '{each.path}'" if has_plan(module) else f"the tokens of '{each.path}'" if tokens else None
        if found is None:
            needed = (placement.divided(each.path, own, divided) for placement in each.placements)
            found = next((f"'{name}'" for name in needed if name), None)
        weight = module._parameters.get("weight")
        if found is not None and weight is not None and not ranks.behind(weight).is_floating_point():
            raise PeftcoreError(
                f"{placed.method.name} cannot be applied: '{each.path}' was divided over the ranks after it was "
                "quantized, and its blocks of 4-bit values with it. Call peftcore.quantize(model) again, which gives "
                "each rank its part of the blocks"
            )
        if found is not None:
            raise PeftcoreError(
                f"{placed.method.name} cannot be applied: tensor parallelism (tp_plan, tp_size, parallelize_module) "
                f"divides {found} over the ranks, and the adapter needs all outputs or inputs of the layer. Load the "
                "model without it, apply, and call peftcore.shard(model), or load it by peftcore.load_sharded(folder)"
            )


def follows_plan(model: nn.Module) -> bool:
    """Return whether a parallel plan alone divides `model`, and every adapted module as adapters can follow it."""
    if not is_divided(model) or any(fsdp for fsdp, _ in ranks.enclosed(model)):
        return False
    return all(
        division_of(module) is not None or not any(map(ranks.is_part, module.parameters(recurse=False)))
        for _, module in base_modules(model)
        if is_adapted(module)
    )


def divide_experts(model: nn.Module, placed: Placed) -> None:
    """Leave each rank its experts' factors of adapters on experts that the ranks share out."""
    for each in placed.attached:
        if each.link is WeightLink:
            divide_factors(model.get_submodule(each.path), WeightLink.changes_of(each.adapter))


@contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """Run every layer whole on every rank inside the block, whatever a parallel plan says, as it reads whole weights.

    To be used inside `ranks.whole_when_read`.
    """
    planned = [
        (module, slot, module.__dict__[slot])
        for _, module in base_modules(model)
        if plan_of(module) is not None
        for slot in [OWN_FORWARD if OWN_FORWARD in module.__dict__ else "forward"]
    ]

    def exchange(module: nn.Module, slot: str, forward: Any) -> None:
        module.__dict__[slot] = forward
        if is_adapted(module):
            rebuild(module)

    for module, slot, _ in planned:
        cls = original_class(module)
        exchange(module, slot, MethodType(getattr(cls, "whole_forward", cls.forward), module))
    hooked = [module for _, module in base_modules(model) if mesh_of_hooks(module) is not None]
    adapted = [module for module in hooked if is_adapted(module)]
    try:
        with ExitStack() as stack:
            for module in hooked:
                stack.enter_context(without_hooks(module))
            for module in adapted:
                rebuild(module)
            yield
    finally:
        for module in adapted:
            rebuild(module)
        for module, slot, forward in planned:
            exchange(module, slot, forward)
