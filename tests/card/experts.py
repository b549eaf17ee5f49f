"""Products with the weights of experts, with LoRA, against float64."""

from __future__ import annotations

import torch

from card.checks import DTYPES, ROW_FORMATS, SEED, check, frozen, repeated
from card.table import Place, cases, one_in
from peftcore import ops
from peftcore.ops.dropout import factor as factor_of, keep_mask

# Rows of each expert.
COUNTS = {
    "few": (3, 0, 17, 1),
    "one": (0, 70, 0),
    "many": (150, 129),
    "single": (33,),
    "sparse": (0, 2) * 80,
    "tokens": (1,) * 8 + (0,) * 120,
    "none": (0, 0),
    "long": (1000, 0, 3000, 1, 4191),
}
# [out, in] of an expert.
SIZES = {"lanes": (72, 128), "pieces": (64, 96), "odd": (96, 75), "model": (2816, 2048)}
KINDS = ("dense", "nf4", "nested", *ROW_FORMATS)
RANKS = (0, 3, 16, 70)
SCALE = 1.5
_OPS = torch.ops.peftcore


def small(counts: str, size: str, rank: int, dtype: torch.dtype, kind: str, transposed: bool, p: float) -> bool:
    if kind == "nvfp4":
        return (counts, rank, dtype, p) == ("few", 3, torch.half, 0.0) and size == ("pieces" if transposed else "lanes")
    if kind in ROW_FORMATS and SIZES[size][not transposed] % 32:
        return False
    if size == "model" or counts in ("long", "sparse", "many", "one"):
        return False
    return one_in(130, counts, size, rank, dtype, kind, transposed, p)


@cases(
    counts=COUNTS,
    size=SIZES,
    rank=RANKS,
    dtype=DTYPES,
    kind=KINDS,
    transposed=(False, True),
    p=(0.0, 0.1),
    emulated=small,
    every=13,
)
def grouped_linear(
    place: Place, counts: str, size: str, rank: int, dtype: torch.dtype, kind: str, transposed: bool, p: float
) -> str:
    """Compute y, S and the gradients of x, A and B; two rows belong to no expert."""
    (out, width), each = SIZES[size], COUNTS[counts]
    experts, rows = len(each), sum(each) + 2
    shape = (experts, width, out) if transposed else (experts, out, width)
    weight, dense = frozen(place, shape, kind, dtype, blocksize=64 if shape[1] * shape[2] % 64 == 0 else 32)
    dense = dense.mT if transposed else dense
    offsets = torch.tensor(each).cumsum(0).to(place.device, torch.int32)
    x, bias = place.normal(rows, width, seed=1, dtype=dtype), place.normal(experts, out, seed=2, dtype=dtype)
    grad = place.normal(rows, out, seed=6, dtype=dtype)
    a, b = place.normal(experts, rank, width, seed=3) / width**0.5, place.normal(experts, out, rank, seed=5)
    operands = ([weight], []) if kind == "dense" else weight.operands()
    dropout = (p, SEED) if p and rank else (0.0, None)
    factors = [a, b] if rank else []
    y, s = repeated(
        place,
        lambda: _OPS.grouped_linear(x, offsets, *operands, bias, factors, transposed, SCALE, *dropout),
        "forward pass",
    )
    needs = [True, bool(rank), bool(rank)]
    kept_factors = [a, b, s] if rank else []
    arguments = grad, x, offsets, *operands, kept_factors, transposed, needs, SCALE, *dropout
    dx, da, db = repeated(place, lambda: _OPS.grouped_linear_backward(*arguments), "backward pass")

    mask = keep_mask(rows, width, *dropout, place.device).double() if dropout[0] else torch.ones_like(x.double())
    c, worst, begin = factor_of(SCALE, *dropout), {}, 0
    for expert, count in enumerate(each):
        own = slice(begin, begin + count)
        begin += count
        w, left, right = dense[expert], a[expert].double(), b[expert].double()
        wide, keep, dy, added = x[own].double(), mask[own], grad[own].double(), bias[expert].double()
        kept = wide * keep
        thin = s[own].double() if rank else wide.new_zeros(count, 0)
        t, t_magnitude = c * dy @ right, c * dy.abs() @ right.abs()
        product = wide @ w.T
        # PyTorch's grouped product rounds x Wᵀ, and the reference rounds x Wᵀ + b.
        rounded = torch.maximum(product.abs(), (product + added).abs())
        limits = {
            "y": (y[own], product + added + thin @ right.T,
                  wide.abs() @ w.abs().T + added.abs() + thin.abs() @ right.abs().T, rounded),
            "dx": (dx[own], dy @ w + t @ left * keep, dy.abs() @ w.abs() + t_magnitude @ left.abs() * keep, dy @ w),
        }  # fmt: skip
        if rank:
            limits["s"] = (s[own], c * kept @ left.T, c * kept.abs() @ left.abs().T)
            limits["da"] = (da[expert], t.T @ kept, 2 * t_magnitude.T @ kept.abs())
            limits["db"] = (db[expert], dy.T @ thin, dy.abs().T @ thin.abs())
        for name, values in limits.items():
            worst[name] = max(worst.get(name, "0"), check(*values, what=f"{name} of expert {expert}"))
    assert not y[begin:].any() and not dx[begin:].any(), "rows without an expert are not zero"
    return ", ".join(f"{name} {value}" for name, value in sorted(worst.items()))


@cases(kind=("dense", "nested"), emulated=True)
def offsets_that_do_not_rise_give_nan(place: Place, kind: str) -> None:
    weight, _ = frozen(place, (3, 64, 128), kind, torch.half)
    operands = ([weight], []) if kind == "dense" else weight.operands()
    x, a, b = (
        place.normal(27, 128, seed=1, dtype=torch.half),
        place.normal(3, 4, 128, seed=2),
        place.normal(3, 64, 4, seed=3),
    )
    for ends in ((5, 4, 20), (-1, 5, 20), (5, 5, 2**30)):
        offsets = torch.tensor(ends, dtype=torch.int32, device=place.device)
        y, _ = _OPS.grouped_linear(x, offsets, *operands, None, [a, b])
        assert y.isnan().all(), f"offsets {ends} gave values that are not NaN"


@cases(dtype=(torch.bfloat16,), kind=("dense", "nested"), gigabytes=30)
def experts_of_more_than_2_to_the_31_elements(place: Place, dtype: torch.dtype, kind: str) -> str:
    experts, out, width = 260, 2048, 4096
    w = torch.zeros(experts, out, width, dtype=dtype, device=place.device)
    picked = [0, 127, 128, 255, 256, 259]
    w[picked] = place.normal(len(picked), out, width, seed=3, dtype=dtype)
    weight = w if kind == "dense" else ops.quantize_4bit(w)
    operands = ([w], []) if kind == "dense" else weight.operands()
    x = place.normal(2 * experts, width, seed=1, dtype=dtype)
    offsets = torch.arange(2, 2 * experts + 1, 2, dtype=torch.int32, device=place.device)
    y, _ = _OPS.grouped_linear(x, offsets, *operands, None, [])
    for expert in picked:
        matrix = w[expert] if kind == "dense" else ops.quantize_4bit(w[expert].contiguous()).values(dtype)
        wide, matrix = x[2 * expert : 2 * expert + 2].double(), matrix.double()
        check(y[2 * expert : 2 * expert + 2], wide @ matrix.T, wide.abs() @ matrix.abs().T, what=f"y of {expert}")
        y[2 * expert : 2 * expert + 2] = 0
    assert not y.any(), "experts that are 0 gave other values"
    return f"{w.numel():,} elements"
