"""y = x Wᵀ + b from a 4-bit weight, and its gradient with respect to x and b; W itself is frozen.

    W [out, in] = the dequantized weight (see quant4.py), each value rounded once to x's dtype
    dx = dy W, db = the sum of dy over all rows

The reference dequantizes the weight panel by panel (whole rows of W) into a workspace that is kept between calls, and
multiplies with the BLAS library: a fresh buffer for the whole weight would cost more in page faults than dequantizing.
Panels begin on a boundary of nested scales, so that one call dequantizes a panel. The kernels multiply a few rows of x
directly from 4 bits. For many rows they unpack tiles into the L2 cache and multiply them there (csrc/gemm), so that no
16-bit weight is ever written to memory.

Every layer pays for the overhead of this function, so the gradient is an `autograd.Function` over two operators that
have no autograd of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from peftcore.ops._extension import extension
from peftcore.ops._library import define_by
from peftcore.ops.calling import as_non_view, frozen_operands, has_active_transform
from peftcore.ops.quant4 import dequantize_4bit
from peftcore.ops.weight import PackedWeight, check_linear, check_operand, packed_weight_from_operands

# Bytes of a panel. Measured on one AVX-512 core with 4096 x 4096 in bf16: for one row of x, panels of 8 MiB take 2.8
# ms, the whole weight at once 5.8 ms (dense: 3.0 ms); for many rows, panels make no difference. In the backward pass
# every panel adds to all of dx, so fewer panels are better.
PANEL_BYTES = {"forward": 8 << 20, "backward": 32 << 20}
_OPS = torch.ops.peftcore
_local = threading.local()


def _workspace(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `count` elements of scratch memory: on CPU a per-thread buffer, elsewhere from the caching allocator."""
    if device.type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    size = count * dtype.itemsize
    buffer = getattr(_local, "bytes", None)
    if buffer is None or buffer.numel() < size:
        _local.bytes = buffer = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype)


def free_workspace() -> None:
    """Free the scratch memory that this thread keeps between calls on CPU."""
    _local.bytes = None
    if extension is not None:
        extension.free_workspace()


def _panels(weight: PackedWeight, dtype: torch.dtype, limit: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, end, dequantized rows start to end) in panels of up to `limit` bytes, each valid until the next."""
    rows, columns = weight.shape
    step, row_bytes = rows, columns * dtype.itemsize
    if rows * row_bytes > limit:
        multiple = weight.rows_that_begin_blocks()
        step = min(rows, max(1, limit // (row_bytes * multiple)) * multiple)
    buffer = _workspace(step * columns, dtype, weight.codes.device)
    for start in range(0, rows, max(1, step)):
        end = min(start + step, rows)
        panel = buffer[: (end - start) * columns].view(end - start, columns)
        yield start, end, dequantize_4bit(weight.rows(start, end), out=panel)


@dataclass
class Linear4bit:
    x: Tensor
    weight: Sequence[Tensor]
    packing: Sequence[int]
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        self.packed = packed_weight_from_operands(self.weight, self.packing, "linear_4bit")
        check_linear(self.x, self.packed, self.bias, "linear_4bit")

    def compute(self) -> Tensor:
        y, rows = None, self.packed.shape[0]
        for start, end, panel in _panels(self.packed, self.x.dtype, PANEL_BYTES["forward"]):
            part = F.linear(self.x, panel, None if self.bias is None else self.bias[start:end])
            if end - start == rows:
                return part
            y = self.empty() if y is None else y
            y[..., start:end] = part
        return self.empty() if y is None else y

    def empty(self) -> Tensor:
        return self.x.new_empty((*self.x.shape[:-1], self.packed.shape[0]))


@dataclass
class Linear4bitBackward:
    grad: Tensor
    weight: Sequence[Tensor]
    packing: Sequence[int]

    def __post_init__(self) -> None:
        self.packed = packed_weight_from_operands(self.weight, self.packing, "linear_4bit_backward")
        check_operand(self.packed, self.grad, "grad", True, "linear_4bit_backward")

    def compute(self) -> Tensor:
        grad, rows = self.grad, self.packed.shape[0]
        # Each panel adds to every element of dx. The sum is kept in fp32, so that it is rounded once.
        total = None
        for start, end, panel in _panels(self.packed, grad.dtype, PANEL_BYTES["backward"]):
            part = grad[..., start:end] @ panel
            if end - start == rows:
                return part
            total = part.float() if total is None else total + part
        return torch.zeros_like(self.empty()) if total is None else total.to(grad.dtype)

    def empty(self) -> Tensor:
        return self.grad.new_empty((*self.grad.shape[:-1], self.packed.shape[1]))


define_by("linear_4bit(Tensor x, Tensor[] weight, SymInt[] packing, Tensor? bias=None) -> Tensor", Linear4bit)
define_by("linear_4bit_backward(Tensor grad, Tensor[] weight, SymInt[] packing) -> Tensor", Linear4bitBackward)


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packing: list[int], *weight: Tensor) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.packing = packing
        return as_non_view(_OPS.linear_4bit(x, weight, packing, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            weight, packing = ctx.saved_tensors, ctx.packing
            if torch.is_grad_enabled():  # create_graph=True needs differentiable operators
                x_grad = grad @ dequantize_4bit(packed_weight_from_operands(weight, packing, "linear_4bit"), grad.dtype)
            else:
                x_grad = _OPS.linear_4bit_backward(grad, weight, packing)
        if ctx.needs_input_grad[1]:
            bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0)
        return x_grad, bias_grad, *(None for _ in ctx.needs_input_grad[2:])


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b.

    Args:
        x: fp32, fp16 or bf16 `[..., in]`; under autocast it is cast as for `F.linear`.
        weight: packed weight `[out, in]`, which gets no gradient.
        bias: `[out]`, cast to x's dtype.

    Returns:
        `[..., out]` in x's dtype (or the autocast dtype), with gradients for x and bias.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes of the arguments do not match.
    """
    if type(x) is not Tensor and has_torch_function_unary(x):
        return handle_torch_function(linear_4bit, (x,), x, weight, bias)
    if has_active_transform():
        return F.linear(x, dequantize_4bit(weight, x.dtype), bias)
    x, tensors, packing, bias = frozen_operands(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear4bit.apply(x, bias, packing, *tensors)  # type: ignore[no-untyped-call]
    return _OPS.linear_4bit(x, tensors, packing, bias)
