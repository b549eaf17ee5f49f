"""y = x Wᵀ + b with a frozen dense W, for the cases where PyTorch is slow, and its gradient with respect to x and b.

    dx = dy W, db = the sum of dy over all rows

Three cases are faster than `F.linear` on a CPU:

- bf16 and fp16 on processors without instructions for them (`WIDENED`), where PyTorch is 20 to 60 times slower than in
  fp32. The kernel widens panels of W and x to fp32 in cache, multiplies, and rounds once.
- fp32 with at least 64 rows, with AVX2 or AVX-512: slightly faster with AVX2, and twice as fast where PyTorch's BLAS
  library does not use AVX-512 (on AMD).
- bf16 with up to 4 rows, on processors with bf16 dot products. Decoding a token reads every weight once, and PyTorch
  reads at half the memory bandwidth.

In all other cases the operator calls PyTorch's own product.
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
from peftcore.ops.calling import as_non_view, frozen_operands, has_active_transform
from peftcore.ops.weight import check_linear

_OPS = torch.ops.peftcore

# Dtypes in which `dense_linear` multiplies many rows faster than PyTorch, at the CPU level chosen at import.
FASTER: frozenset[torch.dtype] = frozenset(
    dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if extension is not None and extension.beats_library(str(dtype))
)
# 16-bit dtypes in which PyTorch is many times slower than in fp32.
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
        return as_non_view(_OPS.dense_linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            # create_graph=True needs a differentiable operator.
            x_grad = grad @ weight if torch.is_grad_enabled() else _OPS.dense_linear(grad, weight.t())
        if ctx.needs_input_grad[2]:
            bias_grad = grad.sum_to_size(grad.shape[-1])
        return x_grad, None, bias_grad


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b, rounded once.

    Args:
        x: fp32, fp16 or bf16 `[..., in]`; under autocast it is cast as for `F.linear`.
        weight: `[out, in]` in x's dtype (or any dtype under autocast). It must not require grad.
        bias: `[out]`, cast to x's dtype.

    Returns:
        `[..., out]` in x's dtype (or the autocast dtype), with gradients for x and bias.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes of the arguments do not match.
    """
    if type(x) is not Tensor and has_torch_function_unary(x):
        return handle_torch_function(dense_linear, (x,), x, weight, bias)
    if has_active_transform():
        return F.linear(x, weight, bias)
    x, (weight,), _, bias = frozen_operands(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _DenseLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    result: Tensor = _OPS.dense_linear(x, weight, bias)
    return result
