"""Adapters of models under tensor or pipeline parallelism: which are refused, and what the others need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

from torch import nn

from peftcore.engine.adaptation.adapted import is_adapted, rebuild
from peftcore.engine.adaptation.expert_parallel import divide_factors
from peftcore.engine.adaptation.tensor_parallel import division_of, has_plan, mesh_of_hooks, plan_of, without_hooks
from peftcore.engine.attachments import AdapterAttachments
from peftcore.model.base_modules import OWN_FORWARD, base_modules, original_class
from peftcore.plugin import ranks, sharded
from peftcore.plugin.placements.on_weight import WeightLink


def is_divided(model: nn.Module) -> bool:
    """Return whether tensor parallelism has divided layers of `model` over the ranks."""
    return ranks.count() > 1 and any(has_plan(module) for _, module in base_modules(model))


def follows_plan(model: nn.Module) -> bool:
    """Return whether a parallel plan alone divides `model`, and every adapted module as adapters can follow it."""
    if not is_divided(model) or any(fsdp for fsdp, _ in sharded.modules_with_fsdp(model)):
        return False
    return all(
        division_of(module) is not None or not any(map(sharded.is_shard, module.parameters(recurse=False)))
        for _, module in base_modules(model)
        if is_adapted(module)
    )


def divide_experts(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Leave each rank its experts' factors of adapters on experts that the ranks share out."""
    for each in attachments.attached:
        if each.link is WeightLink:
            divide_factors(model.get_submodule(each.path), WeightLink.changes_of(each.adapter))


@contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """Run every layer whole on every rank inside the block, whatever a parallel plan says, as it reads whole weights.

    To be used inside `sharded.gathered_when_read`.
    """
    planned = []
    for _, module in base_modules(model):
        if plan_of(module) is not None:
            slot = OWN_FORWARD if OWN_FORWARD in module.__dict__ else "forward"
            planned.append((module, slot, module.__dict__[slot]))

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
