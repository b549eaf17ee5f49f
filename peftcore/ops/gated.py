"""Gated activations (Shazeer 2020, GLU Variants, section 2) of two matrices, and their gradients.

    y = round(act(g)) ∘ u         act(x) = x s(x)         s = 1 / (1 + exp(-p))         p = linear x + cubic x³

    dg = dy ∘ u ∘ s ∘ (1 + g ∘ (1 - s) ∘ p'(g))           du = dy ∘ act(g)

SiLU has p = x, the tanh approximation of GELU p = 2 √(2/π) (x + 0.044715 x³), and quick GELU p = 1.702 x. Everything is
computed in fp32. As in model code, both act(g) and the result are rounded to g's dtype. Only g and u are saved for the
gradient, while PyTorch's operators also save act(g).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from peftcore.ops import _triton
from peftcore.ops._library import define_by
from peftcore.ops.calling import differentiable_gradients, has_active_transform
from peftcore.ops.weight import check_dtype, check_strided, require

_OPS = torch.ops.peftcore
_TANH = 2 * math.sqrt(2 / math.pi)
Activation = Literal["silu", "gelu_tanh", "quick_gelu"]
ACTIVATIONS: dict[str, tuple[float, float]] = {  # coefficients of p: linear, cubic
    "silu": (1.0, 0.0),
    "gelu_tanh": (_TANH, 0.044715 * _TANH),
    "quick_gelu": (1.702, 0.0),
}

_LARGEST = 16.0  # largest coefficient for which kernels overflow only where the reference does


def check_coefficients(op: str, linear: float, cubic: float) -> None:
    """Check the coefficients of p."""
    for name, number in (("linear", linear), ("cubic", cubic)):
        require(0 <= number <= _LARGEST, op, f"{name} must be from 0 to {_LARGEST:g}, found {number}")


def _check(op: str, gate: Tensor, linear: float, cubic: float, **tensors: Tensor) -> None:
    check_dtype(gate.dtype, op)
    check_coefficients(op, linear, cubic)
    check_strided(gate, op, "gate")
    for name, t in tensors.items():
        if t.dtype is not gate.dtype:
            raise TypeError(f"{op}: {name} must be {gate.dtype} like gate, found {t.dtype}")
        check_strided(t, op, name)
        require(t.device == gate.device, op, f"{name} must be on {gate.device} like gate, found {t.device}")
        shape = f"{name} must be {list(gate.shape)} like gate, found {list(t.shape)}"
        require(t.shape == gate.shape, op, shape)


def sigmoid_of_p(x: Tensor, linear: float, cubic: float) -> Tensor:
    """Return s = 1 / (1 + exp(-p(x)))."""
    return torch.sigmoid(linear * x + cubic * x.pow(3) if cubic else linear * x)


def slope(x: Tensor, linear: float, cubic: float) -> Tensor:
    """Return the derivative of x s(x): 0 or 1 for large |x|, NaN at infinity."""
    # Outside this range, s or 1 - s is 0, and p'(x) may overflow
    s, near = sigmoid_of_p(x, linear, cubic), x.clamp(-1e4, 1e4)
    nan_at_infinity = x - x
    return s * (1 + near * (1 - s) * (linear + 3 * cubic * near.pow(2))) + nan_at_infinity


def _formula(gate: Tensor, up: Tensor, linear: float, cubic: float) -> Tensor:
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (wide * sigmoid_of_p(wide, linear, cubic)).to(gate.dtype) * up


@dataclass
class Gated:
    gate: Tensor
    up: Tensor
    linear: float
    cubic: float

    def __post_init__(self) -> None:
        _check("gated", self.gate, self.linear, self.cubic, up=self.up)

    def compute(self) -> Tensor:
        return _formula(self.gate, self.up, self.linear, self.cubic)

    def empty(self) -> Tensor:
        return self.gate.new_empty(self.gate.shape)


@dataclass
class GatedBackward:
    grad: Tensor
    gate: Tensor
    up: Tensor
    linear: float
    cubic: float

    def __post_init__(self) -> None:
        _check("gated_backward", self.gate, self.linear, self.cubic, up=self.up, grad=self.grad)

    def compute(self) -> tuple[Tensor, Tensor]:
        gate, grad, dtype = self.gate.float(), self.grad.float(), self.gate.dtype
        dgate = grad * self.up * slope(gate, self.linear, self.cubic)
        return dgate.to(dtype), (grad * gate * sigmoid_of_p(gate, self.linear, self.cubic)).to(dtype)

    def empty(self) -> tuple[Tensor, Tensor]:
        return self.gate.new_empty(self.gate.shape), self.gate.new_empty(self.gate.shape)


define_by("gated(Tensor gate, Tensor up, float linear, float cubic) -> Tensor", Gated, triton="gates")
define_by(
    "gated_backward(Tensor grad, Tensor gate, Tensor up, float linear, float cubic) -> (Tensor dgate, Tensor dup)",
    GatedBackward,
    triton="gates",
)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, linear: float, cubic: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.coefficients = linear, cubic
        return _OPS.gated(gate, up, linear, cubic)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph=True
            formula = partial(_formula, linear=ctx.coefficients[0], cubic=ctx.coefficients[1])
            return *differentiable_gradients(formula, (gate, up), needs, grad), None, None
        dgate, dup = _OPS.gated_backward(grad, gate, up, *ctx.coefficients)
        return dgate if needs[0] else None, dup if needs[1] else None, None, None


def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """Return act(gate) ∘ up.

    Args:
        gate: tensor of any shape in fp32, fp16, bf16 or float64.
        up: tensor with the shape and dtype of gate.
        activation: `silu`, `gelu_tanh` or `quick_gelu`.

    Returns:
        A tensor with gate's shape and dtype, and gradients for gate and up.
    """
    coefficients = ACTIVATIONS[activation]
    if gate.device.type not in _triton.DEVICES or gate.dtype is torch.float64 or has_active_transform():
        return _formula(gate, up, *coefficients)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up, *coefficients)  # type: ignore[no-untyped-call]
    y: Tensor = _OPS.gated(gate, up, *coefficients)
    return y
