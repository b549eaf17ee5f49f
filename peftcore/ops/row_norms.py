"""Norms of the rows of W + scale · B A, without storing the whole sum; W is frozen, dense or in 4 bits.

The sum is computed in fp32 (float64 for float64 weights): kernels keep it in registers, and the reference computes a
few MB at a time.

The operator has no gradients: callers treat the norms as constants, or differentiate another formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftcore.ops._library import define_by
from peftcore.ops.calling import permute_inputs
from peftcore.ops.quant4 import dequantize_4bit
from peftcore.ops.weight import PackedWeight, check_dtype, require, weight_from_operands

_OPS = torch.ops.peftcore
_PIECE = 1 << 20  # number of values of W processed at a time


@dataclass
class RowNorms:
    weight: Sequence[Tensor]
    packing: Sequence[int]
    a: Tensor
    b: Tensor
    scale: float

    def __post_init__(self) -> None:
        op, device = "row_norms", self.weight[0].device
        self.frozen = frozen = weight_from_operands(self.weight, self.packing, op)
        self.dtype = torch.promote_types(self.weight[0].dtype, torch.float32)
        require(len(frozen.shape) == 2, op, f"weight must be [out, in], found {list(frozen.shape)}")
        if isinstance(frozen, Tensor) and frozen.dtype is not torch.float64:
            check_dtype(frozen.dtype, op)
        for name, t in (("a", self.a), ("b", self.b)):
            if not t.is_floating_point() or t.itemsize == 1:
                raise TypeError(f"{op}: {name} must be a 16-, 32- or 64-bit floating-point tensor, found {t.dtype}")
            require(t.device == device, op, f"{name} must be on {device} like weight, found {t.device}")
            require(t.dim() == 2, op, f"{name} must have two dimensions, found {list(t.shape)}")
        (out, width), r = frozen.shape, self.a.shape[0]
        require(self.a.shape[1] == width, op, f"a must be [r, {width}] for weight, found {list(self.a.shape)}")
        require(self.b.shape == (out, r), op, f"b must be [{out}, {r}], found {list(self.b.shape)}")

    def compute(self) -> Tensor:
        frozen, (out, width) = self.frozen, self.frozen.shape
        a, b = self.a.to(self.dtype), self.scale * self.b.to(self.dtype)
        norms = b.new_empty(out)
        multiple = 1 if isinstance(frozen, Tensor) else frozen.rows_that_begin_blocks()
        step = max(1, _PIECE // max(1, width * multiple)) * multiple
        for start in range(0, out, step):
            rows = slice(start, min(start + step, out))
            if isinstance(frozen, Tensor):
                w = frozen[rows].to(self.dtype)
            else:
                w = dequantize_4bit(frozen.rows(rows.start, rows.stop), self.dtype)
            torch.linalg.vector_norm(torch.addmm(w, b[rows], a), dim=1, out=norms[rows])
        return norms

    def empty(self) -> Tensor:
        return self.a.new_empty(self.frozen.shape[0], dtype=self.dtype)


define_by("row_norms(Tensor[] weight, SymInt[] packing, Tensor a, Tensor b, float scale) -> Tensor", RowNorms)


@torch.no_grad()
def row_norms(weight: Tensor | PackedWeight, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Return the norms of the rows of W + scale · B A.

    Args:
        weight: `[out, in]`, fp32, fp16, bf16 or float64, or a `PackedWeight`.
        a, b: `[r, in]` and `[out, r]` in 16-, 32- or 64-bit floating point.

    Returns:
        fp32 `[out]` (float64 for a float64 weight), without gradients.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes of the arguments do not match.
    """
    tensors, packing = ([weight], []) if isinstance(weight, Tensor) else weight.operands()
    return _OPS.row_norms(tensors, packing, permute_inputs(a, weight), b, scale)
