"""The forward of a module of experts, for every model of transformers' experts interface.

    rows sorted by expert -> x W_upᵀ -> gate -> · W_downᵀ -> times the router's weights -> added up, row by row

Each of the two products is one operator over all experts (`ops.grouped_linear`): dense or in 4 bits, thin changes
included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.experts.layout import experts_layout
from peftcore.ops.weight import autocast_device


class Thin(NamedTuple):
    """A change of a weight that is a thin product for each expert: scale · B_e A_e.

    Args:
        a: `[experts, r, in]`. b: `[experts, out, r]`, whatever the layout of the weight.
        dropout_p: of what A reads.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout_p: float = 0.0


def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    changes: Mapping[str, Sequence[Thin]] | None = None,
) -> Tensor:
    """What `module` computes, a module that has an `experts_layout`.

    Args:
        hidden_states: `[tokens, hidden]`.
        top_k_index, top_k_weights: `[tokens, k]`, each token's experts and their shares.
            An index from the number of experts on is another process's (transformers' expert parallelism).
        changes: thin changes of the parameters, by name. Without them the weights may be in 4 bits all the same.

    Returns:
        `[tokens, hidden]` in the dtype of `hidden_states`.
    """
    layout = experts_layout(module)
    assert layout is not None
    changes = changes or {}
    given, dtype = hidden_states.dtype, getattr(module, "compute_dtype", None)  # of a module with weights in 4 bits
    if dtype is not None:
        hidden_states = hidden_states.to(dtype)
    tokens, k = top_k_index.shape
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    every = torch.arange(layout.count, device=expert.device, dtype=expert.dtype)
    offsets = torch.searchsorted(expert, every, right=True, out_int32=True)
    if tokens == 1:  # as in decoding: all its rows are alike, and the sum of all is its
        x = hidden_states.expand(k, -1)
    else:
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        x = _Gathered.apply(hidden_states, order // k, inverse.view(tokens, k))  # type: ignore[no-untyped-call]

    def product(x: Tensor, name: str) -> Tensor:
        weight, bias = operand(module, name), getattr(module, f"{name}_bias") if layout.has_bias else None
        if isinstance(weight, Tensor) and not torch.is_autocast_enabled(autocast_device(x)):
            x = x.to(weight.dtype)  # as transformers' grouped_mm does
        thin = changes.get(name, ())
        if not thin:
            return ops.grouped_linear(x, offsets, weight, bias, layout.transposed)
        first, *others = _together(thin)
        y = ops.grouped_lora_linear(
            x, offsets, weight, bias, first.a, first.b, layout.transposed, first.scale, first.dropout_p
        )
        for other in others:
            y = y + _thin(x, offsets, other).to(y.dtype)
        return y

    y = product(x, layout.up)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = product(y, layout.down)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    if tokens == 1:
        return y.sum(0, keepdim=True).to(given)
    y = _Gathered.apply(y, inverse, order.view(-1, 1))  # type: ignore[no-untyped-call]
    return y.view(tokens, k, -1).sum(1).to(given)


def operand(module: nn.Module, name: str) -> Tensor | ops.PackedWeight:
    """A weight as operators take it: the parameter, or the packed one that a quantized module keeps under its name."""
    packed = getattr(module, "packed_parameter", None)
    found = packed(name) if packed is not None else None
    return getattr(module, name) if found is None else found


def thin_changes(module: nn.Module, changes: Sequence[Mapping[str, Any]]) -> dict[str, list[Thin]] | None:
    """What changes add to the weights, by name; None where one does not offer it (`thin`), or a weight gets gradients.

    Of a module with an `experts_layout`, else None.
    """
    layout = experts_layout(module)
    if layout is None:
        return None
    found: dict[str, list[Thin]] = {}
    for each in changes:
        for name, change in each.items():
            if name not in layout.names or not hasattr(change, "thin"):
                return None
            weight, thin = module._parameters[name], change.thin()
            if thin is None or (weight is not None and weight.requires_grad and torch.is_grad_enabled()):
                return None
            found.setdefault(name, []).append(thin)
    return found


def _together(changes: Sequence[Thin]) -> list[Thin]:
    """Those with one dropout as one, of the sum of their ranks."""
    by_dropout: dict[float, list[Thin]] = {}
    for each in changes:
        by_dropout.setdefault(each.dropout_p, []).append(each)
    return [
        same[0]
        if len(same) == 1
        else Thin(torch.cat([t.a for t in same], 1), torch.cat([t.scale * t.b for t in same], 2), 1.0, p)
        for p, same in by_dropout.items()
    ]


class _Gathered(torch.autograd.Function):
    """x[rows]; its gradient is gathered likewise, by the places `[len(x), n]` that each row of x went to, and summed.

    PyTorch's own would add into memory row by row (`index_put`), slower, and on a GPU in any order. `index_select`
    copies rows whole, in a twelfth of the time of indexing (2048 rows of 1024 in bf16 on one core of Zen 4);
    `embedding_bag` adds them up on the way, in fp32, rounded once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return nn.functional.embedding_bag(places, grad.contiguous(), mode="sum"), None, None


def _thin(x: Tensor, offsets: Tensor, change: Thin) -> Tensor:
    """scale · (dropout(x_i) A_eᵀ) B_eᵀ, expert by expert: of an adapter with another dropout than the first."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x = nn.functional.dropout(x, change.dropout_p).to(wide) if change.dropout_p else x.to(wide)
    ends = offsets.tolist()
    parts = []
    for expert, (begin, end) in enumerate(zip([0, *ends], [*ends, len(x)], strict=False)):
        if expert == len(ends):
            parts.append(x.new_zeros(end - begin, change.b.shape[1]))
        elif begin < end:
            s = change.scale * (x[begin:end] @ change.a[expert].to(wide).T)
            parts.append(s @ change.b[expert].to(wide).T)
    return torch.cat(parts)
