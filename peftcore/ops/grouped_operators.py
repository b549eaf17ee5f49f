"""A linear layer for each of E experts, over rows sorted by expert, with or without LoRA; W is frozen.

    rows of expert e      offsets[e - 1] <= i < offsets[e]                       c = scale / (1 - p)
    forward               S_i = c (keep ∘ x)_i A_eᵀ                              [rows, r]
                          y_i = (x_i W_eᵀ + bias_e) + S_i B_eᵀ
    backward              T_i = c dy_i B_e,  dx_i = dy_i W_e + keep ∘ (T_i A_e)
                          dA_e = T_eᵀ (keep ∘ x)_e,  dB_e = dy_eᵀ S_e

W is `[E, out, in]`, or `[E, in, out]` with `transposed`. It is dense, or in 4 bits with experts that are whole blocks.
Only experts that have rows are read. Rows after the last offset belong to no expert (transformers' expert parallelism
sorts rows of other processes there), and their y and dx are zero.

On CUDA, products of many rows use PyTorch's `_grouped_mm`, with W dequantized first. For bf16 on compute capability 9.0
and above it reads the offsets on the device; otherwise it waits for them, which fails during a graph capture. Offsets
that do not increase from 0 to the number of rows raise an error on CPU; on CUDA all results are NaN, or an assertion in
PyTorch's kernel fails. Otherwise everything is as in lora.py: S, T and the factors are fp32 for a 16-bit x, and the
gradient cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops._library import define_by
from peftcore.ops.dropout import apply_mask, check_dropout, factor
from peftcore.ops.lora import wide_dtype
from peftcore.ops.quant4 import dequantize_4bit
from peftcore.ops.weight import MIN_BLOCKSIZE, PackedWeight, check_dtype, check_like, require, weight_from_operands


def expert_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Return the expert of each row, int64 `[rows]`; E for rows without an expert."""
    places = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, places, right=True)


# --- checks: the same conditions, messages and exception types as csrc/grouped/arguments.h ---------------------------


