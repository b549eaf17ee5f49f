"""The forward of a module of experts, for every model of transformers' experts interface.

    rows sorted by expert -> x W_upᵀ -> gate -> · W_downᵀ -> times the router's weights -> added up, row by row

Each of the two products is one operator over all experts (`ops.grouped_linear`): dense or in 4 bits, with low-rank
changes. If an adapter changes experts one by one, the products run one expert after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.model.experts.each import EachExpert, WithChanges, product_by_expert
from peftcore.model.experts.layout import experts_layout, is_turned, operand
from peftcore.ops.calling import autocast_device
from peftcore.ops.routing import combined, gathered, routed
from peftcore.ops.swiglu import swiglu
from peftcore.plugin.adapter import Adapter, Base, LowRank, implements

_PLAIN_GATE = "transformers.integrations.moe", "_default_apply_gate"  # act(gate) * up, the gate's columns first


def adapter_of_expert(change: LowRank | EachExpert, expert: int) -> Any:
    """Return the adapter of one expert's layer that makes the part of `change` for this expert."""
    if isinstance(change, EachExpert):
        return change.of_expert(expert)
    return _OneExpert(change.a[expert], change.b[expert], change.scale, change.dropout_p)


class _OneExpert(Adapter):
    """scale · B A next to a linear layer."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout_p: float) -> None:
        super().__init__()
        self.a, self.b, self.scale, self.dropout_p = a, b, scale, dropout_p

    def forward(self, base: Base, x: Tensor) -> Tensor:
        a, b = (t.to(x.dtype) for t in (self.a, self.b))
        dropped = nn.functional.dropout(x, self.dropout_p) if self.dropout_p else x
        y: Tensor = base(x)
        return y + self.scale * (dropped @ a.mT) @ b.mT

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * self.b.float() @ self.a.float(), bias


def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    changes: Mapping[str, Sequence[LowRank | EachExpert]] | None = None,
    around: WithChanges = lambda layer, _changes, _expert: layer,
) -> Tensor:
    """Compute the forward of `module`, which has an `experts_layout`.

    Args:
        hidden_states: `[tokens, hidden]`.
        top_k_index, top_k_weights: `[tokens, k]`, each token's experts and their shares.
            An index not below the number of experts belongs to another process (transformers' expert parallelism).
        changes: low-rank changes of the parameters, by name.
        around: wraps the layer of one expert in its changes, if some are not low-rank products.

    Returns:
        `[tokens, hidden]` in the dtype of `hidden_states`.
    """
    layout = experts_layout(module)
    assert layout is not None
    changes = changes or {}
    given, dtype = hidden_states.dtype, getattr(module, "compute_dtype", None)  # of a module with weights in 4 bits
    if dtype is not None:
        hidden_states = hidden_states.to(dtype)
    routing = routed(top_k_index, layout.count)
    x = gathered(hidden_states, routing)

    def product(x: Tensor, name: str) -> Tensor:
        weight, bias = operand(module, name), getattr(module, f"{name}_bias") if layout.has_bias else None
        if isinstance(weight, Tensor) and not torch.is_autocast_enabled(autocast_device(x)):
            x = x.to(weight.dtype)  # as transformers' grouped_mm does
        own = changes.get(name, ())
        low_rank = [each for each in own if isinstance(each, LowRank)]
        trains = isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled()
        if len(low_rank) < len(own) or trains:
            return product_by_expert(module, x, routing.offsets, name, own, around)
        is_transposed = layout.transposed != is_turned(weight)
        if not low_rank:
            return ops.grouped_linear(x, routing.offsets, weight, bias, is_transposed)
        first, *others = _together(low_rank)
        y = ops.grouped_lora_linear(
            x, routing.offsets, weight, bias, first.a, first.b, is_transposed, first.scale, first.dropout_p
        )
        for other in others:
            y = y + _low_rank_product(x, routing.offsets, other).to(y.dtype)
        return y

    y = product(x, layout.up)
    y = _gated(module, y)
    y = product(y, layout.down)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    return combined(y, top_k_weights, routing).to(given)


def _gated(module: Any, y: Tensor) -> Tensor:
    """Compute the gate between the two products."""
    if not module.has_gate:
        return module.act_fn(y)
    gate = getattr(module._apply_gate, "__func__", None)
    is_plain = (getattr(gate, "__module__", None), getattr(gate, "__name__", None)) == _PLAIN_GATE
    return swiglu(y) if is_plain and _is_silu(module.act_fn) else module._apply_gate(y)


def _is_silu(act: Any) -> bool:
    """Return whether a call computes silu only: no hooks and no forward on the instance."""
    kind = type(act)
    if kind is not nn.SiLU and (kind.__module__, kind.__name__) != ("transformers.activations", "SiLUActivation"):
        return False
    of_all = (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
    own = ("forward", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for name in of_all for hook in vars(nn.modules.module)[name].values()]
    # Hooks by which `estimate` follows a step change nothing, and are marked.
    return not any(vars(act).get(name) for name in own) and all(getattr(hook, "only_looks", False) for hook in hooks)


def expert_changes(
    module: nn.Module, changes: Sequence[Mapping[str, Any]]
) -> dict[str, list[LowRank | EachExpert]] | None:
    """Return low-rank changes of the weights, or changes of each expert, by name; None if a change is neither.

    Also None without an `experts_layout`, or if the weights require gradients and all changes are low-rank.
    """
    layout = experts_layout(module)
    if layout is None:
        return None
    found: dict[str, list[LowRank | EachExpert]] = {}
    trains = False
    for each in changes:
        for name, change in each.items():
            if name not in layout.names:
                return None
            if isinstance(change, EachExpert):
                one: LowRank | EachExpert | None = change
            else:
                one = change.expert_low_rank() if implements(change, Adapter.expert_low_rank) else None
            weight = module._parameters[name]
            if one is None:
                return None
            trains |= weight is not None and weight.requires_grad and torch.is_grad_enabled()
            found.setdefault(name, []).append(one)
    alone = any(isinstance(change, EachExpert) for own in found.values() for change in own)
    return None if trains and not alone else found


def _together(changes: Sequence[LowRank]) -> list[LowRank]:
    """Join low-rank products with the same dropout into one of the summed rank."""
    by_dropout: dict[float, list[LowRank]] = {}
    for each in changes:
        by_dropout.setdefault(each.dropout_p, []).append(each)
    return [
        same[0]
        if len(same) == 1
        else LowRank(torch.cat([t.a for t in same], 1), torch.cat([t.scale * t.b for t in same], 2), dropout_p=p)
        for p, same in by_dropout.items()
    ]


def _low_rank_product(x: Tensor, offsets: Tensor, change: LowRank) -> Tensor:
    """Return scale · (dropout(x_i) A_eᵀ) B_eᵀ in fp32, for an adapter whose dropout differs from that of the first.

    The operator adds a low-rank product to that of a base: here two narrow bases of zeros, with A and then B as one
    factor and the identity as the other. A loop over experts takes four to six times as long.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    experts, r = change.a.shape[:2]
    same = torch.eye(r, dtype=x.dtype, device=x.device).expand(experts, r, r)

    def alone(x: Tensor, out: int, a: Tensor, b: Tensor, scale: float, dropout_p: float) -> Tensor:
        zeros = x.new_zeros(1, out, x.shape[1]).expand(experts, -1, -1)
        return ops.grouped_lora_linear(x, offsets, zeros, None, a, b, False, scale, dropout_p)

    s = alone(x, r, change.a, same, change.scale, change.dropout_p)
    return alone(s, change.b.shape[1], same, change.b, 1.0, 0.0)
