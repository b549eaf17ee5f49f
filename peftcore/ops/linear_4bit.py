"""y = x Wᵀ + b from a 4-bit weight, and its gradient with respect to x and b; W itself is frozen.

    W [out, in] = dequantized `packed` (see nf4.py), each value rounded once to x's dtype
    dx = dy W, db = the sum of dy over all rows

The reference unpacks the weight panel by panel (whole rows of W) into a workspace that is kept between calls, and
multiplies by the library's GEMM: a fresh buffer for the whole weight would cost more in page faults than the unpacking
itself. Panels begin where a block of scales of scales begins, so each is dequantized by one call. The kernels read few
rows of x straight from 4 bits; for many, on CPUs with dot products of bf16, they unpack tiles into the second cache
and multiply them there (csrc/gemm), so that no 16-bit weight is ever written to memory.

The layers of a model pay for every microsecond here, so the gradient is an `autograd.Function` over two operators
without autograd of their own. It cannot be differentiated again.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops._extension import extension
from peftcore.ops._library import define
from peftcore.ops.nf4 import _NESTED, NestedScales, _check_dequantize, _check_dtype, _check_tensor, _value

# Bytes of a panel. Measured on one AVX-512 core, 4096 x 4096 in bf16: forward, panels of 8 MiB take 2.8 ms for one
# row of x and the whole weight at once 5.8 (dense: 3.0), and they cost nothing for many rows; in the gradient every
# panel adds to all of dx, and fewer are better.
PANEL_BYTES = {"forward": 8 << 20, "backward": 32 << 20}
_local = threading.local()


def _workspace(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`count` elements of scratch memory. On CPU each thread keeps one; elsewhere the caching allocator does."""
    if device.type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    size = count * dtype.itemsize
    kept = getattr(_local, "bytes", None)
    if kept is None or kept.numel() < size:
        _local.bytes = kept = torch.empty(size, dtype=torch.uint8)
    return kept[:size].view(dtype)


def free_workspace() -> None:
    """Give back the memory that this thread keeps between calls on CPU."""
    _local.bytes = None
    if extension is not None:
        extension.free_workspace()


