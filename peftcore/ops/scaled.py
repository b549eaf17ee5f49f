"""y = x ∘ g, of one dimension of x, rounded once. dx = dy ∘ g, dg = the sum of dy ∘ x over the others, in fp32.

As PyTorch differentiates `(x * g).to(x.dtype)`, dy becomes a matrix of fp32, and another two are made of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return (x * g).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, g = ctx.saved_tensors
        dx = (dy * g).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        products = dy.float() * x if x.dtype is torch.float16 else dy * x  # of fp16 small ones would vanish
        others = [i for i in range(x.dim()) if i != x.dim() - g.dim()]
        dg = products.sum(others, dtype=torch.promote_types(x.dtype, torch.float32)) if others else products
        return dx, dg.to(g.dtype).view_as(g)


def scaled(x: Tensor, g: Tensor, behind: int = 0) -> Tensor:
    """x ∘ g.

    Args:
        x: of any floating dtype.
        g: `[n]`, for a dimension of x of this size.
        behind: how many dimensions lie behind it.

    Returns:
        In the shape and dtype of x, with gradients for both.
    """
    return _Scaled.apply(x, g.view(-1, *[1] * behind))  # type: ignore[no-untyped-call]
