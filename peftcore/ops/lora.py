"""y = x Wᵀ + bias + S Bᵀ with S = c (keep ∘ x) Aᵀ, and its gradients; W is frozen, dense or in 4 bits.

    forward     S [M, r]                                   c = scale / (1 - p)
                y = (x Wᵀ + bias) + S Bᵀ
    backward    T = c dy B                                 [M, r]
                dx = dy W + keep ∘ (T A)
                dA = Tᵀ (keep ∘ x),  dB = dyᵀ S,  dbias = the sum of dy over all rows

x and S, which has only r columns, are saved for the gradient; the mask `keep` is regenerated (see dropout.py).

For a 16-bit x, the factors A and B and the intermediate results S and T are fp32: in fp16, T would underflow for small
gradients, and in bf16 dA would be off by 2e-3. y and dx are rounded once, or twice if the BLAS library computes the
frozen product. dA and dB have the dtypes of A and B.

Layers that share x (q, k and v, or gate and up) are not fused: LoRA as a whole adds 9 % to a training step of a Llama
with 135M parameters, and fusion could only save its passes over x, a fraction of that.

The gradient is an `autograd.Function` over operators that have no autograd of their own, to save overhead in every
layer (see linear_4bit.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops._library import define_by
from peftcore.ops.calling import as_non_view, frozen_operands, has_active_transform, operator_for, permute_inputs
from peftcore.ops.dropout import apply_mask, check_dropout, factor, seed_of_call
from peftcore.ops.quant4 import dequantize_4bit
from peftcore.ops.weight import PackedWeight, check_linear, require, weight_from_operands

_OPS = torch.ops.peftcore


def matrix(t: Tensor) -> Tensor:
    """Flatten all leading dimensions, to [rows, last]."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which A, B, S and T are computed: fp32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def frozen_linear(x: Tensor, weight: Sequence[Tensor], packing: Sequence[int], bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias."""
    return _OPS.linear_4bit(x, weight, packing, bias) if packing else F.linear(x, weight[0], bias)


# --- checks: the same conditions, messages and exception types as csrc/lora/arguments.h ------------------------------


def check_factors(op: str, x: Tensor, a: Tensor, b: Tensor, out_features: int, names: tuple[str, str]) -> None:
    for name, t in zip(names, (a, b), strict=True):
        if not t.is_floating_point() or t.itemsize == 1:
            raise TypeError(f"{op}: {name} must be a 16-, 32- or 64-bit floating-point tensor, found {t.dtype}")
        require(t.device == x.device, op, f"{name} must be on {x.device} like x, found {t.device}")
        require(t.dim() == 2, op, f"{name} must have two dimensions, found {list(t.shape)}")
    r = a.shape[0]
    require(a.shape[1] == x.shape[-1], op, f"{names[0]} must be [r, {x.shape[-1]}] for x, found {list(a.shape)}")
    require(b.shape == (out_features, r), op, f"{names[1]} must be [{out_features}, {r}], found {list(b.shape)}")


def _check_gradient(op: str, grad: Tensor, s: Tensor, x: Tensor, out_features: int, r: int) -> None:
    for name, t, dtype in (("grad", grad, x.dtype), ("s", s, wide_dtype(x))):
        if t.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype} for x of {x.dtype}, found {t.dtype}")
        require(t.device == x.device, op, f"{name} must be on {x.device} like x, found {t.device}")
    expected = [*x.shape[:-1], out_features]
    require(list(grad.shape) == expected, op, f"grad must be {expected}, found {list(grad.shape)}")
    rows = x.shape[:-1].numel()
    require(s.shape == (rows, r), op, f"s must be [{rows}, {r}], found {list(s.shape)}")


# --- operators -------------------------------------------------------------------------------------------------------


