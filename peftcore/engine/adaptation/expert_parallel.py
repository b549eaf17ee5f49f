"""Low-rank adapters of experts under transformers' expert parallelism, where each rank holds some of the experts.

The plan replaces the forward of a module of experts: it sends each token to the rank of its experts, which computes
their outputs and sends them back. An adapter's factors `[experts, .., ..]` are sharded like the experts' weights. They
are DTensors, and only the rank that has a shard computes with it, so gradients need no communication:

    y = plan(x; experts' forward on this rank's weights and factors)
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcore.engine.adaptation.chain import OwnForward, with_changes
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import OWN_FORWARD, original_forward
from peftcore.model.experts import (
    ExpertAdapters,
    expert_changes,
    experts_forward,
    experts_layout,
    has_interface_forward,
)
from peftcore.plugin import ranks, sharded
from peftcore.plugin.adapter import Adapter, Change, LowRank, implements

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def plan_of_experts(module: nn.Module) -> dict[str, Any] | None:
    """Return the closure of the forward that dispatches tokens to experts on other ranks, or None."""
    forward: Any = module.__dict__.get(OWN_FORWARD, module.__dict__.get("forward"))
    if not inspect.isfunction(forward) or forward.__name__ != "ep_forward":
        return None
    if not forward.__module__.startswith("transformers.distributed"):
        return None
    plan = dict(inspect.getclosurevars(forward).nonlocals)
    return plan if "implementation" in plan else None  # other styles for experts do not move tokens


def followed_plan(module: nn.Module) -> dict[str, Any] | None:
    """Return the plan that shards the experts of `module`; None without a plan that adapters can follow."""
    plan, layout = plan_of_experts(module), experts_layout(module)
    if plan is None or layout is None or not has_interface_forward(module, original_forward(module)):
        return None
    from torch.distributed.tensor import Shard

    mesh: DeviceMesh = plan["ep_mesh"]
    for name in layout.names:
        weight: Any = sharded.original(module._parameters[name])  # type: ignore[arg-type]
        if not sharded.is_dtensor(weight) or weight.placements[-1] != Shard(0):
            return None
        if weight.device_mesh.size() != mesh.size():  # FSDP2 also shards each rank's experts over further ranks
            return None
    inner_forward = getattr(plan["implementation"].experts_forward, "__func__", None)
    return plan if inner_forward is original_forward(module) else None


def follows_experts(module: nn.Module, changes: Mapping[str, Any]) -> bool:
    """Return whether `module` is sharded by experts and each of `changes` has a slice per expert."""
    layout = experts_layout(module)
    return layout is not None and all(
        name in layout.names
        and implements(change, Adapter.expert_low_rank)
        and all(p.dim() > 0 and len(p) == layout.count for p in change.parameters())
        and next(change.buffers(), None) is None
        for name, change in changes.items()
    )


def divide_factors(module: nn.Module, changes: Mapping[str, nn.Module]) -> None:
    """Shard full factors of adapters by experts, as DTensors."""
    from torch.distributed.tensor import Shard, distribute_tensor

    plan = followed_plan(module)
    if plan is None:
        return
    for change in changes.values():
        for part in change.modules():
            for name, full_factor in part._parameters.items():
                if full_factor is not None and not sharded.is_dtensor(full_factor):
                    shard = distribute_tensor(full_factor.detach(), plan["ep_mesh"], [Shard(0)], src_data_rank=None)
                    part._parameters[name] = nn.Parameter(shard, full_factor.requires_grad)


class ExpertsForward(OwnForward):
    """Original forward of a module whose experts are sharded; changes act on this rank's experts."""

    __slots__ = ("_plan",)

    def __init__(self, own: OwnForward, plan: Mapping[str, Any], changes: Any = ()) -> None:
        super().__init__(own.module, own._forward, own._weights)
        self._plan, self._changes = plan, changes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._changes:
            return super().__call__(*args, **kwargs)
        module, plan = self.module, self._plan
        changes_by_name = expert_changes(module, self._changes)
        if changes_by_name is None:
            raise PeftcoreError(
                "experts are sharded over the ranks (ep_size), so only low-rank adapters of single experts can "
                "train, not the weights of the experts. Freeze the weights, or load the model without ep_size"
            )
        batches = ranks.count() // plan["implementation"].tp_mesh.size()
        local = {name: [_local(change, batches) for change in changes] for name, changes in changes_by_name.items()}

        def forward(*inputs: Any, **named: Any) -> Tensor:
            return experts_forward(module, *inputs, changes=local, around=with_changes, **named)

        return _called(plan, forward)(*args, **kwargs)

    def on_weights(self, changes: Mapping[str, Change]) -> ExpertsForward:
        """See `Base.on_weights`."""
        return ExpertsForward(self, self._plan, (changes, *self._changes))


def _local(change: LowRank | ExpertAdapters, batches: int) -> LowRank:
    """Return this rank's shard of a change.

    An expert's gradient is a sum over the batches of all ranks. Dividing it by the number of `batches` gives the
    gradient of the mean loss.
    """
    if not isinstance(change, LowRank) or not sharded.is_dtensor(change.a) or not sharded.is_dtensor(change.b):
        raise PeftcoreError(
            "experts are sharded over the ranks (ep_size), so only low-rank adapters of single experts can change "
            "them. Use such an adapter, or load the model without ep_size"
        )
    if change.dropout_p:
        raise PeftcoreError(
            "adapters of sharded experts (ep_size) cannot use dropout, because each rank would draw a different "
            "number of random numbers, after which the random states differ. Set dropout to 0 for these adapters"
        )
    a, b = (_DividedGradient.apply(factor.to_local(), batches) for factor in (change.a, change.b))  # type: ignore[no-untyped-call]
    return LowRank(a, b, change.scale)


class _DividedGradient(torch.autograd.Function):
    """Identity in the forward; the backward pass divides the gradient by the number of batches."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, batches: int) -> Tensor:
        ctx.batches = batches
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] / ctx.batches, None


def _called(plan: Mapping[str, Any], forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the plan's forward with `forward` in place of the local experts' forward."""
    style, implementation = plan["self"], copy.copy(plan["implementation"])
    implementation.experts_forward = forward
    for name, inner in vars(implementation).items():  # the experts that it chooses from
        if hasattr(inner, "experts_forward"):
            inner_copy = copy.copy(inner)
            inner_copy.experts_forward = forward
            setattr(implementation, name, inner_copy)

    def call(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        hidden_states, top_k_weights = (
            tensor.to_local() if sharded.is_dtensor(tensor) else tensor for tensor in (hidden_states, top_k_weights)
        )
        with style.context_around_forward(plan["module"], plan["ep_mesh"]):
            output: Tensor = implementation(hidden_states, top_k_index, top_k_weights)
        return output.to(hidden_states.dtype)

    return call
