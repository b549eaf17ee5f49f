"""y = x ∘ g, where g scales one dimension of x, rounded once; and its gradients.

    dx = dy ∘ g                   dg = the sum of dy ∘ x over all other dimensions, in fp32

PyTorch's gradient of `(x * g).to(x.dtype)` allocates three fp32 matrices of x's size. On CPU, with g along the last
dimension, a kernel makes one pass over memory and allocates none. Elsewhere PyTorch's operators avoid fp32 matrices,
except for an fp16 x; products in bf16 are therefore rounded to bf16 before they are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.ops._library import define_by
from peftcore.ops.calling import has_active_transform
from peftcore.ops.weight import DTYPES, check_dtype, check_gradient, check_strided, require

_OPS = torch.ops.peftcore


def _check(op: str, x: Tensor, g: Tensor) -> None:
    check_dtype(x.dtype, op)
    for name, t in (("x", x), ("g", g)):
        check_strided(t, op, name)
    if g.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"{op}: g must be a 16-, 32- or 64-bit floating-point tensor, found {g.dtype}")
    require(g.device == x.device, op, f"g must be on {x.device} like x, found {g.device}")
    require(x.dim() > 0, op, "x must have at least one dimension, found a scalar")
    require(list(g.shape) == [x.shape[-1]], op, f"g must be [{x.shape[-1]}] for x, found {list(g.shape)}")


@dataclass
class Scaled:
    x: Tensor
    g: Tensor

    def __post_init__(self) -> None:
        _check("scaled", self.x, self.g)

    def compute(self) -> Tensor:
        return (self.x * self.g.float()).to(self.x.dtype)

    def empty(self) -> Tensor:
        return self.x.new_empty(self.x.shape)


@dataclass
class ScaledBackward:
    grad: Tensor
    x: Tensor
    g: Tensor
    needs: Sequence[bool]

    def __post_init__(self) -> None:
        op = "scaled_backward"
        _check(op, self.x, self.g)
        check_gradient(self.grad, self.x, op)

    def compute(self) -> tuple[Tensor, Tensor]:
        dx, dg = self.x.new_empty(0), self.g.new_empty(0)
        if self.needs[0]:
            dx = (self.grad * self.g.float()).to(self.x.dtype)
        if self.needs[1]:
            dg = (self.grad.float() * self.x).sum_to_size(self.g.shape)
        return dx, dg.to(self.g.dtype)

    def empty(self) -> tuple[Tensor, ...]:
        operands = zip((self.x, self.g), self.needs, strict=True)
        return tuple(t.new_empty(t.shape if needs_grad else (0,)) for t, needs_grad in operands)


define_by("scaled(Tensor x, Tensor g) -> Tensor", Scaled)
define_by("scaled_backward(Tensor grad, Tensor x, Tensor g, bool[2] needs) -> (Tensor dx, Tensor dg)", ScaledBackward)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, trailing_dims: int) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.trailing_dims = trailing_dims
        return _forward(x, g, trailing_dims)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, g = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if _has_kernel(x, ctx.trailing_dims) and not torch.is_grad_enabled():
            dx, dg = _OPS.scaled_backward(dy, x, g, needs)
            return dx if needs[0] else None, dg if needs[1] else None, None
        dx = (dy * _aligned(g, ctx.trailing_dims)).to(x.dtype) if needs[0] else None
        if not needs[1]:
            return dx, None, None
        other_dims = [i for i in range(x.dim()) if i != x.dim() - 1 - ctx.trailing_dims]
        products = dy.float() * x if x.dtype is torch.float16 else dy * x  # small products would underflow in fp16
        wide = torch.promote_types(x.dtype, torch.float32)
        return dx, (products.sum(other_dims, dtype=wide) if other_dims else products).to(g.dtype), None


def _has_kernel(x: Tensor, trailing_dims: int) -> bool:
    """Return whether the operator has a kernel for x. The reference is never used, since it allocates fp32 matrices."""
    return x.is_cpu and trailing_dims == 0 and x.dtype in DTYPES and x.dim() > 0 and not x.is_nested


def _aligned(g: Tensor, trailing_dims: int) -> Tensor:
    """Return g in a shape that broadcasts over the `trailing_dims` dimensions after its own."""
    return g.view(-1, *[1] * trailing_dims)


def _forward(x: Tensor, g: Tensor, trailing_dims: int) -> Tensor:
    return _OPS.scaled(x, g) if _has_kernel(x, trailing_dims) else (x * _aligned(g, trailing_dims)).to(x.dtype)


def scaled(x: Tensor, g: Tensor, trailing_dims: int = 0) -> Tensor:
    """Return x ∘ g.

    Args:
        x: tensor of any floating-point dtype.
        g: `[n]`, factors along a dimension of x of size n.
        trailing_dims: number of dimensions of x after the scaled dimension.

    Returns:
        A tensor with x's shape and dtype, and gradients for x and g.
    """
    if has_active_transform():
        return (x * _aligned(g, trailing_dims)).to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or g.requires_grad):
        return _Scaled.apply(x, g, trailing_dims)  # type: ignore[no-untyped-call]
    return _forward(x, g, trailing_dims)
