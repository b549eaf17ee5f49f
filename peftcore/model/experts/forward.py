"""Forward of a module of experts, for all models with transformers' experts interface.

    rows sorted by expert -> x W_upᵀ -> gate -> · W_downᵀ -> times the router's weights -> summed per token

Each of the two products is one operator over all experts (`ops.grouped_linear`), dense or 4-bit, with low-rank changes.
If an adapter changes each expert separately, the products are computed one expert at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.model.experts.expert_adapters import ExpertAdapters, WithChanges, product_by_expert
from peftcore.model.experts.layout import experts_layout, is_operand_transposed, operand
from peftcore.ops.calling import autocast_device
from peftcore.ops.routing import combine_rows, gather_rows, route
from peftcore.ops.swiglu import swiglu
from peftcore.plugin.adapter import Adapter, Base, LowRank, implements

# Module and name of the function that computes act(gate) * up, with the gate's columns first.
_PLAIN_GATE = "transformers.integrations.moe", "_default_apply_gate"


def adapter_of_expert(change: LowRank | ExpertAdapters, expert: int) -> Any:
    """Return an adapter of one expert's linear layer that is equivalent to `change` for this expert."""
    if isinstance(change, ExpertAdapters):
        return change.of_expert(expert)
    return _LowRankExpert(change.a[expert], change.b[expert], change.scale, change.dropout_p)


