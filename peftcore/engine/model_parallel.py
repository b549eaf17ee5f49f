"""Models whose layers or experts are sharded by a parallel plan of transformers or PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """Return whether tensor parallelism shards layers of `model` over the ranks."""
    return ranks.count() > 1 and any(has_plan(module) for _, module in base_modules(model))


def follows_plan(model: nn.Module) -> bool:
    """Return whether `model` is sharded only by a parallel plan that adapters can follow at every adapted module."""
    if not is_divided(model) or any(fsdp for fsdp, _ in sharded.modules_with_fsdp(model)):
        return False
    return all(
        division_of(module) is not None or not any(map(sharded.is_shard, module.parameters(recurse=False)))
        for _, module in base_modules(model)
        if is_adapted(module)
    )


def divide_experts(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Shard adapters of experts under expert parallelism: each rank keeps the factors of its experts."""
    for attachment in attachments.attached:
        if attachment.link is WeightLink:
            divide_factors(model.get_submodule(attachment.path), WeightLink.changes_of(attachment.adapter))


@contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """Make every rank compute full layers inside the block, without the parallel plan.

    Call it inside `sharded.gathered_when_read`, which makes the layers read full weights.
    """
    plan_forwards: list[tuple[nn.Module, str, Callable[..., Any]]] = []
    for _, module in base_modules(model):
        if plan_of(module) is not None:
            slot = OWN_FORWARD if OWN_FORWARD in module.__dict__ else "forward"
            plan_forwards.append((module, slot, module.__dict__[slot]))

    def exchange(module: nn.Module, slot: str, forward: Callable[..., Any]) -> None:
        module.__dict__[slot] = forward
        if is_adapted(module):
            rebuild(module)

    for module, slot, _ in plan_forwards:
        cls = original_class(module)
        exchange(module, slot, MethodType(getattr(cls, "whole_forward", cls.forward), module))
    with_hooks = [module for _, module in base_modules(model) if mesh_of_hooks(module) is not None]
    adapted_modules = [module for module in with_hooks if is_adapted(module)]
    try:
        with ExitStack() as stack:
            for module in with_hooks:
                stack.enter_context(without_hooks(module))
            for module in adapted_modules:
                rebuild(module)
            yield
    finally:
        for module in adapted_modules:
            rebuild(module)
        for module, slot, forward in plan_forwards:
            exchange(module, slot, forward)
