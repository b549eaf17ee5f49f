"""row_norms beside float64 at every SIMD level, dense and in 4 bits, and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore import ops

_OP = torch.ops.peftcore.row_norms


def factors(rows: int, columns: int, r: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(r, columns, generator=generator), torch.randn(rows, r, generator=generator)
    return (a / 8).to(dtype), (b / 8).to(dtype)


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def exact(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return (w.double() + scale * b.double() @ a.double()).norm(dim=1)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 5, 3), (64, 128, 16), (33, 4097, 8), (300, 4096, 1), (1, 1, 1)], ids=str)
def test_beside_float64(level: None, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, r = shape
    w, (a, b) = weight(rows, columns, dtype), factors(rows, columns, r)
    found = ops.row_norms(w, a, b, 0.7)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and not found.requires_grad
    torch.testing.assert_close(found.double(), exact(w, a, b, 0.7), rtol=1e-6, atol=0)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(24, 64), (700, 2048), (5, 33), (40, 96)], ids=str)
def test_in_four_bits(shape: tuple[int, int], double_quant: bool) -> None:
    packed = ops.quantize_4bit(weight(*shape), double_quant=double_quant)
    a, b = factors(*shape, 4)
    wanted = exact(ops.dequantize_4bit(packed), a, b, 2.0)
    torch.testing.assert_close(ops.row_norms(packed, a, b, 2.0).double(), wanted, rtol=1e-6, atol=0)


def test_where_the_change_takes_the_weight_away() -> None:
    a, b = factors(32, 64, 8)
    w = weight(32, 64) * torch.logspace(-7, 0, 32)[:, None] - b @ a
    torch.testing.assert_close(ops.row_norms(w, a, b).double(), exact(w, a, b, 1.0), rtol=1e-5, atol=1e-7)


def test_of_a_transposed_weight_and_16_bit_factors() -> None:
    w, (a, b) = weight(40, 30).T, factors(30, 40, 4, torch.bfloat16)
    torch.testing.assert_close(ops.row_norms(w, a, b).double(), exact(w, a, b, 1.0), rtol=1e-6, atol=0)


def test_rows_past_a_panel_of_4_bits() -> None:
    """Of rows that begin within blocks of values, and blocks of scales; and of a transposed weight in pieces."""
    w, (a, b) = weight(1100, 1000), factors(1100, 1000, 2)
    packed = ops.quantize_4bit(w, double_quant=True)
    wanted = exact(ops.dequantize_4bit(packed), a, b, 1.0)
    torch.testing.assert_close(ops.row_norms(packed, a, b).double(), wanted, rtol=1e-6, atol=0)
    turned = w.T.contiguous().T
    torch.testing.assert_close(ops.row_norms(turned, a, b).double(), exact(w, a, b, 1.0), rtol=1e-6, atol=0)


def test_of_nothing() -> None:
    assert ops.row_norms(torch.empty(0, 4), torch.empty(2, 4), torch.empty(0, 2)).shape == (0,)
    assert (ops.row_norms(torch.empty(3, 0), torch.empty(2, 0), torch.ones(3, 2)) == 0).all()
    without_columns = ops.quantize_4bit(torch.empty(3, 0))
    assert (ops.row_norms(without_columns, torch.empty(2, 0), torch.ones(3, 2)) == 0).all()
    w = weight(3, 4)
    torch.testing.assert_close(ops.row_norms(w, torch.empty(0, 4), torch.empty(3, 0)), w.norm(dim=1))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool) -> None:
    w, (a, b) = weight(8, 64), factors(8, 64, 2)
    tensors, packing = ops.quantize_4bit(w).operands() if packed else ([w], [])
    torch.library.opcheck(_OP, (tensors, packing, a, b, 0.5))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": torch.zeros(2, 5)}, ValueError, r"a must be \[r, 4\] for weight, found \[2, 5\]"),
        ({"b": torch.zeros(2, 3)}, ValueError, r"b must be \[3, 2\], found \[2, 3\]"),
        (
            {"b": torch.zeros(3, 2, dtype=torch.int64)},
            TypeError,
            "b must be a 16-, 32- or 64-bit floating-point tensor",
        ),
        ({"a": torch.zeros(8)}, ValueError, r"a must have two dimensions, found \[8\]"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must be \[out, in\], found \[3\]"),
        ({"weight": torch.zeros(3, 4, dtype=torch.int8)}, TypeError, "only float32, float16 and bfloat16"),
        ({"a": torch.zeros(2, 4, device="meta")}, ValueError, "a must be on cpu like weight, found meta"),
    ],
    ids=str,
)
def test_checks(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"weight": torch.zeros(3, 4), "a": torch.zeros(2, 4), "b": torch.zeros(3, 2), **changes}
    with pytest.raises(error, match=f"row_norms: {message}"):
        ops.row_norms(**arguments)