def _check_rows(op: str, name: str, t: Tensor, columns: int, offsets: Tensor, experts: int) -> None:
    require(t.dim() == 2 and t.shape[1] == columns, op, f"{name} must be [rows, {columns}], found {list(t.shape)}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"{op}: offsets must be torch.int32, found {offsets.dtype}")
    require(offsets.device == t.device, op, f"offsets must be on {t.device} like {name}, found {offsets.device}")
    require(offsets.shape == (experts,), op, f"offsets must be [{experts}], found {list(offsets.shape)}")


def _check_weight(op: str, name: str, t: Tensor, weight: Tensor | PackedWeight) -> None:
    dense = isinstance(weight, Tensor)
    if not (dense and t.dtype is torch.float64):
        check_dtype(t.dtype, op)
    require(
        len(weight.shape) == 3, op, f"weight must have dimensions for experts, out and in, found {list(weight.shape)}"
    )
    if dense and weight.dtype != t.dtype:
        raise TypeError(f"{op}: weight must be {t.dtype} like {name}, found {weight.dtype}")
    device = weight.device if isinstance(weight, Tensor) else weight.codes.device
    require(device == t.device, op, f"weight must be on {t.device} like {name}, found {device}")
    if isinstance(weight, PackedWeight):
        values_per_expert = weight.shape[1] * weight.shape[2]
        requirement = f"an expert must be whole blocks of {weight.blocksize}, found {values_per_expert} values in each"
        require(values_per_expert % weight.blocksize == 0, op, requirement)


def _check_factors(op: str, x: Tensor, factors: Sequence[Tensor], sizes: tuple[int, int, int]) -> None:
    experts, out, width = sizes
    a, b = factors[:2]
    for name, t in (("a", a), ("b", b)):
        if not t.is_floating_point() or t.itemsize == 1:
            raise TypeError(f"{op}: {name} must be a 16-, 32- or 64-bit floating-point tensor, found {t.dtype}")
        require(t.device == x.device, op, f"{name} must be on {x.device} like x, found {t.device}")
        require(t.dim() == 3, op, f"{name} must have three dimensions, found {list(t.shape)}")
    r = a.shape[1]
    require(a.shape == (experts, r, width), op, f"a must be [{experts}, r, {width}], found {list(a.shape)}")
    require(b.shape == (experts, out, r), op, f"b must be [{experts}, {out}, {r}], found {list(b.shape)}")


# --- operators -------------------------------------------------------------------------------------------------------


class _Experts:
    """Base class of the forward and backward calls, with the weight and the rows of each expert."""

    offsets: Tensor
    frozen: Tensor | PackedWeight
    transposed: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return (experts, out, in)."""
        experts, out, width = self.frozen.shape
        return (experts, width, out) if self.transposed else (experts, out, width)

    def groups(self, rows: int) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has rows, and a slice of its rows."""
        begin = 0
        for expert, end in enumerate(self.offsets.tolist()):
            require(
                begin <= end <= rows, "grouped_linear", f"offsets must rise from 0 to {rows}, found {end} at {expert}"
            )
            if begin < end:
                yield expert, slice(begin, end)
            begin = end

    def matrices(self, dtype: torch.dtype) -> _Matrices:
        return _Matrices(self.frozen, self.transposed, dtype)


class _Matrices:
    """The matrices W_e `[out, in]`, dequantized on access."""

    def __init__(self, frozen: Tensor | PackedWeight, transposed: bool, dtype: torch.dtype) -> None:
        self.frozen, self.transposed, self.dtype = frozen, transposed, dtype
        if isinstance(frozen, PackedWeight) and frozen.double_quant:
            # An expert may begin within a block of nested scales, so they are decoded for all experts.
            plain = frozen._replace(nested_absmax=None, nested_quant_map=None, nested_offset=None)
            self.frozen = plain._replace(absmax=frozen.scales())

    def __getitem__(self, expert: int) -> Tensor:
        matrix = self._dense(self.frozen, expert)
        return matrix.T if self.transposed else matrix

    def _dense(self, frozen: Tensor | PackedWeight, expert: int) -> Tensor:
        if isinstance(frozen, Tensor):
            return frozen[expert]
        packed = frozen.expert(expert)
        if packed.blocksize < MIN_BLOCKSIZE:  # operators accept blocks this small only with nested scales
            return packed.values(self.dtype)[0]
        return dequantize_4bit(packed, self.dtype)[0]


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty tensor on the device of `like`. It is strided even if `like` is not."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


@dataclass
class GroupedLinear(_Experts):
    x: Tensor
    offsets: Tensor
    weight: Sequence[Tensor]
    packing: Sequence[int]
    bias: Tensor | None
    factors: Sequence[Tensor]
    transposed: bool = False
    scale: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def __post_init__(self) -> None:
        op, self.frozen = "grouped_linear", weight_from_operands(self.weight, self.packing, "grouped_linear")
        _check_weight(op, "x", self.x, self.frozen)
        experts, out, width = self.sizes
        _check_rows(op, "x", self.x, width, self.offsets, experts)
        if self.bias is not None:
            found_shape = f"found {list(self.bias.shape)}"
            require(self.bias.shape == (experts, out), op, f"bias must be [{experts}, {out}], {found_shape}")
            check_like(self.bias, self.x, op, "bias")
        require(len(self.factors) in (0, 2), op, f"factors must be [a, b] or [], found {len(self.factors)}")
        if self.factors:
            _check_factors(op, self.x, self.factors, self.sizes)
        check_dropout(op, self.x, self.dropout_p, self.seed)

    def compute(self) -> tuple[Tensor, Tensor]:
        x, dtype, drop = self.x, wide_dtype(self.x), (self.dropout_p, self.seed)
        matrices = self.matrices(x.dtype)
        y, s = (t.zero_() for t in self.empty())
        kept = apply_mask(x, *drop) if self.factors else x
        for expert, rows in self.groups(len(x)):
            y[rows] = F.linear(x[rows], matrices[expert], None if self.bias is None else self.bias[expert])
            if self.factors:
                a, b = (t[expert].to(dtype) for t in self.factors)
                s[rows] = kept[rows].to(dtype) @ a.T * factor(self.scale, *drop)
                y[rows] = (y[rows] + s[rows] @ b.T).to(x.dtype)
        return y, s

    def empty(self) -> tuple[Tensor, Tensor]:
        r = self.factors[0].shape[1] if self.factors else 0
        return _empty(self.x, (len(self.x), self.sizes[1])), _empty(self.x, (len(self.x), r), wide_dtype(self.x))


@dataclass
class GroupedLinearBackward(_Experts):
    grad: Tensor
    x: Tensor | None
    offsets: Tensor
    weight: Sequence[Tensor]
    packing: Sequence[int]
    factors: Sequence[Tensor]  # a, b, and s from the forward pass
    transposed: bool
    needs: Sequence[bool]
    scale: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def __post_init__(self) -> None:
        op, self.frozen = (
            "grouped_linear_backward",
            weight_from_operands(self.weight, self.packing, "grouped_linear_backward"),
        )
        _check_weight(op, "grad", self.grad, self.frozen)
        experts, out, width = self.sizes
        _check_rows(op, "grad", self.grad, out, self.offsets, experts)
        require(len(self.factors) in (0, 3), op, f"factors must be [a, b, s] or [], found {len(self.factors)}")
        rows, x = len(self.grad), self.x
        if not self.factors:
            require(self.seed is None, op, "seed is of no use without factors")
            return
        if x is None:
            raise TypeError(f"{op}: x must be a tensor if there are factors, found None")
        require(x.shape == (rows, width), op, f"x must be [{rows}, {width}], found {list(x.shape)}")
        check_like(x, self.grad, op, "x")
        _check_factors(op, x, self.factors, self.sizes)
        s, r = self.factors[2], self.factors[0].shape[1]
        if s.dtype != wide_dtype(x):
            raise TypeError(f"{op}: s must be {wide_dtype(x)} for x of {x.dtype}, found {s.dtype}")
        require(s.device == x.device, op, f"s must be on {x.device} like x, found {s.device}")
        require(s.shape == (rows, r), op, f"s must be [{rows}, {r}], found {list(s.shape)}")
        check_dropout(op, x, self.dropout_p, self.seed)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        grad, dtype, drop = self.grad, wide_dtype(self.grad), (self.dropout_p, self.seed)
        dx, da, db = (t.zero_() for t in self.empty())
        matrices = self.matrices(grad.dtype)
        mask: Tensor | None = None
        if self.seed is not None and self.dropout_p and self.x is not None:
            mask = apply_mask(torch.ones_like(self.x), *drop) != 0

        def kept(t: Tensor, rows: slice) -> Tensor:
            return t if mask is None else t.where(mask[rows], 0)

        for expert, rows in self.groups(len(grad)):
            if self.needs[0]:
                dx[rows] = grad[rows] @ matrices[expert]
            if not self.factors or self.x is None:
                continue
            a, b, s = self.factors[0][expert].to(dtype), self.factors[1][expert].to(dtype), self.factors[2][rows]
            wide_grad, x = grad[rows].to(dtype), self.x[rows].to(dtype)
            t = wide_grad @ b * factor(self.scale, *drop)
            if self.needs[0]:
                dx[rows] = (dx[rows] + kept(t @ a, rows)).to(grad.dtype)
            if self.needs[1]:
                da[expert] = (t.T @ kept(x, rows)).to(da.dtype)
            if self.needs[2]:
                db[expert] = (wide_grad.T @ s).to(db.dtype)
        return dx, da, db

    def empty(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, width = len(self.grad), self.sizes[2]
        dx = _empty(self.grad, (rows, width) if self.needs[0] else (0,))
        factors = self.factors[:2] if self.factors else [dx.new_empty(0)] * 2
        shapes = [t.shape if needs_grad else (0,) for t, needs_grad in zip(factors, self.needs[1:], strict=True)]
        da, db = (_empty(dx, shape, t.dtype) for shape, t in zip(shapes, factors, strict=True))
        return dx, da, db


_NUMBERS = "float scale=1.0, float dropout_p=0.0, Tensor? seed=None"

define_by(
    "grouped_linear(Tensor x, Tensor offsets, Tensor[] weight, SymInt[] packing, Tensor? bias, Tensor[] factors, "
    f"bool transposed=False, {_NUMBERS}) -> (Tensor y, Tensor s)",
    GroupedLinear,
)
define_by(
    "grouped_linear_backward(Tensor grad, Tensor? x, Tensor offsets, Tensor[] weight, SymInt[] packing, "
    f"Tensor[] factors, bool transposed, bool[3] needs, {_NUMBERS}) -> (Tensor dx, Tensor da, Tensor db)",
    GroupedLinearBackward,
)