class _LowRankExpert(Adapter):
    """Low-rank adapter scale · B A of one expert's linear layer."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout_p: float) -> None:
        super().__init__()
        self.a, self.b, self.scale, self.dropout_p = a, b, scale, dropout_p

    def forward(self, base: Base, x: Tensor) -> Tensor:
        a, b = (t.to(x.dtype) for t in (self.a, self.b))
        x_dropped = nn.functional.dropout(x, self.dropout_p) if self.dropout_p else x
        y: Tensor = base(x)
        return y + self.scale * (x_dropped @ a.mT) @ b.mT

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * self.b.float() @ self.a.float(), bias


def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    changes: Mapping[str, Sequence[LowRank | ExpertAdapters]] | None = None,
    around: WithChanges = lambda layer, _changes, _expert: layer,
) -> Tensor:
    """Compute the forward of `module`, which has an `experts_layout`.

    Args:
        module: module of experts.
        hidden_states: `[tokens, hidden]`.
        top_k_index, top_k_weights: `[tokens, k]`, the experts of each token and their weights. Indices from the number
            of experts on are skipped: they belong to other ranks under transformers' expert parallelism.
        changes: {name of a parameter: its change}.
        around: wraps the layer of one expert in its changes, if some are not low-rank.

    Returns:
        `[tokens, hidden]` in the dtype of `hidden_states`.
    """
    layout = experts_layout(module)
    assert layout is not None
    changes = changes or {}
    input_dtype = hidden_states.dtype
    dtype = getattr(module, "compute_dtype", None)  # set on modules with 4-bit weights
    if dtype is not None:
        hidden_states = hidden_states.to(dtype)
    routing = route(top_k_index, layout.count)
    x = gather_rows(hidden_states, routing)

    def product(x: Tensor, name: str) -> Tensor:
        weight, bias = operand(module, name), getattr(module, f"{name}_bias") if layout.has_bias else None
        if isinstance(weight, Tensor) and not torch.is_autocast_enabled(autocast_device(x)):
            x = x.to(weight.dtype)  # like transformers' grouped_mm
        changes_of_weight = changes.get(name, ())
        low_rank = [change for change in changes_of_weight if isinstance(change, LowRank)]
        trains = isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled()
        if len(low_rank) < len(changes_of_weight) or trains:
            return product_by_expert(module, x, routing.offsets, name, changes_of_weight, around)
        is_transposed = layout.transposed != is_operand_transposed(weight)
        if not low_rank:
            return ops.grouped_linear(x, routing.offsets, weight, bias, is_transposed)
        fused, *remaining = _merge_low_rank(low_rank)
        y = ops.grouped_lora_linear(
            x, routing.offsets, weight, bias, fused.a, fused.b, is_transposed, fused.scale, fused.dropout_p
        )
        for change in remaining:
            y = y + _low_rank_product(x, routing.offsets, change).to(y.dtype)
        return y

    y = product(x, layout.up)
    y = _gated(module, y)
    y = product(y, layout.down)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    return combine_rows(y, top_k_weights, routing).to(input_dtype)


def _gated(module: Any, y: Tensor) -> Tensor:
    """Apply the activation, and the gate if there is one, between the two products."""
    if not module.has_gate:
        return module.act_fn(y)
    gate = getattr(module._apply_gate, "__func__", None)
    is_plain = (getattr(gate, "__module__", None), getattr(gate, "__name__", None)) == _PLAIN_GATE
    return swiglu(y) if is_plain and _is_silu(module.act_fn) else module._apply_gate(y)


def _is_silu(act: Any) -> bool:
    """Return whether `act` computes plain silu, without hooks or a forward set on the instance."""
    kind = type(act)
    if kind is not nn.SiLU and (kind.__module__, kind.__name__) != ("transformers.activations", "SiLUActivation"):
        return False
    global_hooks = (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
    instance_attributes = ("forward", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for name in global_hooks for hook in vars(nn.modules.module)[name].values()]
    if any(vars(act).get(name) for name in instance_attributes):
        return False
    # The hooks that `estimate` uses to simulate a step only observe, and have this mark.
    return all(getattr(hook, "only_looks", False) for hook in hooks)


def expert_changes(
    module: nn.Module, changes: Sequence[Mapping[str, Any]]
) -> dict[str, list[LowRank | ExpertAdapters]] | None:
    """Return {name: change} if all changes are low-rank or made of expert adapters, else None.

    Also None without an `experts_layout`, or if the weights require gradients and all changes are low-rank.
    """
    layout = experts_layout(module)
    if layout is None:
        return None
    changes_by_name: dict[str, list[LowRank | ExpertAdapters]] = {}
    trains = False
    for changes_by_parameter in changes:
        for name, change in changes_by_parameter.items():
            if name not in layout.names:
                return None
            if isinstance(change, ExpertAdapters):
                expert_change: LowRank | ExpertAdapters | None = change
            else:
                expert_change = change.expert_low_rank() if implements(change, Adapter.expert_low_rank) else None
            weight = module._parameters[name]
            if expert_change is None:
                return None
            trains |= weight is not None and weight.requires_grad and torch.is_grad_enabled()
            changes_by_name.setdefault(name, []).append(expert_change)
    all_changes = chain.from_iterable(changes_by_name.values())
    has_expert_adapters = any(isinstance(change, ExpertAdapters) for change in all_changes)
    return None if trains and not has_expert_adapters else changes_by_name


def _merge_low_rank(changes: Sequence[LowRank]) -> list[LowRank]:
    """Concatenate low-rank changes with the same dropout into one whose rank is their sum."""
    by_dropout: dict[float, list[LowRank]] = {}
    for change in changes:
        by_dropout.setdefault(change.dropout_p, []).append(change)
    merged: list[LowRank] = []
    for dropout_p, group in by_dropout.items():
        if len(group) == 1:
            merged += group
            continue
        a = torch.cat([change.a for change in group], 1)
        b = torch.cat([change.scale * change.b for change in group], 2)
        merged.append(LowRank(a, b, dropout_p=dropout_p))
    return merged


def _low_rank_product(x: Tensor, offsets: Tensor, change: LowRank) -> Tensor:
    """Return scale · (dropout(x_i) A_eᵀ) B_eᵀ in fp32, for a change whose dropout differs from the first change's.

    The operator computes a low-rank product only together with a base product. It is therefore called twice with a base
    of zeros and the identity as one factor: first with A, then with B. A loop over experts would take four to six times
    as long.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    experts, r = change.a.shape[:2]
    identity = torch.eye(r, dtype=x.dtype, device=x.device).expand(experts, r, r)

    def product(x: Tensor, out: int, a: Tensor, b: Tensor, scale: float, dropout_p: float) -> Tensor:
        zeros = x.new_zeros(1, out, x.shape[1]).expand(experts, -1, -1)
        return ops.grouped_lora_linear(x, offsets, zeros, None, a, b, False, scale, dropout_p)

    s = product(x, r, change.a, identity, change.scale, change.dropout_p)
    return product(s, change.b.shape[1], identity, change.b, 1.0, 0.0)
