"""LoRA next to a frozen weight, forward and gradients, against float64."""

from __future__ import annotations

import torch

from card.checks import DTYPES, HALVES, LAYERS, ROW_FORMATS, SEED, SHAPES, check, frozen, repeated
from card.table import Place, cases
from peftcore.ops import lora_linear_per_sample
from peftcore.ops.dropout import factor as factor_of, keep_mask
from peftcore.ops.lora import LoraLinear

ROWS = (1, 2, 7, 8, 9, 16, 17, 64, 65, 512, 8192)
SCALE = 1.5
_OPS = torch.ops.peftcore


def small(rows: int, shape: str, rank: int, dtype: torch.dtype, factors: torch.dtype, kind: str, p: float) -> bool:
    if shape in LAYERS or rows > 65 or rank > 100:
        return False
    if kind in ROW_FORMATS:
        fixed = (shape, rank, p, factors) == ("lanes", 16, 0.0, torch.float32)
        return fixed and (rows, dtype) in ((2, HALVES[0]), (8, HALVES[1]), (17, HALVES[kind == "mxfp4"]))
    if shape in ("splits", "clusters"):
        return rows in (1, 17) and (rank, kind, p, factors, dtype) == (16, "nested", 0.0, torch.float32, torch.bfloat16)
    number = ROWS.index(rows) + rank + DTYPES.index(dtype) + 2 * DTYPES.index(factors) + (p > 0)
    return (kind != "dense") == (shape == "lanes") and number % 29 == 0 and shape != "pieces"


@cases(
    rows=ROWS,
    shape=SHAPES,
    rank=(1, 16, 100),
    dtype=DTYPES,
    factors=(torch.float32, torch.bfloat16),
    kind=("dense", "nested", *ROW_FORMATS),
    p=(0.0, 0.1),
    emulated=small,
    every=19,
)
def lora_linear(
    place: Place, rows: int, shape: str, rank: int, dtype: torch.dtype, factors: torch.dtype, kind: str, p: float
) -> str:
    """Compute y, S and the gradients of x, A and B."""
    out, width = SHAPES[shape]
    weight, dense = frozen(place, (out, width), kind, dtype)
    x, bias = place.normal(rows, width, seed=1, dtype=dtype), place.normal(out, seed=2, dtype=dtype)
    a = (place.normal(rank, width, seed=3) / width**0.5).to(factors)
    b, grad = place.normal(out, rank, seed=5, dtype=factors), place.normal(rows, out, seed=6, dtype=dtype)
    operands = ([weight], []) if kind == "dense" else weight.operands()
    dropout = (p, SEED if p else None)
    y, s = repeated(place, lambda: _OPS.lora_linear(x, *operands, bias, a, b, SCALE, *dropout), "forward pass")
    arguments = grad, x, s, *operands, a, b, [True] * 3, SCALE, *dropout
    dx, da, db = repeated(place, lambda: _OPS.lora_linear_backward(*arguments), "backward pass")

    mask = keep_mask(rows, width, p, SEED, place.device).double() if p else torch.ones((), device=place.device)
    c, kept, grad, bias, s64 = factor_of(SCALE, *dropout), x.double() * mask, grad.double(), bias.double(), s.double()
    left, right = a.double(), b.double()
    # cuBLAS adds its product to bias + s Bᵀ, rounded. Kernels that add both before they round take few rows of 4 bits.
    library = rows > 64 or kind == "dense" or width % 64 != 0 or dtype is torch.float32
    found = {
        "s": check(s, c * kept @ left.T, c * kept.abs() @ left.abs().T, what="s"),
        "y": check(
            y,
            x.double() @ dense.T + bias + s64 @ right.T,
            x.double().abs() @ dense.abs().T + bias.abs() + s64.abs() @ right.abs().T,
            (bias + s64 @ right.T) if library else None,
        ),
    }
    t, t_magnitude = c * grad @ right, c * grad.abs() @ right.abs()
    low_rank = (t @ left) * mask
    found["dx"] = check(
        dx, grad @ dense + low_rank, grad.abs() @ dense.abs() + t_magnitude @ left.abs() * mask, low_rank, "dx"
    )
    found["da"] = check(da, t.T @ kept, 2 * t_magnitude.T @ kept.abs(), what="da")
    found["db"] = check(db, grad.T @ s64, grad.abs().T @ s64.abs(), what="db")
    return ", ".join(f"{name} {worst}" for name, worst in found.items())


@cases(
    needs=((True, False, False), (False, True, False), (False, False, True)),
    rows=(40, 512),
    rank=(16, 64),
    dtype=DTYPES,
    emulated=lambda needs, rows, rank, dtype: rows == 40 and rank == 64 and dtype is torch.float16 and not needs[0],
)
def only_the_gradients_that_are_needed(
    place: Place, needs: tuple[bool, ...], rows: int, rank: int, dtype: torch.dtype
) -> None:
    out, width = SHAPES["lanes"]
    weight, _ = frozen(place, (out, width), "dense", dtype)
    x, grad = place.normal(rows, width, seed=1, dtype=dtype), place.normal(rows, out, seed=2, dtype=dtype)
    a, b = place.normal(rank, width, seed=3) / width**0.5, place.normal(out, rank, seed=5)
    _, s = _OPS.lora_linear(x, [weight], [], None, a, b, SCALE)
    whole = _OPS.lora_linear_backward(grad, x, s, [weight], [], a, b, [True] * 3, SCALE)
    found = _OPS.lora_linear_backward(grad, x, s, [weight], [], a, b, list(needs), SCALE)
    for needed, one, other in zip(needs, found, whole, strict=True):
        if needed:
            torch.testing.assert_close(one, other, rtol=2.0**-7, atol=2.0**-7 * float(other.abs().max()))
        else:
            assert one.shape == (0,), f"a gradient that is not needed has shape {list(one.shape)}"


