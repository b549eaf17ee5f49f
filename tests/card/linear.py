"""Products with a frozen weight in 4 bits, against float64."""

from __future__ import annotations

import torch

from card.checks import DTYPES, HALVES, LAYERS, ROW_FORMATS, SHAPES, check, frozen, repeated, same
from card.table import Place, cases
from peftcore import ops

ROWS = (1, 2, 4, 7, 8, 9, 16, 17, 24, 32, 33, 64, 65, 512, 8192)
KINDS = ("nf4", "fp4", "nested", *ROW_FORMATS)


def small(rows: int, shape: str, dtype: torch.dtype, kind: str) -> bool:
    """Return whether the emulator runs the case: each kernel with one kind of scales, in a second or two."""
    if shape in LAYERS or rows > 65:
        return False
    if kind in ROW_FORMATS:
        return shape == "lanes" and rows in ((4, 33) if kind == "mxfp4" else (7, 17)) and dtype in HALVES
    if shape in ("splits", "clusters"):
        return rows == {"splits": 17, "clusters": 16}[shape] and dtype is torch.bfloat16 and kind == "nested"
    return (kind == "nested") == (dtype is torch.bfloat16) and kind != "fp4" and (dtype in HALVES or rows in (1, 9))


@cases(rows=ROWS, shape=SHAPES, dtype=DTYPES, kind=KINDS, emulated=small)
def linear_4bit(place: Place, rows: int, shape: str, dtype: torch.dtype, kind: str) -> str:
    """Compute y = x Wᵀ + bias."""
    out, width = SHAPES[shape]
    weight, dense = frozen(place, (out, width), kind, dtype)
    x, bias = place.normal(rows, width, seed=1, dtype=dtype), place.normal(out, seed=2, dtype=dtype)
    (y,) = repeated(place, lambda: (ops.linear_4bit(x, weight, bias),), "call")
    wide = x.double()
    return check(y, wide @ dense.T + bias.double(), wide.abs() @ dense.abs().T + bias.double().abs())


@cases(
    rows=(1, 9, 65, 512),
    shape=("lanes", "odd", "square"),
    dtype=DTYPES,
    kind=KINDS,
    emulated=lambda rows, shape, dtype, kind: shape == "lanes" and rows == 9 and kind == "nested",
)
def linear_4bit_backward(place: Place, rows: int, shape: str, dtype: torch.dtype, kind: str) -> str:
    """Compute dx = dy W."""
    out, width = SHAPES[shape]
    weight, dense = frozen(place, (out, width), kind, dtype)
    grad = place.normal(rows, out, seed=1, dtype=dtype)
    dx = torch.ops.peftcore.linear_4bit_backward(grad, *weight.operands())
    return check(dx, grad.double() @ dense, grad.double().abs() @ dense.abs(), what="dx")


@cases(rows=(1, 5, 8, 9, 16, 17, 40), dtype=HALVES, emulated=lambda rows, dtype: rows in (5, 17) and dtype is HALVES[0])
def x_off_its_alignment(place: Place, rows: int, dtype: torch.dtype) -> str:
    out, width = SHAPES["lanes"]
    weight, dense = frozen(place, (out, width), "nested", dtype)
    memory = place.normal(rows * width + 1, seed=1, dtype=dtype)
    x = memory[1:].view(rows, width)
    return check(ops.linear_4bit(x, weight), x.double() @ dense.T, x.double().abs() @ dense.abs().T)


@cases(
    rows=(3, 8, 16, 20, 50),
    dtype=HALVES,
    kind=KINDS,
    emulated=lambda rows, dtype, kind: rows in (3, 20) and dtype is HALVES[1] and kind == "nested",
)
def columns_have_the_bits_of_dequantization(place: Place, rows: int, dtype: torch.dtype, kind: str) -> None:
    out, width = SHAPES["lanes"]
    weight, dense = frozen(place, (out, width), kind, dtype)
    columns = torch.arange(rows, device=place.device) * 13 % width
    x = torch.nn.functional.one_hot(columns, width).to(dtype)
    wanted = dense[:, columns].T.to(dtype) + 0  # the other columns' zeros turn -0 into 0
    same(ops.linear_4bit(x, weight), wanted, "columns")


@cases(rows=(1, 5, 18), emulated=lambda rows: rows == 5)
def infinity_stays_in_its_column(place: Place, rows: int) -> None:
    """What is read beyond the end of a row of W counts for nothing."""
    weight, dense = frozen(place, (9, 320), "nested", torch.bfloat16)
    x = place.normal(rows, 320, seed=1, dtype=torch.bfloat16)
    x[:, -1] = torch.inf
    wanted = (dense[:, -1] * torch.inf).expand(rows, -1).to(torch.bfloat16)  # NaN where a weight is 0
    same(ops.linear_4bit(x, weight), wanted, "y")


@cases(rows=(1, 16, 64), gigabytes=30)
def weight_of_more_than_2_to_the_31_elements(place: Place, rows: int) -> str:
    columns, out = 32768, 2**31 // 32768 + 130
    w = torch.zeros(out, columns, dtype=torch.bfloat16, device=place.device)
    picked = torch.tensor([0, 2**28 // columns, 2**30 // columns, 2**31 // columns, out - 1], device=place.device)
    w[picked] = place.normal(len(picked), columns, seed=3, dtype=torch.bfloat16)
    weight = ops.quantize_4bit(w, double_quant=False)
    del w
    dense = torch.cat([weight.rows(row, row + 1).values(torch.bfloat16) for row in picked.tolist()]).double()
    x = place.normal(rows, columns, seed=1, dtype=torch.bfloat16)
    y, wide = ops.linear_4bit(x, weight), x.double()
    assert int(y.count_nonzero()) <= rows * len(picked), "rows of W that are 0 gave other values"
    return check(y[:, picked], wide @ dense.T, wide.abs() @ dense.abs().T)


@cases(emulated=True, gigabytes=1, ends_process=True)  # no other stream of the process gets counters afterwards
def launches_without_counters(place: Place) -> None:
    """Another launch adds the sums of several blocks where a stream has no counters left, with equal bits."""
    from card.streams import without_counters

    out, width = (40, 1600) if place.emulated else SHAPES["square"]
    weight, _ = frozen(place, (out, width), "nested", torch.bfloat16)
    x = place.normal(17, width, seed=1, dtype=torch.bfloat16)
    a, b = place.normal(16, width, seed=2), place.normal(out, 16, seed=3)

    def run() -> list[torch.Tensor]:
        y, s = torch.ops.peftcore.lora_linear(x, *weight.operands(), None, a, b, 1.5)
        gradients = torch.ops.peftcore.lora_linear_backward(y, x, s, *weight.operands(), a, b, [True] * 3, 1.5)
        few = torch.ops.peftcore.lora_linear(x[:2], *weight.operands(), None, a, b, 1.5)
        return [y, s, *gradients, *few]

    wanted = run()
    with without_counters(place):
        found = run()
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        same(one, other, f"result {index}")
