"""Bounds that cases hold results to, and weights with their values in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from card.table import Place, Skip
from peftcore import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = DTYPES[1:]
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUMS = 2.0**-18  # how far fp32 sums may be off, of the sum of their terms' magnitudes, on CPUs and GPUs
SEED = torch.tensor(0x123456789ABCDEF)  # of dropout

# Sizes of a weight [out, in], by what they mean for the kernels: rows that are whole blocks of 64 columns, few or
# enough for several blocks of threads; whole pieces of 32 columns; neither; and layers of models.
SHAPES = {
    "lanes": (72, 320),
    "splits": (150, 1600),
    "clusters": (131, 1024),
    "pieces": (37, 96),
    "odd": (37, 75),
    "square": (4096, 4096),
    "mlp": (11008, 4096),
    "deep": (4096, 14336),
}
LAYERS = ("square", "mlp", "deep")  # too large for the emulator


ROW_FORMATS = ("mxfp4", "nvfp4", "affine4")  # whose blocks do not cross rows


class Frozen(NamedTuple):
    """A frozen weight and the values that it stands for, in float64."""

    weight: Tensor | ops.PackedWeight
    dense: Tensor


def frozen(place: Place, shape: tuple[int, ...], kind: str, dtype: torch.dtype, blocksize: int = 64) -> Frozen:
    """Return a weight of a kind: `dense`, `nf4`, `fp4`, `nested` (NF4 with scales in 8 bits), or one of `ROW_FORMATS`.

    Packed values are rounded to `dtype`, as the kernels round them.

    Raises:
        Skip: rows of the shape are not whole blocks of the format.
    """
    w = place.normal(*shape, seed=4)
    if kind == "dense":
        return Frozen(w.to(dtype), w.to(dtype).double())
    if kind in ROW_FORMATS:
        if shape[-1] % 32:
            raise Skip(f"rows of {shape[-1]} columns are not whole blocks of {kind}")
        if kind == "nvfp4" and len(shape) > 2 and shape[-2] * shape[-1] % 512:
            raise Skip(f"experts of {shape[-2]} x {shape[-1]} values are not whole blocks of nvfp4's scales")
        group = blocksize if shape[-1] % blocksize == 0 else 32
        quantize = {"mxfp4": ops.quantize_mxfp4, "nvfp4": ops.quantize_nvfp4}.get(kind)
        packed = quantize(w) if quantize else ops.quantize_affine4(w, group)
        return Frozen(packed, packed.values(dtype).double())
    code, nested = ("nf4", True) if kind == "nested" else (kind, False)
    packed = ops.quantize_4bit(w, code, blocksize=blocksize, double_quant=nested, nested_blocksize=32)
    return Frozen(packed, packed.values(dtype).double())


def limit_of(dtype: torch.dtype, wanted: Tensor, magnitude: Tensor) -> Tensor:
    """Return how far a product may be off: fp32 sums in another order, and one rounding of the result.

    Args:
        magnitude: the sum of the terms' magnitudes.
    """
    return magnitude * SUMS + wanted.abs() * EPS[dtype] + 2.0**-24


def check(found: Tensor, wanted: Tensor, magnitude: Tensor, between: Tensor | None = None, what: str = "y") -> str:
    """Check a product against float64; return the largest error as a fraction of its limit.

    `between`: magnitudes that are rounded to the result's dtype on the way, too.
    """
    assert found.shape == wanted.shape, f"{what} has shape {list(found.shape)}, expected {list(wanted.shape)}"
    limit = limit_of(found.dtype, wanted, magnitude)
    if between is not None:
        limit = limit + between.abs() * EPS[found.dtype]
    if not found.numel():
        return "0"
    of_limit = ((found.double() - wanted).abs() / limit).nan_to_num(nan=torch.inf)
    worst = float(of_limit.max())
    if worst > 1:
        place = of_limit.flatten().argmax().item()
        ours, theirs = found.flatten()[place].item(), wanted.flatten()[place].item()
        wrong = int((of_limit > 1).sum())
        raise AssertionError(
            f"{what}: {wrong} of {found.numel()} values are off by more than the limit, by up to {worst:.3g} times; "
            f"element {place} is {ours:.9g}, expected {theirs:.9g}"
        )
    return f"{worst:.2f}"


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def same(found: Tensor, wanted: Tensor, what: str) -> None:
    """Check for equal bits; NaN equals any NaN."""
    assert found.shape == wanted.shape, f"{what} has shape {list(found.shape)}, expected {list(wanted.shape)}"
    found, wanted = found.cpu(), wanted.cpu()
    different = bits(found) != bits(wanted)
    if found.is_floating_point():
        different &= ~(found.isnan() & wanted.isnan())
    if different.any():
        place = int(different.flatten().nonzero()[0])
        ours, theirs = found.flatten()[place].item(), wanted.flatten()[place].item()
        raise AssertionError(
            f"{what}: {int(different.sum())} of {found.numel()} values have other bits, first element {place}: "
            f"{ours!r}, expected {theirs!r}"
        )


def repeated(place: Place, run: Callable[[], tuple[Tensor, ...]], what: str) -> tuple[Tensor, ...]:
    """Return the results of a call, which must have the same bits when it is run again; the emulator runs it once."""
    first = run()
    again = first if place.emulated else run()
    for index, (one, other) in enumerate(zip(first, again, strict=True)):
        same(one, other, f"result {index} of a second {what}")
    return first