def _panel_rows(rows: int, row_bytes: int, multiple: int, limit: int) -> int:
    """Rows of a panel: as many as fit into `limit` bytes, and a multiple of `multiple`."""
    if rows * row_bytes <= limit:
        return rows
    return min(rows, max(1, limit // (row_bytes * multiple)) * multiple)


class _Weight:
    """The packed weight `[rows, columns]`, read in panels."""

    def __init__(
        self,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        blocksize: int,
        nested: tuple[Tensor | None, Tensor | None, Tensor | None, int],
        limit: int,
    ) -> None:
        _check_dequantize(packed, absmax, code, blocksize, (rows, columns), dtype, *nested)
        self.rows, self.columns, self.dtype = rows, columns, dtype
        self.packed, self.absmax, self.code = packed.reshape(-1), absmax.reshape(-1), code
        self.blocksize, self.nested = blocksize, nested
        together = blocksize * (nested[3] if nested[0] is not None else 1)
        multiple = together // math.gcd(columns, together)  # where a row begins with a block of scales
        self.step = _panel_rows(rows, columns * dtype.itemsize, multiple, limit)

    def panels(self) -> Any:
        """(first row, last row + 1, values `[last - first, columns]`), each valid until the next."""
        buffer = _workspace(self.step * self.columns, self.dtype, self.packed.device)
        scales, code, offset, nested_blocksize = self.nested
        for first in range(0, self.rows, max(1, self.step)):
            last = min(first + self.step, self.rows)
            begin, end = first * self.columns, last * self.columns
            panel = buffer[: end - begin].view(last - first, self.columns)
            blocks = slice(begin // self.blocksize, -(-end // self.blocksize))
            if scales is not None:
                of_scales = scales.reshape(-1)[blocks.start // nested_blocksize : -(-blocks.stop // nested_blocksize)]
            torch.ops.peftcore.dequantize_4bit.out(
                self.packed[begin // 2 : (end + 1) // 2],
                self.absmax[blocks],
                self.code,
                self.blocksize,
                None if scales is None else of_scales,
                code,
                offset,
                nested_blocksize,
                out=panel,
            )
            yield first, last, panel


def _check(x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None, op: str = "linear_4bit") -> None:
    _check_dtype(x.dtype, op)
    _check_tensor(packed, torch.uint8, x.device, op, "packed")
    _value(x.dim() > 0, op, "x must have at least one dimension, found a scalar")
    if bias is not None:
        _value(bias.shape == (out_features,), op, f"bias must be [{out_features}], found {list(bias.shape)}")
        if bias.dtype != x.dtype:
            raise TypeError(f"{op}: bias must be {x.dtype} like x, found {bias.dtype}")
        _value(bias.device == x.device, op, f"bias must be on {x.device} like x, found {bias.device}")


@torch.no_grad()
def _linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out_features: int,
    bias: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    _check(x, packed, out_features, bias)
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    weight = _Weight(
        out_features, x.shape[-1], x.dtype, packed, absmax, code, blocksize, nested, PANEL_BYTES["forward"]
    )
    if 0 < out_features <= weight.step:
        for _, _, whole in weight.panels():
            return F.linear(x, whole, bias)
    y = x.new_empty((*x.shape[:-1], out_features))
    for first, last, panel in weight.panels():
        y[..., first:last] = F.linear(x, panel, None if bias is None else bias[first:last])
    return y


def _fake_linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out_features: int,
    bias: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    _check(x, packed, out_features, bias)
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_dequantize(packed, absmax, code, blocksize, (out_features, x.shape[-1]), x.dtype, *nested)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.no_grad()
def _linear_4bit_backward(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    in_features: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    _check(grad, packed, 0, None, "linear_4bit_backward")
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    rows = grad.shape[-1]
    weight = _Weight(rows, in_features, grad.dtype, packed, absmax, code, blocksize, nested, PANEL_BYTES["backward"])
    if 0 < rows <= weight.step:
        for _, _, whole in weight.panels():
            return grad @ whole
    # Each panel adds to every element of dx: in fp32, so that the sum is rounded once.
    total = grad.new_zeros((*grad.shape[:-1], in_features), dtype=torch.float32)
    for first, last, panel in weight.panels():
        total += grad[..., first:last] @ panel
    return total.to(grad.dtype)


def _fake_linear_4bit_backward(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    in_features: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    _check(grad, packed, 0, None, "linear_4bit_backward")
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_dequantize(packed, absmax, code, blocksize, (grad.shape[-1], in_features), grad.dtype, *nested)
    return grad.new_empty((*grad.shape[:-1], in_features))


define(
    "linear_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor code, int blocksize, SymInt out_features, "
    f"Tensor? bias=None, {_NESTED}) -> Tensor",
    _linear_4bit,
    _fake_linear_4bit,
)
define(
    "linear_4bit_backward(Tensor grad, Tensor packed, Tensor absmax, Tensor code, int blocksize, SymInt in_features, "
    f"{_NESTED}) -> Tensor",
    _linear_4bit_backward,
    _fake_linear_4bit_backward,
)


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Tensor, *quantized: Any) -> Tensor:
        absmax, code, blocksize, out_features, *nested = quantized
        ctx.save_for_backward(packed, absmax, code, *nested[:3])
        ctx.sizes = blocksize, x.shape[-1], nested[3] if nested else 256
        return torch.ops.peftcore.linear_4bit(x, packed, absmax, code, blocksize, out_features, bias, *nested)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_4bit cannot be differentiated twice (create_graph=True). Use a dense weight: "
                "peftcore.quantization.dequantize(model)"
            )
        packed, absmax, code, *nested = ctx.saved_tensors
        blocksize, in_features, nested_blocksize = ctx.sizes
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            scales = (*nested, nested_blocksize) if nested else ()
            x_grad = torch.ops.peftcore.linear_4bit_backward(
                grad, packed, absmax, code, blocksize, in_features, *scales
            )
        if ctx.needs_input_grad[1]:
            bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0)
        return x_grad, bias_grad, *(None for _ in ctx.needs_input_grad[2:])


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    blocksize: int = 64,
    nested: NestedScales | None = None,
) -> Tensor:
    """x Wᵀ + b, where W `[out_features, in_features]` is what `quantize_4bit` packed.

    Args:
        x: fp32, fp16 or bf16 `[..., in_features]`; under autocast it is cast as for `F.linear`.
        packed, absmax, code, blocksize, nested: the weight, as `dequantize_4bit` takes it. It gets no gradient.
        bias: `[out_features]`, cast to x's dtype.

    Returns:
        `[..., out_features]` in x's dtype (autocast's, where it is on), with gradients for x and bias.

    Raises:
        TypeError, ValueError: an argument that does not fit the others. RuntimeError: differentiated twice.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear4bit.apply(x, bias, packed, absmax, code, blocksize, out_features, *(nested or ()))
    return torch.ops.peftcore.linear_4bit(x, packed, absmax, code, blocksize, out_features, bias, *(nested or ()))
