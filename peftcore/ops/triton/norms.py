"""RMSNorm (Zhang & Sennrich 2019) and its gradients. Formulas: `peftcore/ops/rms_norm.py`.

A program takes one wide row or several narrow ones. It holds their first columns, up to `_WIDEST`, in registers, so
that memory is passed over once; the columns beyond are read again for the result, from a cache.

The gradient of the weight, which few fine-tunings need, is a kernel of its own: programs add groups of rows, and a sum
over the groups follows. How rows are grouped depends on the shape alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from peftcore.ops.rms_norm import RmsNorm, RmsNormBackward

_WIDEST = 8192  # columns that a program holds
_VALUES = 2048  # of narrow rows that a program takes together
_ROWS_OF_GROUP, _MOST_GROUPS = 64, 128  # of the weight's gradient


@triton.jit
def _load(x, row, column, rows, columns):
    """Return values as fp32, zero outside of the matrix. `row` and `column` are int64 and broadcast."""
    return tl.load(x + row * columns + column, (row < rows) & (column < columns), 0.0).to(tl.float32)


@triton.jit
def _load_gain(weight, offset, column, columns):
    return offset + tl.load(weight + column, column < columns, 0.0).to(tl.float32)


@triton.jit
def _store(y, value, row, column, rows, columns):
    tl.store(y + row * columns + column, value.to(y.dtype.element_ty), (row < rows) & (column < columns))


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x, weight, y, scale, rows, columns, eps, offset, rounded: tl.constexpr, height: tl.constexpr, width: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height).to(tl.int64)[:, None]
    column = tl.arange(0, width).to(tl.int64)[None, :]
    held = _load(x, row, column, rows, columns)
    squares = held * held
    for start in range(width, columns, width):
        value = _load(x, row, start + column, rows, columns)
        squares += value * value
    mean = tl.sum(squares, 1, keep_dims=True) / columns
    r = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(scale + row, r, row < rows)
    _store_normed(y, held, r, weight, offset, row, column, rows, columns, rounded)
    for start in range(width, columns, width):
        value = _load(x, row, start + column, rows, columns)
        _store_normed(y, value, r, weight, offset, row, start + column, rows, columns, rounded)


@triton.jit
def _store_normed(y, value, r, weight, offset, row, column, rows, columns, rounded: tl.constexpr):
    normed = value * r
    if rounded:
        normed = normed.to(y.dtype.element_ty).to(tl.float32)
    _store(y, normed * _load_gain(weight, offset, column, columns), row, column, rows, columns)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_dx_kernel(x, weight, grad, scale, dx, rows, columns, offset, height: tl.constexpr, width: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height).to(tl.int64)[:, None]
    column = tl.arange(0, width).to(tl.int64)[None, :]
    r = tl.load(scale + row, row < rows, 0.0)
    held_normed = _load(x, row, column, rows, columns) * r
    held_slope = _load(grad, row, column, rows, columns) * _load_gain(weight, offset, column, columns)
    products = held_normed * held_slope
    for start in range(width, columns, width):
        slope = _load(grad, row, start + column, rows, columns) * _load_gain(weight, offset, start + column, columns)
        products += slope * (_load(x, row, start + column, rows, columns) * r)
    mean = tl.sum(products, 1, keep_dims=True) / columns
    _store(dx, r * (held_slope - held_normed * mean), row, column, rows, columns)
    for start in range(width, columns, width):
        slope = _load(grad, row, start + column, rows, columns) * _load_gain(weight, offset, start + column, columns)
        normed = _load(x, row, start + column, rows, columns) * r
        _store(dx, r * (slope - normed * mean), row, start + column, rows, columns)


@triton.jit(do_not_specialize=["rows", "rows_of_group"])
def _rms_norm_dweight_kernel(
    x,
    grad,
    scale,
    sums,
    rows,
    columns,
    rows_of_group,
    rounded: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
):
    column = (tl.program_id(0).to(tl.int64) * width + tl.arange(0, width).to(tl.int64))[None, :]
    first = tl.program_id(1).to(tl.int64) * rows_of_group + tl.arange(0, height).to(tl.int64)[:, None]
    total = tl.zeros([height, width], tl.float32)
    for start in range(0, rows_of_group, height):
        row = first + start
        normed = _load(x, row, column, rows, columns) * tl.load(scale + row, row < rows, 0.0)
        if rounded:
            normed = normed.to(x.dtype.element_ty).to(tl.float32)
        total += _load(grad, row, column, rows, columns) * normed
    group_sum = tl.sum(total, 0, keep_dims=True)
    tl.store(sums + tl.program_id(1).to(tl.int64) * columns + column, group_sum, column < columns)


def _tile(columns: int) -> tuple[int, int, int]:
    """Return the rows and columns of a program, and its number of warps: about 16 values for each thread."""
    width = min(triton.next_power_of_2(columns), _WIDEST)
    height = max(1, _VALUES // width)
    return height, width, max(4, height * width // 512)


def rms_norm(call: RmsNorm) -> tuple[Tensor, Tensor]:
    """Return y, in x's shape and dtype, and r in fp32 `[rows]`."""
    y, scale = call.empty()
    columns = y.shape[-1]
    x = call.x.reshape(-1, columns).contiguous()
    height, width, warps = _tile(columns)
    grid = (triton.cdiv(len(x), height),)
    sizes = len(x), columns, float(call.eps), float(call.offset), call.rounded, height, width
    _rms_norm_kernel[grid](x, call.weight.contiguous(), y, scale, *sizes, num_warps=warps, enable_fp_fusion=True)
    return y, scale


def rms_norm_backward(call: RmsNormBackward) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight; `[0]` where one is not needed."""
    columns = call.x.shape[-1]
    x, grad = (t.reshape(-1, columns).contiguous() for t in (call.x, call.grad))
    scale = call.scale.contiguous()
    dx, dweight = call.empty()
    if call.needs[0]:
        height, width, warps = _tile(columns)
        grid = (triton.cdiv(len(x), height),)
        sizes = len(x), columns, float(call.offset), height, width
        _rms_norm_dx_kernel[grid](
            x, call.weight.contiguous(), grad, scale, dx, *sizes, num_warps=warps, enable_fp_fusion=True
        )
    if call.needs[1]:
        dweight = _weight_gradient(x, grad, scale, call.rounded).to(call.weight.dtype)
    return dx, dweight


def _weight_gradient(x: Tensor, grad: Tensor, scale: Tensor, rounded: bool) -> Tensor:
    """Return the gradient of the weight in fp32, from rows x and grad `[rows, columns]`."""
    rows, columns = x.shape
    rows_of_group = triton.cdiv(triton.cdiv(rows, _MOST_GROUPS), _ROWS_OF_GROUP) * _ROWS_OF_GROUP
    groups = triton.cdiv(rows, rows_of_group)
    sums = x.new_empty((groups, columns), dtype=torch.float32)
    width = min(triton.next_power_of_2(columns), 128)
    grid = (triton.cdiv(columns, width), groups)
    height = min(_VALUES // width, _ROWS_OF_GROUP)
    _rms_norm_dweight_kernel[grid](
        x, grad, scale, sums, rows, columns, rows_of_group, rounded, height, width, enable_fp_fusion=True
    )
    return sums.sum(0)
