"""y = x Wᵀ + b with a frozen dense W, where PyTorch multiplies slowly, and its gradient with respect to x and b.

    dx = dy W, db = the sum of dy over all rows

Three cases are faster than `F.linear` on a CPU:

- bf16 and fp16 without instructions for them (`WIDENED`). PyTorch's products are then 20 to 60 times slower than in
  fp32; the kernel widens panels of W and x to fp32 in cache, multiplies, and rounds once.
- fp32 from 64 rows on, with AVX2 or AVX-512: a little faster at AVX2, twice as fast where PyTorch's library does not
  use AVX-512 (AMD).
- up to 4 rows in bf16 with dot products of bf16. Decoding a token reads every weight once, which PyTorch does at half
  the speed of memory.

Everything else is PyTorch's own product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from peftcore.ops._extension import extension
from peftcore.ops._library import define_by
from peftcore.ops.calling import frozen_operands, transformed, unviewed
from peftcore.ops.weight import check_linear

_OPS = torch.ops.peftcore

# Dtypes whose products of many rows `dense_linear` computes faster than PyTorch, at the level chosen at import.
FASTER: frozenset[torch.dtype] = frozenset(
    dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if extension is not None and extension.beats_library(str(dtype))
)
# 16-bit dtypes that PyTorch multiplies many times slower than fp32.
WIDENED = FASTER - {torch.float32}


@dataclass
class DenseLinear:
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        check_linear(self.x, self.weight, self.bias, "dense_linear")

    def compute(self) -> Tensor:
        return F.linear(self.x, self.weight, self.bias)

    def empty(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.weight.shape[0]))


define_by("dense_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", DenseLinear)


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return unviewed(_OPS.dense_linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            # With create_graph=True by an operator that has a gradient itself.
            x_grad = grad @ weight if torch.is_grad_enabled() else _OPS.dense_linear(grad, weight.t())
        if ctx.needs_input_grad[2]:
            bias_grad = grad.sum_to_size(grad.shape[-1])
        return x_grad, None, bias_grad


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b, rounded once.

    Args:
        x: fp32, fp16 or bf16 `[..., in]`; under autocast it is cast as for `F.linear`.
        weight: `[out, in]` in x's dtype (under autocast in any). It must not require grad.
        bias: `[out]`, cast to x's dtype.

    Returns:
        `[..., out]` in x's dtype (under autocast in its dtype), with gradients for x and bias.

    Raises:
        TypeError, ValueError: an argument does not fit the others.
    """
    if type(x) is not Tensor and has_torch_function_unary(x):
        return handle_torch_function(dense_linear, (x,), x, weight, bias)
    if transformed():
        return F.linear(x, weight, bias)
    x, (weight,), _, bias = frozen_operands(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _DenseLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    result: Tensor = _OPS.dense_linear(x, weight, bias)
    return result