@dataclass
class LoraLinear:
    x: Tensor
    weight: Sequence[Tensor]
    packing: Sequence[int]
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def __post_init__(self) -> None:
        op, frozen = "lora_linear", weight_from_operands(self.weight, self.packing, "lora_linear")
        check_linear(self.x, frozen, self.bias, op)
        check_factors(op, self.x, self.a, self.b, frozen.shape[0], ("a", "b"))
        check_dropout(op, self.x, self.dropout_p, self.seed)

    def compute(self) -> tuple[Tensor, Tensor]:
        x, dtype, drop = self.x, wide_dtype(self.x), (self.dropout_p, self.seed)
        y = frozen_linear(x, self.weight, self.packing, self.bias)
        s = apply_mask(matrix(x), *drop).to(dtype) @ self.a.to(dtype).T * factor(self.scale, *drop)
        return (y + (s @ self.b.to(dtype).T).view(y.shape)).to(x.dtype), s

    def empty(self) -> tuple[Tensor, Tensor]:
        leading, r = self.x.shape[:-1], self.a.shape[0]
        y = self.x.new_empty((*leading, self.b.shape[0]))
        return y, self.x.new_empty((leading.numel(), r), dtype=wide_dtype(self.x))


@dataclass
class LoraLinearBackward:
    grad: Tensor
    x: Tensor
    s: Tensor
    weight: Sequence[Tensor]
    packing: Sequence[int]
    a: Tensor
    b: Tensor
    needs: Sequence[bool]
    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def __post_init__(self) -> None:
        op, frozen = "lora_linear_backward", weight_from_operands(self.weight, self.packing, "lora_linear_backward")
        check_linear(self.x, frozen, None, op)
        check_factors(op, self.x, self.a, self.b, frozen.shape[0], ("a", "b"))
        _check_gradient(op, self.grad, self.s, self.x, frozen.shape[0], self.a.shape[0])
        check_dropout(op, self.x, self.dropout_p, self.seed)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        x, a, b, drop, dtype = self.x, self.a, self.b, (self.dropout_p, self.seed), wide_dtype(self.x)
        rows = matrix(self.grad).to(dtype)
        dx, da, db = x.new_empty(0), a.new_empty(0), b.new_empty(0)
        t = rows @ b.to(dtype) * factor(self.scale, *drop)  # [M, r]
        if self.needs[0]:
            if self.packing:
                dx = _OPS.linear_4bit_backward(self.grad, self.weight, self.packing)
            else:
                dx = self.grad @ self.weight[0]
            dx = (matrix(dx) + apply_mask(t @ a.to(dtype), *drop)).to(x.dtype).view(x.shape)
        if self.needs[1]:
            da = (t.T @ apply_mask(matrix(x), *drop).to(dtype)).to(a.dtype)
        if self.needs[2]:
            db = (rows.T @ self.s).to(b.dtype)
        return dx, da, db

    def empty(self) -> tuple[Tensor, ...]:
        operands = zip((self.x, self.a, self.b), self.needs, strict=True)
        return tuple(t.new_empty(t.shape if needs_grad else (0,)) for t, needs_grad in operands)


_DROPOUT = "float dropout_p=0.0, Tensor? seed=None"

define_by(
    "lora_linear(Tensor x, Tensor[] weight, SymInt[] packing, Tensor? bias, Tensor a, Tensor b, float scale, "
    f"{_DROPOUT}) -> (Tensor y, Tensor s)",
    LoraLinear,
)
define_by(
    "lora_linear_backward(Tensor grad, Tensor x, Tensor s, Tensor[] weight, SymInt[] packing, Tensor a, Tensor b, "
    f"bool[3] needs, float scale, {_DROPOUT}) -> (Tensor dx, Tensor da, Tensor db)",
    LoraLinearBackward,
)


# --- public functions ------------------------------------------------------------------------------------------------


@torch.no_grad()
def _in_float64(call: type[LoraLinear] | type[LoraLinearBackward], *arguments: Any) -> Any:
    """Run the reference. Kernels support training dtypes only; float64 is for gradient checks."""
    return call(*arguments).compute()


