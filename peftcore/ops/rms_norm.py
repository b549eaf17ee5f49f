"""RMSNorm (Zhang & Sennrich 2019) and its gradients.

    r = 1 / √(mean of x² + eps)         y = round?(x r) ∘ g         g = offset + weight

    dx = r (dy ∘ g - x r mean(dy ∘ g ∘ x r))          dweight = the sum of dy ∘ round?(x r) over rows

Everything is computed in fp32 and rounded to x's dtype at the end. With `rounded`, as in Llama, x r is also rounded
before it is multiplied by the weight. Only x and r are saved for the gradient, while PyTorch's formula saves a 16-bit x
in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftcore.ops import _triton
from peftcore.ops._library import define_by
from peftcore.ops.calling import differentiable_gradients, has_active_transform
from peftcore.ops.weight import DTYPES, check_dtype, check_gradient, check_strided, require

_OPS = torch.ops.peftcore


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    check_dtype(x.dtype, op)
    for name, t in (("x", x), ("weight", weight)):
        check_strided(t, op, name)
    if weight.dtype not in DTYPES:
        raise TypeError(f"{op}: weight must be float32, float16 or bfloat16, found {weight.dtype}")
    require(weight.device == x.device, op, f"weight must be on {x.device} like x, found {weight.device}")
    require(x.dim() > 0, op, "x must have at least one dimension, found a scalar")
    shape = f"weight must be [{x.shape[-1]}] for x, found {list(weight.shape)}"
    require(list(weight.shape) == [x.shape[-1]], op, shape)


def _rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@dataclass
class RmsNorm:
    x: Tensor
    weight: Tensor
    eps: float
    offset: float
    rounded: bool

    def __post_init__(self) -> None:
        _check("rms_norm", self.x, self.weight)

    def compute(self) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(self.x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        y = _apply_gain(self.x.float() * scale, self.weight, self.offset, self.x.dtype if self.rounded else None)
        return y.to(self.x.dtype), scale.flatten()

    def empty(self) -> tuple[Tensor, Tensor]:
        return self.x.new_empty(self.x.shape), _rows(self.x)


@dataclass
class RmsNormBackward:
    grad: Tensor
    x: Tensor
    weight: Tensor
    scale: Tensor
    offset: float
    rounded: bool
    needs: Sequence[bool]

    def __post_init__(self) -> None:
        op = "rms_norm_backward"
        _check(op, self.x, self.weight)
        check_gradient(self.grad, self.x, op)
        if self.scale.dtype is not torch.float32:
            raise TypeError(f"{op}: scale must be Float, found {self.scale.dtype}")
        require(self.scale.device == self.x.device, op, f"scale must be on {self.x.device}, found {self.scale.device}")
        rows = self.x.shape[:-1].numel()
        require(list(self.scale.shape) == [rows], op, f"scale must be [{rows}], found {list(self.scale.shape)}")

    def compute(self) -> tuple[Tensor, Tensor]:
        dx, dweight = self.x.new_empty(0), self.weight.new_empty(0)
        scale = self.scale.view(*self.x.shape[:-1], 1)
        normalized = self.x.float() * scale
        if self.needs[0]:
            slopes = self.grad.float() * (self.offset + self.weight.float())
            dx = (scale * (slopes - normalized * (slopes * normalized).mean(-1, keepdim=True))).to(self.x.dtype)
        if self.needs[1]:
            normalized = normalized.to(self.x.dtype).float() if self.rounded else normalized
            dweight = (self.grad.float() * normalized).sum_to_size(self.weight.shape).to(self.weight.dtype)
        return dx, dweight

    def empty(self) -> tuple[Tensor, ...]:
        operands = zip((self.x, self.weight), self.needs, strict=True)
        return tuple(t.new_empty(t.shape if needs_grad else (0,)) for t, needs_grad in operands)


_NAMES = "float offset, bool rounded"
define_by(
    f"rms_norm(Tensor x, Tensor weight, float eps, {_NAMES}) -> (Tensor y, Tensor scale)", RmsNorm, triton="norms"
)
define_by(
    f"rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, {_NAMES}, bool[2] needs)"
    " -> (Tensor dx, Tensor dweight)",
    RmsNormBackward,
    triton="norms",
)


def _apply_gain(normalized: Tensor, weight: Tensor, offset: float, rounded_to: torch.dtype | None) -> Tensor:
    gain = weight.to(normalized.dtype) if offset == 0 else offset + weight.to(normalized.dtype)
    return gain * (normalized if rounded_to is None else normalized.to(rounded_to))


def _formula(x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return _apply_gain(normalized, weight, offset, x.dtype if rounded else None).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool) -> Tensor:
        y, scale = _OPS.rms_norm(x, weight, eps, offset, rounded)
        ctx.save_for_backward(x, weight, scale)
        ctx.settings = eps, offset, rounded
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        eps, offset, rounded = ctx.settings
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph=True
            formula = partial(_formula, eps=eps, offset=offset, rounded=rounded)
            return *differentiable_gradients(formula, (x, weight), needs, grad), None, None, None
        dx, dweight = _OPS.rms_norm_backward(grad, x, weight, scale, offset, rounded, needs)
        return dx if needs[0] else None, dweight if needs[1] else None, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounded: bool = True) -> Tensor:
    """Return x / √(mean(x²) + eps) ∘ (offset + weight), with the mean over the last dimension.

    Args:
        x: `[.., n]`; fp32, fp16, bf16 or float64.
        weight: `[n]` in any of these dtypes.
        eps: added to the mean of squares.
        offset: added to the weight: 1 in Gemma.
        rounded: round the normalized x to its dtype before it is multiplied by the weight, as Llama does.

    Returns:
        A tensor with x's shape and dtype, and gradients for x and weight.
    """
    wide = torch.float64 in (x.dtype, weight.dtype)
    if wide or x.device.type not in _triton.DEVICES or has_active_transform():
        return _formula(x, weight, eps, offset, rounded)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, weight, eps, offset, rounded)  # type: ignore[no-untyped-call]
    y: Tensor = _OPS.rms_norm(x, weight, eps, offset, rounded)[0]
    return y