@cases(
    rows=(1, 8, 20, 300),
    shape=("lanes", "odd", "square"),
    dtype=DTYPES,
    kind=("dense", "nested"),
    emulated=lambda rows, shape, dtype, kind: (
        rows in (1, 20) and shape == "lanes" and kind == "nested" and dtype is not DTYPES[1]
    ),
)
def an_adapter_for_each_sample(place: Place, rows: int, shape: str, dtype: torch.dtype, kind: str) -> str:
    out, width = SHAPES[shape]
    weight, dense = frozen(place, (out, width), kind, dtype)
    ranks, scales, index = [4, 100, 1], [1.0, 0.5, 2.0], [1, -1, 2, 0, 3]
    a = [(place.normal(r, width, seed=10 + r) / width**0.5).to(dtype) for r in ranks]
    b = [place.normal(out, r, seed=20 + r, dtype=dtype) for r in ranks]
    x, bias = place.normal(5, rows, width, seed=1, dtype=dtype), place.normal(out, seed=2, dtype=dtype)
    y = lora_linear_per_sample(x, weight, bias, a, b, scales, torch.tensor(index, device=place.device))
    assert y[4].isnan().all(), "the sample with an unknown adapter is not NaN"
    worst = []
    for sample, adapter in enumerate(index[:4]):
        wide = x[sample].double()
        base = wide @ dense.T + bias.double()
        magnitude = wide.abs() @ dense.abs().T + bias.double().abs()
        if adapter < 0:
            worst.append(check(y[sample], base, magnitude))
            continue
        left, right, scale = a[adapter].double(), b[adapter].double(), scales[adapter]
        change = scale * (wide @ left.T) @ right.T
        magnitude = magnitude + scale * (wide.abs() @ left.abs().T) @ right.abs().T
        worst.append(check(y[sample], base + change, magnitude, base))
    return f"y {max(worst)}"


@cases(
    rows=(1, 9),
    shape=("lanes", "square"),
    dtype=HALVES,
    emulated=lambda rows, shape, dtype: shape == "lanes" and (rows == 1) == (dtype is HALVES[1]),
)
def more_adapters_than_a_launch_takes(place: Place, rows: int, shape: str, dtype: torch.dtype) -> str:
    """Give each of 70 samples an adapter of its own, with factors in 16 bits."""
    (out, width), count, rank = SHAPES[shape], 70, 3
    weight, dense = frozen(place, (out, width), "nested", dtype)
    a = (place.normal(count, rank, width, seed=3) / width**0.5).to(dtype)
    b, x = place.normal(count, out, rank, seed=5, dtype=dtype), place.normal(count, rows, width, seed=1, dtype=dtype)
    index = torch.arange(count - 1, -1, -1, device=place.device)
    y = lora_linear_per_sample(x, weight, None, list(a), list(b), [SCALE] * count, index)
    wide, left, right = x.double(), a[index].double(), b[index].double()
    base, change = wide @ dense.T, SCALE * (wide @ left.mT) @ right.mT
    magnitude = wide.abs() @ dense.abs().T + SCALE * (wide.abs() @ left.abs().mT) @ right.abs().mT
    return f"y {check(y, base + change, magnitude, base)}"


@cases(dtype=HALVES, gigabytes=40)
def rows_of_more_than_2_to_the_31_elements(place: Place, dtype: torch.dtype) -> str:
    """The first and last rows of x have the results that they have alone, and dA and dB sum up all rows."""
    width, out, rank, rows = 4096, 64, 16, 2**31 // 4096 + 70
    weight, _ = frozen(place, (out, width), "nested", dtype)
    a, b = place.normal(rank, width, seed=3) / 64, place.normal(out, rank, seed=5)
    x = torch.zeros(rows, width, dtype=dtype, device=place.device)
    x[:100], x[-100:] = place.normal(100, width, seed=1), place.normal(100, width, seed=2)
    grad = torch.zeros(rows, out, dtype=dtype, device=place.device)
    grad[:100], grad[-100:] = place.normal(100, out, seed=6), place.normal(100, out, seed=7)
    edges = torch.cat([torch.arange(100), torch.arange(rows - 100, rows)]).to(place.device)
    y, s = _OPS.lora_linear(x, *weight.operands(), None, a, b, SCALE)
    dx, da, db = _OPS.lora_linear_backward(grad, x, s, *weight.operands(), a, b, [True] * 3, SCALE)
    wanted = LoraLinear(x[edges].double(), [weight.values(dtype).double()], [], None, a.double(), b.double(), SCALE)
    y64, s64 = wanted.compute()
    t64 = SCALE * grad[edges].double() @ b.double()
    near = {"rtol": 2.0**-6, "atol": 2.0**-6}
    torch.testing.assert_close(y[edges].double(), y64, **near)
    torch.testing.assert_close(s[edges].double(), s64, rtol=1e-3, atol=1e-3)
    dense = weight.values(dtype).double()
    torch.testing.assert_close(dx[edges].double(), grad[edges].double() @ dense + t64 @ a.double(), **near)
    torch.testing.assert_close(da.double(), t64.T @ x[edges].double(), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(db.double(), grad[edges].double().T @ s64, rtol=1e-3, atol=1e-2)
    assert not y[100:-100].any() and not dx[100:-100].any(), "rows that are 0 gave other values"
    return f"{x.numel():,} elements"
