"""Gated activations (Shazeer 2020, GLU Variants, section 2) and their gradients, each in one pass over memory.

Formulas: `peftcore/ops/gated.py` and `swiglu.py`. A program takes consecutive values of one row; contiguous matrices
count as one row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from peftcore.ops.triton.functions import exp

if TYPE_CHECKING:
    from peftcore.ops.gated import Gated, GatedBackward
    from peftcore.ops.swiglu import Swiglu, SwigluBackward

_BLOCK = 1024  # values of a program


@triton.jit
def _sigmoid_of_p(x, linear, cubic):
    """Return s = 1 / (1 + e^-p) and 1 - s. x is clamped where s is 0 or 1 anyway, and its powers would overflow."""
    near = tl.minimum(tl.maximum(x, -1e4), 1e4)
    z = -near * (linear + cubic * near * near)
    e = exp(tl.minimum(z, 88.0))
    s = tl.where(z < 88.0, 1 / (1 + e), 0.0)
    return s, e * s


@triton.jit
def _slope(x, s, rest, linear, cubic):
    """Return the derivative of x s(x), where rest = 1 - s: NaN at infinity."""
    near = tl.minimum(tl.maximum(x, -1e4), 1e4)
    return s * (1 + near * rest * (linear + 3 * cubic * near * near)) + (x - x)


@triton.jit
def _place(columns, stride, blocks_of_row, block: tl.constexpr):
    """Return where the values of this program begin in gate and up and in y, and which of them exist."""
    row = (tl.program_id(0) // blocks_of_row).to(tl.int64)
    column = (tl.program_id(0) % blocks_of_row).to(tl.int64) * block + tl.arange(0, block)
    return row * stride + column, row * columns + column, column < columns


@triton.jit
def _gated_kernel(
    gate, up, y, columns, stride, blocks_of_row, linear, cubic, rounded: tl.constexpr, block: tl.constexpr
):
    source, destination, mask = _place(columns, stride, blocks_of_row, block)
    g = tl.load(gate + source, mask, 0.0).to(tl.float32)
    u = tl.load(up + source, mask, 0.0).to(tl.float32)
    s, _ = _sigmoid_of_p(g, linear, cubic)
    activated = g * s
    if rounded:
        activated = activated.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + destination, (activated * u).to(y.dtype.element_ty), mask)


@triton.jit
def _gated_backward_kernel(
    grad, gate, up, dgate, dup, columns, stride, blocks_of_row, linear, cubic, block: tl.constexpr
):
    source, destination, mask = _place(columns, stride, blocks_of_row, block)
    g = tl.load(gate + source, mask, 0.0).to(tl.float32)
    u = tl.load(up + source, mask, 0.0).to(tl.float32)
    dy = tl.load(grad + destination, mask, 0.0).to(tl.float32)
    s, rest = _sigmoid_of_p(g, linear, cubic)
    tl.store(dgate + source, (dy * u * _slope(g, s, rest, linear, cubic)).to(dgate.dtype.element_ty), mask)
    tl.store(dup + source, (dy * (g * s)).to(dup.dtype.element_ty), mask)


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor, ...],
    rows: int,
    columns: int,
    stride: int,
    *options: float | bool,
) -> None:
    """Launch the kernel on tensors whose rows of `columns` values are `stride` values apart in gate and up."""
    blocks_of_row = triton.cdiv(columns, _BLOCK)
    kernel[(rows * blocks_of_row,)](*tensors, columns, stride, blocks_of_row, *options, _BLOCK, enable_fp_fusion=True)


def gated(call: Gated) -> Tensor:
    """Return act(gate) ∘ up, with act(gate) rounded to gate's dtype."""
    y = call.empty()
    tensors = call.gate.contiguous(), call.up.contiguous(), y
    _launch(_gated_kernel, tensors, 1, y.numel(), 0, float(call.linear), float(call.cubic), True)
    return y


def gated_backward(call: GatedBackward) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    dgate, dup = call.empty()
    inputs = call.grad.contiguous(), call.gate.contiguous(), call.up.contiguous()
    _launch(_gated_backward_kernel, (*inputs, dgate, dup), 1, dup.numel(), 0, float(call.linear), float(call.cubic))
    return dgate, dup


def swiglu(call: Swiglu) -> Tensor:
    """Return silu(g) ∘ u of rows [g, u], rounded once."""
    y = call.empty()
    columns = y.shape[-1]
    x = call.x.reshape(-1, 2 * columns).contiguous()
    _launch(_gated_kernel, (x, x[:, columns:], y), len(x), columns, 2 * columns, 1.0, 0.0, False)
    return y


def swiglu_backward(call: SwigluBackward) -> Tensor:
    """Return the gradient of rows [g, u]."""
    dx = call.empty()
    columns = call.grad.shape[-1]
    x, grad = call.x.reshape(-1, 2 * columns).contiguous(), call.grad.contiguous()
    rows = dx.view(-1, 2 * columns)
    tensors = grad, x, x[:, columns:], rows, rows[:, columns:]
    _launch(_gated_backward_kernel, tensors, len(x), columns, 2 * columns, 1.0, 0.0)
    return dx
