"""Quantization to 4 bits and back: equal bits to those of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from card.checks import DTYPES, check, same
from card.table import Place, cases, one_in
from peftcore import ops
from peftcore.ops.quant4 import SMALLEST_SCALE, Quantize4bit, QuantizeAbsmax

BLOCKS = (32, 64, 256, 1024, 4096)
SMALL = (1, 33, 1000, 4166)


def values(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return `count` values, some of them 0, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator)
    x[torch.rand(count, generator=generator) < 0.05] = 0
    return x.to(dtype)


@cases(
    count=(*SMALL, 2**20 + 5, 1057 * 2048),
    blocksize=BLOCKS,
    dtype=DTYPES,
    code=("nf4", "fp4"),
    emulated=lambda count, blocksize, dtype, code: count in SMALL and (blocksize in (64, 1024)) == (code == "nf4"),
)
def quantize(place: Place, count: int, blocksize: int, dtype: torch.dtype, code: str) -> None:
    x, book = values(count, dtype, count), ops.codebook(code)
    wanted = Quantize4bit(x, book, blocksize).compute()
    for offset in (0, 1):  # on 16 bytes, and not
        memory = torch.zeros(count + offset, dtype=dtype, device=place.device)
        memory[offset:] = x.to(place.device)
        found = torch.ops.peftcore.quantize_4bit(memory[offset:], book.to(place.device), blocksize)
        same(found[0], wanted[0], f"codes at offset {offset}")
        same(found[1], wanted[1], f"absmax at offset {offset}")


@cases(emulated=True, blocksize=(64, 1024))
def quantize_values_that_are_not_finite(place: Place, blocksize: int) -> None:
    x = values(4166, torch.float32, 1)
    x[5], x[2050], x[-1] = torch.nan, torch.inf, -torch.inf
    found = torch.ops.peftcore.quantize_4bit(x.to(place.device), ops.NF4.to(place.device), blocksize)
    wanted = Quantize4bit(x, ops.NF4, blocksize).compute()
    same(found[0], wanted[0], "codes")
    same(found[1], wanted[1], "absmax")


@cases(
    count=(1, 257, 5000, 2**20 + 3),
    blocksize=(32, 256, 4096),
    emulated=lambda count, blocksize: count <= 5000,
)
def quantize_absmax(place: Place, count: int, blocksize: int) -> None:
    absmax = values(count, torch.float32, count).abs().to(place.device)
    codes, nested, offset = torch.ops.peftcore.quantize_absmax(absmax, ops.DYNAMIC8.to(place.device), blocksize)
    # The mean is PyTorch's, whose order of summation depends on the device: the rest is compared around the one found.
    torch.testing.assert_close(offset, absmax.double().mean().float(), rtol=1e-5, atol=0)
    centred = (absmax - offset).cpu()
    blocks = torch.nn.functional.pad(centred, (0, -count % blocksize)).view(-1, blocksize)
    wanted = blocks.abs().amax(1)
    scaled = (blocks * (1 / wanted.clamp(min=SMALLEST_SCALE)).unsqueeze(1)).flatten()[:count]
    same(nested, wanted, "nested absmax")
    same(codes, torch.bucketize(scaled, (ops.DYNAMIC8[:-1] + ops.DYNAMIC8[1:]) / 2).to(torch.uint8), "codes")


@cases(
    count=(*SMALL, 2**20 + 5),
    blocksize=BLOCKS,
    dtype=DTYPES,
    kind=("nf4", "fp4", "nested"),
    emulated=lambda count, blocksize, dtype, kind: count in SMALL and (blocksize in (64, 1024)) == (kind == "nested"),
)
def dequantize(place: Place, count: int, blocksize: int, dtype: torch.dtype, kind: str) -> None:
    x, code = values(count, torch.float32, count), "nf4" if kind == "nested" else kind
    codes, absmax = Quantize4bit(x, ops.codebook(code), blocksize).compute()
    weight = ops.PackedWeight(codes, absmax, ops.codebook(code), (count,), blocksize, x.dtype, code)
    if kind == "nested":
        scales = QuantizeAbsmax(absmax, ops.DYNAMIC8, 32).compute()
        weight = weight._replace(
            absmax=scales[0],
            nested_absmax=scales[1],
            nested_offset=scales[2],
            nested_quant_map=ops.DYNAMIC8,
            nested_blocksize=32,
        )
    wanted, there = weight.values(dtype), weight.to(place.device)
    same(ops.dequantize_4bit(there, dtype), wanted, "values")
    memory = torch.full((count + 5,), 7, dtype=dtype, device=place.device)
    ops.dequantize_4bit(there, out=memory[1 : count + 1])  # off 16 bytes
    same(memory[1 : count + 1], wanted, "values off 16 bytes")
    assert memory[0] == 7 and (memory[count + 1 :] == 7).all(), "memory around the result was written"


@cases(
    kind=("mxfp4", "nvfp4"),
    out=(5, 70, 1057),
    width=(32, 96, 320, 4096),
    dtype=DTYPES,
    emulated=lambda kind, out, width, dtype: out == 70 and width == 96,
)
def e2m1(place: Place, kind: str, out: int, width: int, dtype: torch.dtype) -> str:
    """Values have the bits of the CPU's, and products with few and many rows of x are near float64's."""
    w = values(out * width, torch.float32, width).view(out, width)
    quantize = ops.quantize_mxfp4 if kind == "mxfp4" else ops.quantize_nvfp4
    weight, there = quantize(w), quantize(w.to(place.device))
    same(there.codes, weight.codes, "codes")
    same(there.absmax, weight.absmax, "scales")
    same(there.scales(), weight.scales(), "scales of the whole")
    same(ops.dequantize_4bit(there, dtype), weight.values(dtype), "values")
    dense = weight.values(dtype).to(place.device).double()
    for rows in (1, 9, 40):
        x = place.normal(rows, width, seed=rows, dtype=dtype)
        found = check(ops.linear_4bit(x, there), x.double() @ dense.T, x.double().abs() @ dense.abs().T)
    return found


@cases(
    group=(32, 64, 128),
    scales=DTYPES,
    zeros=(None, torch.uint8, torch.float32),
    dtype=DTYPES,
    emulated=lambda group, scales, zeros, dtype: one_in(9, group, scales, zeros, dtype),
)
def affine4(place: Place, group: int, scales: torch.dtype, zeros: torch.dtype | None, dtype: torch.dtype) -> str:
    """Values have the bits of the CPU's, and products with few and many rows of x are near float64's."""
    out, width = (70, 384) if place.emulated else (1057, 4096)
    draw = torch.Generator().manual_seed(group)
    codes, of_groups = torch.randint(0, 16, (out, width), generator=draw), (out, width // group)
    scale = (torch.rand(of_groups, generator=draw) * 0.2 + 0.1).to(scales)
    points = None if zeros is None else (torch.rand(of_groups, generator=draw) * 16).to(zeros)
    weight = ops.affine4_weight(codes, scale, points, dtype=dtype)
    there, wanted = weight.to(place.device), weight.values(dtype)
    same(ops.dequantize_4bit(there), wanted, "values")
    dense = wanted.to(place.device).double()
    for rows in (1, 9, 40, 70):
        x = place.normal(rows, width, seed=rows, dtype=dtype)
        found = check(ops.linear_4bit(x, there), x.double() @ dense.T, x.double().abs() @ dense.abs().T)
    return found


@cases(gigabytes=16)
def more_than_2_to_the_31_elements(place: Place) -> str:
    """Values about the limits of 32-bit arithmetic have the codes and values that small tensors give."""
    columns, window = 32768, 4096
    count = 2**31 + 2 * columns + 33
    edges = [0, 2**28, 2**29, 2**30, 2**31, count]
    x = torch.zeros(count, dtype=torch.bfloat16, device=place.device)
    parts = [slice(max(0, edge - window), min(edge + window, count)) for edge in edges]
    for seed, part in enumerate(parts):
        x[part] = values(part.stop - part.start, torch.bfloat16, seed).to(place.device)
    small = [ops.quantize_4bit(x[part].clone()) for part in parts]
    whole = ops.quantize_4bit(x)
    del x
    out = ops.dequantize_4bit(whole)
    for part, own in zip(parts, small, strict=True):
        same(whole.codes[part.start // 2 : (part.stop + 1) // 2], own.codes, f"codes from {part.start}")
        same(out[part], ops.dequantize_4bit(own), f"values from {part.start}")
    nonzero = sum(int(ops.dequantize_4bit(own).count_nonzero()) for own in small)
    assert sum(int(piece.count_nonzero()) for piece in out.split(2**28)) == nonzero, "values were written elsewhere"
    return f"{count:,} elements"
