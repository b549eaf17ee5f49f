"""SwiGLU (Shazeer 2020, GLU Variants, section 2), used by most mixtures of experts, and its gradient.

    y = silu(g) ∘ u, where each row of x is [g, u]

    s = 1 / (1 + exp(-g))         dg = dy ∘ u ∘ s ∘ (1 + g ∘ (1 - s))         du = dy ∘ g ∘ s

Values are computed in fp32 and rounded once. PyTorch's operators round twice, and make six passes over memory instead
of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops import _triton
from peftcore.ops._library import define_by
from peftcore.ops.weight import check_dtype, check_like, check_strided, require

_OPS = torch.ops.peftcore


def _check(x: Tensor, op: str) -> None:
    check_dtype(x.dtype, op)
    check_strided(x, op, "x")
    require(x.dim() > 0 and x.shape[-1] % 2 == 0, op, f"x must be [.., 2 n], found {list(x.shape)}")


def _wide(x: Tensor) -> tuple[Tensor, ...]:
    return x.float().chunk(2, -1)


@dataclass
class Swiglu:
    x: Tensor

    def __post_init__(self) -> None:
        _check(self.x, "swiglu")

    def compute(self) -> Tensor:
        gate, up = _wide(self.x)
        return (F.silu(gate) * up).to(self.x.dtype)

    def empty(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.x.shape[-1] // 2))


@dataclass
class SwigluBackward:
    grad: Tensor
    x: Tensor

    def __post_init__(self) -> None:
        op = "swiglu_backward"
        _check(self.x, op)
        check_like(self.grad, self.x, op, "grad")
        check_strided(self.grad, op, "grad")
        shape = [*self.x.shape[:-1], self.x.shape[-1] // 2]
        require(list(self.grad.shape) == shape, op, f"grad must be {shape}, found {list(self.grad.shape)}")

    def compute(self) -> Tensor:
        gate, up = _wide(self.x)
        s, grad = gate.sigmoid(), self.grad.to(gate.dtype)
        return torch.cat([grad * up * s * (1 + gate * (1 - s)), grad * gate * s], -1).to(self.x.dtype)

    def empty(self) -> Tensor:
        return self.x.new_empty(self.x.shape)


define_by("swiglu(Tensor x) -> Tensor", Swiglu, triton="gates")
define_by("swiglu_backward(Tensor grad, Tensor x) -> Tensor", SwigluBackward, triton="gates")


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _OPS.swiglu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("swiglu cannot be differentiated twice (create_graph=True). Use silu(gate) * up instead")
        (x,) = ctx.saved_tensors
        return _OPS.swiglu_backward(grad, x)


def swiglu(x: Tensor) -> Tensor:
    """Return silu(g) ∘ u.

    Args:
        x: `[.., 2 n]`, g followed by u; fp32, fp16, bf16 or float64.

    Returns:
        `[.., n]` in the dtype of x, with a gradient.
    """
    if x.device.type not in _triton.DEVICES or x.dtype is torch.float64:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    if torch.is_grad_enabled() and x.requires_grad:
        return _Swiglu.apply(x)  # type: ignore[no-untyped-call]
    return _OPS.swiglu(x)
