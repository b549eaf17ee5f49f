"""Activation functions and their gradients.

    GELU      y = x ∘ Φ(x)                         dx = dy ∘ (Φ(x) + x ∘ φ(x))
    others    y = x ∘ s      s = 1 / (1 + exp(-p))    dx = dy ∘ s ∘ (1 + x ∘ (1 - s) ∘ p'(x))

Φ is the cumulative distribution function of the normal distribution and φ its density; p is defined in gated.py.
Everything is computed in fp32 and rounded once. Only x is saved for the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from peftcore.ops._extension import KERNEL_DEVICES
from peftcore.ops._library import define_by
from peftcore.ops.calling import has_active_transform
from peftcore.ops.gated import ACTIVATIONS as GATES, check_coefficients, sigmoid_of_p, slope
from peftcore.ops.weight import check_dtype, check_gradient, check_strided

_OPS = torch.ops.peftcore
Activation = Literal["gelu", "silu", "gelu_tanh", "quick_gelu"]
# Whether Φ is used, and the coefficients of p for the other activations.
ACTIVATIONS: dict[str, tuple[bool, float, float]] = {
    "gelu": (True, 1.0, 0.0),
    **{name: (False, *coefficients) for name, coefficients in GATES.items()},
}


def _formula(x: Tensor, normal: bool, linear: float, cubic: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    s = 0.5 * torch.erfc(-wide * math.sqrt(0.5)) if normal else sigmoid_of_p(wide, linear, cubic)
    return (wide * s).to(x.dtype)


@dataclass
class Activated:
    x: Tensor
    normal: bool
    linear: float
    cubic: float

    def __post_init__(self) -> None:
        check_dtype(self.x.dtype, "activated")
        check_coefficients("activated", self.linear, self.cubic)
        check_strided(self.x, "activated", "x")

    def compute(self) -> Tensor:
        return _formula(self.x, self.normal, self.linear, self.cubic)

    def empty(self) -> Tensor:
        return self.x.new_empty(self.x.shape)


@dataclass
class ActivatedBackward:
    grad: Tensor
    x: Tensor
    normal: bool
    linear: float
    cubic: float

    def __post_init__(self) -> None:
        op = "activated_backward"
        check_dtype(self.x.dtype, op)
        check_coefficients(op, self.linear, self.cubic)
        check_strided(self.x, op, "x")
        check_gradient(self.grad, self.x, op)

    def compute(self) -> Tensor:
        x = self.x.float()
        if self.normal:
            density = torch.exp(-0.5 * x * x) * (0.5 / math.pi) ** 0.5
            derivative = 0.5 * torch.erfc(-x * math.sqrt(0.5)) + x * density
        else:
            derivative = slope(x, self.linear, self.cubic)
        return (self.grad.float() * derivative).to(self.x.dtype)

    def empty(self) -> Tensor:
        return self.x.new_empty(self.x.shape)


define_by("activated(Tensor x, bool normal, float linear, float cubic) -> Tensor", Activated)
define_by(
    "activated_backward(Tensor grad, Tensor x, bool normal, float linear, float cubic) -> Tensor", ActivatedBackward
)


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, normal: bool, linear: float, cubic: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = normal, linear, cubic
        return _OPS.activated(x, normal, linear, cubic)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            (dx,) = torch.autograd.grad(_formula(x, *ctx.settings), x, grad, create_graph=True)
        else:
            dx = _OPS.activated_backward(grad, x, *ctx.settings)
        return dx, None, None, None


def activated(x: Tensor, activation: Activation = "gelu") -> Tensor:
    """Return act(x).

    Args:
        x: tensor of any shape in fp32, fp16, bf16 or float64.
        activation: `gelu` (exact), `silu`, `gelu_tanh` or `quick_gelu`.

    Returns:
        A differentiable tensor with x's shape and dtype.
    """
    settings = ACTIVATIONS[activation]
    if x.device.type not in KERNEL_DEVICES or x.dtype is torch.float64 or has_active_transform():
        return _formula(x, *settings)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Activated.apply(x, *settings)  # type: ignore[no-untyped-call]
    y: Tensor = _OPS.activated(x, *settings)
    return y