def _differentiable(call: LoraLinearBackward) -> tuple[Tensor, ...]:
    """Compute the gradients with differentiable operators, for create_graph=True."""
    x, drop, dtype = call.x, (call.dropout_p, call.seed), wide_dtype(call.x)
    if call.needs[2]:
        if not call.needs[1]:
            raise RuntimeError(
                "lora_linear does not save x if A is frozen, so it cannot be differentiated twice "
                "(create_graph=True). Make A require gradients as well"
            )
        s = apply_mask(matrix(x), *drop).to(dtype) @ call.a.to(dtype).T * factor(call.scale, *drop)
        call = replace(call, s=s)
    frozen = weight_from_operands(call.weight, call.packing, "lora_linear_backward")
    if isinstance(frozen, PackedWeight):
        call = replace(call, weight=[dequantize_4bit(frozen, x.dtype)], packing=[])
    return call.compute()


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        numbers: tuple[float, float, list[int]],
        seed: Tensor | None,
        *weight: Tensor,
    ) -> Tensor:
        scale, dropout_p, packing = numbers
        arguments = x, weight, packing, bias, a, b, scale, dropout_p, seed
        exact = x.dtype is torch.float64
        y, s = _in_float64(LoraLinear, *arguments) if exact else operator_for("lora_linear", seed)(*arguments)
        # With A frozen (LoRA-FA, TinyLoRA) no gradient reads the values of x, so only its shape is saved.
        saved_x = x if ctx.needs_input_grad[2] else x.new_empty(()).expand(x.shape)
        ctx.save_for_backward(saved_x, s, a, b, seed, *weight)
        ctx.numbers = numbers
        return as_non_view(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, s, a, b, seed, *weight = ctx.saved_tensors
        scale, dropout_p, packing = ctx.numbers
        need_x, need_bias, *need_factors = ctx.needs_input_grad[:4]
        dx = da = db = bias_grad = None
        needs = [need_x, *need_factors]
        if any(needs):
            arguments = grad, x, s, weight, packing, a, b, needs, scale, dropout_p, seed
            if torch.is_grad_enabled():
                gradients = _differentiable(LoraLinearBackward(*arguments))
            elif x.dtype is torch.float64:
                gradients = _in_float64(LoraLinearBackward, *arguments)
            else:
                gradients = operator_for("lora_linear_backward", seed)(*arguments)
            dx, da, db = (g if needs_grad else None for g, needs_grad in zip(gradients, needs, strict=True))
        if need_bias:
            bias_grad = matrix(grad).sum(0)
        return dx, bias_grad, da, db, *(None for _ in ctx.needs_input_grad[4:])


def lora_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return x Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ.

    Args:
        x: fp32, fp16, bf16 or float64 `[..., in]`; under autocast it is cast as for `F.linear`.
        weight: `[out, in]` in x's dtype (or any dtype under autocast), or a `PackedWeight`. It must not require grad.
        bias: `[out]`, cast to x's dtype.
        a, b: `[r, in]` and `[out, r]` in 16-, 32- or 64-bit floating point, computed in fp32 (in float64 if x is). Each
            gradient has the dtype of its factor.
        dropout_p: probability of dropping an element of x before A, rounded to a multiple of 1/65536.
        seed: int64 `[]` on CPU or x's device, which determines the mask (see `keep_mask`). By default it is drawn from
            PyTorch's generator, so that `torch.manual_seed` and checkpointing work; each replay of a CUDA graph draws a
            new seed.

    Returns:
        `[..., out]` in x's dtype (or the autocast dtype), with gradients for x, bias, a and b.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes of the arguments do not match. RuntimeError: b's gradient is
            differentiated again, but a requires no gradient.
    """
    if has_active_transform():
        dense = dequantize_4bit(weight, x.dtype) if isinstance(weight, PackedWeight) else weight
        return F.linear(x, dense, bias) + scale * F.linear(
            F.linear(F.dropout(x, dropout_p), a.to(x.dtype)), b.to(x.dtype)
        )
    if not isinstance(weight, Tensor):
        a = permute_inputs(a, weight)
    x, tensors, packing, bias = frozen_operands(x, weight, bias)
    seed = seed_of_call(x, seed) if dropout_p else None
    if torch.is_grad_enabled() and (
        a.requires_grad or x.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)
    ):
        packed = (scale, dropout_p, packing)
        return _LoraLinear.apply(x, bias, a, b, packed, seed, *tensors)  # type: ignore[no-untyped-call]
    arguments = x, tensors, packing, bias, a, b, scale, dropout_p, seed
    exact = x.dtype is torch.float64
    return (_in_float64(LoraLinear, *arguments) if exact else operator_for("lora_linear", seed)(*arguments))[0]
