"""Public functions for the linear layers of experts, with gradients. grouped_operators.py has the formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftcore.ops.calling import frozen_operands, operator_for
from peftcore.ops.dropout import seed_of_call
from peftcore.ops.grouped_operators import GroupedLinear, GroupedLinearBackward, expert_of_rows
from peftcore.ops.lora import wide_dtype
from peftcore.ops.weight import PackedWeight


@torch.no_grad()
def _in_float64(call: type[GroupedLinear] | type[GroupedLinearBackward], *arguments: Any) -> Any:
    return call(*arguments).compute()


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        numbers: tuple[list[int], bool, float, float],
        offsets: Tensor,
        seed: Tensor | None,
        *weight: Tensor,
    ) -> Tensor:
        packing, transposed, scale, dropout_p = numbers
        factors = [] if a is None or b is None else [a, b]
        arguments = x, offsets, weight, packing, bias, factors, transposed, scale, dropout_p, seed
        exact = x.dtype is torch.float64
        y, s = _in_float64(GroupedLinear, *arguments) if exact else operator_for("grouped_linear", seed)(*arguments)
        saved_tensors = (x, a, b, s) if factors else (None,) * 4
        ctx.save_for_backward(offsets, seed, *saved_tensors, *weight)
        ctx.numbers = numbers
        ctx.experts = None if bias is None else len(bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "grouped_linear cannot be differentiated twice (create_graph=True). Compute each expert with "
                "F.linear instead"
            )
        offsets, seed, x, a, b, s, *weight = ctx.saved_tensors
        packing, transposed, scale, dropout_p = ctx.numbers
        need_x, need_bias, *need_factors = ctx.needs_input_grad[:4]
        dx = da = db = bias_grad = None
        needs = [need_x, *need_factors]
        if any(needs):
            factors = [] if a is None else [a, b, s]
            grad = grad.contiguous()
            arguments = grad, x, offsets, weight, packing, factors, transposed, needs, scale, dropout_p, seed
            exact = grad.dtype is torch.float64
            backward = operator_for("grouped_linear_backward", seed)
            gradients = _in_float64(GroupedLinearBackward, *arguments) if exact else backward(*arguments)
            dx, da, db = (g if needs_grad else None for g, needs_grad in zip(gradients, needs, strict=True))
        if need_bias:
            expert_of_row = expert_of_rows(offsets, len(grad))
            sums = grad.new_zeros(ctx.experts + 1, grad.shape[1], dtype=wide_dtype(grad))
            bias_grad = sums.index_add_(0, expert_of_row, grad.to(sums.dtype))[:-1].to(grad.dtype)
        return dx, bias_grad, da, db, *(None for _ in ctx.needs_input_grad[4:])


def grouped_linear(
    x: Tensor, offsets: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """Return x_i W_eᵀ + bias_e for the rows of each expert e.

    Args:
        x: fp32, fp16, bf16 or float64 `[rows, in]`, sorted by expert; under autocast it is cast as for `F.linear`.
        offsets: int32 `[E]`, the end of each expert's rows. The result is zero for rows after the last offset.
        weight: `[E, out, in]` in x's dtype (or any dtype under autocast), or a `PackedWeight`. It must not require
            grad.
        bias: `[E, out]`, cast to x's dtype.
        transposed: whether the weight is `[E, in, out]`.

    Returns:
        `[rows, out]` in x's dtype (or the autocast dtype), with gradients for x and bias.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes of the arguments do not match. RuntimeError: the result is
            differentiated twice.
    """
    return _grouped(x, offsets, weight, bias, (), transposed)


def grouped_lora_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    transposed: bool = False,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return x_i W_eᵀ + bias_e + scale · (dropout(x_i) A_eᵀ) B_eᵀ for the rows of each expert e.

    Args:
        a, b: `[E, r, in]` and `[E, out, r]` in 16-, 32- or 64-bit floating point, for both layouts of the weight.
        dropout_p, seed: see `lora_linear`.

    All other arguments, the result and the errors are as in `grouped_linear`. The factors a and b also get gradients.
    """
    seed = seed_of_call(x, seed) if dropout_p else None
    return _grouped(x, offsets, weight, bias, (a, b), transposed, scale, dropout_p, seed)


def _grouped(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    factors: tuple[Tensor, ...],
    transposed: bool,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    x, tensors, packing, bias = frozen_operands(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *factors)):
        a, b = factors or (None, None)
        numbers = packing, transposed, scale, dropout_p
        return _GroupedLinear.apply(x, bias, a, b, numbers, offsets, seed, *tensors)  # type: ignore[no-untyped-call]
    arguments = x, offsets, tensors, packing, bias, list(factors), transposed, scale, dropout_p, seed
    exact = x.dtype is torch.float64
    return (_in_float64(GroupedLinear, *arguments) if exact else operator_for("grouped_linear", seed)(*arguments))[0]
