"""4-bit blockwise quantization with a 16-entry codebook (NF4, FP4), and double quantization of its scales.

    a[b] = max |x[i]| over block b = i // blocksize of the flattened tensor
    q[i] = the codebook entry nearest to x[i] / a[b]; of two equally near ones the smaller value
    y[i] = round(code[q[i]] * a[b]): the product in fp32, rounded once to the output dtype

Two codes a byte, the even element in the high nibble; the unused nibble after an odd count holds the code of 0.

Double quantization stores the scales themselves in 8 bits, around their mean (`offset`):

    a[b] = nested_code[s[b]] * nested_absmax[b // nested_blocksize] + offset, each step rounded to fp32

Source: Dettmers et al., arXiv 2305.14314, section 3 and appendix E. The bits of codes, scales and values are those of
bitsandbytes 0.50 on CPU, so packed weights move either way unchanged: a full block is multiplied by the fp32
reciprocal of its scale, the partial block at the end is divided by it, scales below 1e-38 count as 1e-38.
Its 8-bit codes of scales come from a coarse table on CPU; here, as on its CUDA side, they are the nearest.

Non-finite input is not an error, so that a caller can look at many tensors with one synchronisation: a NaN makes
its block's scale NaN and the whole block dequantizes to NaN, an infinity makes the scale infinite. `absmax` is
finite exactly when the input was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftcore.ops._library import constants, define

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_BLOCKSIZE, MAX_BLOCKSIZE = 32, 4096
SMALLEST_SCALE = 1e-38


def _dynamic_map() -> Tensor:
    """The signed dynamic 8-bit map (Dettmers, arXiv 1511.04561): for every power of ten from 1e-6 to 1, the middles
    of 1, 2, 4, ... 64 equal parts of [0.1, 1], both signs; with 0 and 1 that is 256 values, sorted."""
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values


with constants():
    # The quantiles of a standard normal at 8 points evenly spaced below and 9 above one half, normalised to [-1, 1],
    # the two middle ones merged to an exact zero (arXiv 2305.14314, appendix E).
    NF4 = torch.tensor(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ]
    )
    # Sign, two bits of exponent, one of mantissa, in the order of their bit patterns, over the largest, 12.
    _FP4_MAGNITUDES = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12
    FP4 = torch.cat([_FP4_MAGNITUDES, 0.0 - _FP4_MAGNITUDES])
    DYNAMIC8 = _dynamic_map()

_CODEBOOKS = {"nf4": NF4, "fp4": FP4, "dynamic8": DYNAMIC8}


def codebook(name: str, device: torch.device | str = "cpu") -> Tensor:
    """The codebook `nf4` or `fp4` (fp32 `[16]`), or `dynamic8` (fp32 `[256]`, for scales), as a new tensor.

    Raises ValueError for another name.
    """
    if name not in _CODEBOOKS:
        raise ValueError(f"no codebook {name!r} (there are: {', '.join(_CODEBOOKS)})")
    return _CODEBOOKS[name].to(device=device, copy=True)


class NestedScales(NamedTuple):
    """What turns 8-bit scales back to fp32."""

    absmax: Tensor  # fp32 [ceil(blocks / blocksize)]
    code: Tensor  # fp32 [256], sorted
    offset: Tensor  # fp32 []
    blocksize: int = 256


# --- checks: the same conditions and exception types as csrc/nf4/arguments.h ---------------------------------------


def _value(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{op}: {message}")


def _check_dtype(dtype: torch.dtype, op: str) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{op}: only float32, float16 and bfloat16 are supported, found {dtype}")


def _check_blocksize(blocksize: int, op: str, name: str = "blocksize") -> None:
    fits = MIN_BLOCKSIZE <= blocksize <= MAX_BLOCKSIZE and blocksize & (blocksize - 1) == 0
    wanted = f"a power of two from {MIN_BLOCKSIZE} to {MAX_BLOCKSIZE}"
    _value(fits, op, f"{name} must be {wanted}, found {blocksize}")


def _check_tensor(t: Tensor, dtype: torch.dtype, device: torch.device, op: str, name: str) -> None:
    if t.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, found {t.dtype}")
    _value(t.device == device, op, f"{name} must be on {device}, found {t.device}")


def _check_numel(t: Tensor, wanted: int, op: str, name: str, why: str) -> None:
    found = f"found {t.numel()} of shape {list(t.shape)}"
    _value(t.numel() == wanted, op, f"{name} must hold {wanted} elements ({why}), {found}")


def _check_code(code: Tensor, entries: int, device: torch.device, op: str, name: str) -> None:
    _check_tensor(code, torch.float32, device, op, name)
    _check_numel(code, entries, op, name, "one value a code")


def _check_finite(code: Tensor, op: str, name: str) -> None:
    bad = (~code.isfinite()).flatten().nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{op}: {name}[{bad[0]}] must be finite, found {code.flatten()[bad[0]].item()}")


def _blocks(count: int, blocksize: int) -> int:
    return -(-count // blocksize)


def _check_quantize(x: Tensor, code: Tensor, blocksize: int) -> None:
    op = "quantize_4bit"
    _check_dtype(x.dtype, op)
    _check_blocksize(blocksize, op)
    _check_code(code, 16, x.device, op, "code")


def _check_absmax(absmax: Tensor, code: Tensor, blocksize: int) -> None:
    op = "quantize_absmax"
    _check_tensor(absmax, torch.float32, absmax.device, op, "absmax")
    _check_blocksize(blocksize, op)
    _check_code(code, 256, absmax.device, op, "code")


def _check_dequantize(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    nested_blocksize: int,
) -> None:
    op = "dequantize_4bit"
    _check_dtype(dtype, op)
    _check_blocksize(blocksize, op)
    for size in shape:
        _value(size >= 0, op, f"shape must not be negative, found {list(shape)}")
    count = math.prod(shape)
    device = packed.device
    _check_tensor(packed, torch.uint8, device, op, "packed")
    _check_numel(packed, (count + 1) // 2, op, "packed", "two values a byte")
    parts = {"nested_absmax": nested_absmax, "nested_code": nested_code, "nested_offset": nested_offset}
    missing = [name for name, part in parts.items() if part is None]
    found = ", ".join(f"no {name}" if name in missing else name for name in parts)
    _value(len(missing) in (0, 3), op, f"nested scales need {', '.join(parts)} together, found {found}")
    blocks = _blocks(count, blocksize)
    _check_tensor(absmax, torch.float32 if missing else torch.uint8, device, op, "absmax")
    _check_numel(absmax, blocks, op, "absmax", "one a block")
    _check_code(code, 16, device, op, "code")
    if nested_absmax is None or nested_code is None or nested_offset is None:
        return
    _check_blocksize(nested_blocksize, op, "nested_blocksize")
    _check_tensor(nested_absmax, torch.float32, device, op, "nested_absmax")
    _check_numel(nested_absmax, _blocks(blocks, nested_blocksize), op, "nested_absmax", "one a block of scales")
    _check_tensor(nested_offset, torch.float32, device, op, "nested_offset")
    _check_numel(nested_offset, 1, op, "nested_offset", "one for all scales")
    _check_code(nested_code, 256, device, op, "nested_code")


# --- references ------------------------------------------------------------------------------------------------------


def _scaled(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Flattened x over its blocks' scales, and the scales: a full block times the reciprocal, the rest divided."""
    flat = x.reshape(-1).float()
    full = flat.numel() // blocksize * blocksize
    blocks, rest = flat[:full].view(-1, blocksize), flat[full:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=SMALLEST_SCALE)).unsqueeze(1)).flatten()
    if rest.numel():
        last = rest.abs().amax().clamp(min=SMALLEST_SCALE)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, rest / last])
    return scaled, absmax


@torch.no_grad()
def _quantize_4bit(x: Tensor, code: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    _check_quantize(x, code, blocksize)
    code = code.reshape(16)
    _check_finite(code, "quantize_4bit", "code")
    values, order = code.sort(stable=True)
    scaled, absmax = _scaled(x, blocksize)
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    rank = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True)
    codes = order.to(torch.uint8)[rank]
    packed = codes[::2] << 4 | codes[1::2]
    return packed.unsqueeze(1), absmax


def _fake_quantize_4bit(x: Tensor, code: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    _check_quantize(x, code, blocksize)
    packed = x.new_empty(((x.numel() + 1) // 2, 1), dtype=torch.uint8)
    return packed, x.new_empty((_blocks(x.numel(), blocksize),), dtype=torch.float32)


@torch.no_grad()
def _quantize_absmax(absmax: Tensor, code: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    op = "quantize_absmax"
    _check_absmax(absmax, code, blocksize)
    code = code.reshape(256)
    _check_finite(code, op, "code")
    _value(bool((code[:-1] <= code[1:]).all()), op, "code must be sorted")
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    centred = absmax.reshape(-1) - offset
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % blocksize)).view(-1, blocksize)
    nested = padded.abs().amax(1)
    scaled = padded * (1 / nested.clamp(min=SMALLEST_SCALE)).unsqueeze(1)
    codes = torch.bucketize(scaled.flatten()[: centred.numel()], (code[:-1] + code[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8), nested, offset


def _fake_quantize_absmax(absmax: Tensor, code: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    _check_absmax(absmax, code, blocksize)
    codes = absmax.new_empty((absmax.numel(),), dtype=torch.uint8)
    return codes, absmax.new_empty((_blocks(absmax.numel(), blocksize),)), absmax.new_empty(())


@torch.no_grad()
def _dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_dequantize(packed, absmax, code, blocksize, shape, dtype, *nested)
    scales = absmax.reshape(-1)
    if nested_absmax is not None and nested_code is not None and nested_offset is not None:
        per_block = nested_absmax.reshape(-1).repeat_interleave(nested_blocksize)[: scales.numel()]
        scales = nested_code.reshape(-1)[scales.int()] * per_block + nested_offset.reshape(())
    count = math.prod(shape)
    bytes_ = packed.reshape(-1)
    values = code.reshape(16)[torch.stack([bytes_ >> 4, bytes_ & 15], 1).flatten()[:count].int()]
    return (values * scales.repeat_interleave(blocksize)[:count]).to(dtype).reshape(shape)


def _fake_dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_dequantize(packed, absmax, code, blocksize, shape, dtype, *nested)
    return packed.new_empty(shape, dtype=dtype)


def _check_out(packed: Tensor, out: Tensor) -> None:
    found = f"found {out.device}"
    _value(out.device == packed.device, "dequantize_4bit", f"out must be on {packed.device}, {found}")


def _dequantize_4bit_out(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
    *,
    out: Tensor,
) -> None:
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_out(packed, out)
    with torch.no_grad():
        out.copy_(_dequantize_4bit(packed, absmax, code, blocksize, out.shape, out.dtype, *nested))


def _fake_dequantize_4bit_out(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
    *,
    out: Tensor,
) -> None:
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_out(packed, out)
    _check_dequantize(packed, absmax, code, blocksize, out.shape, out.dtype, *nested)


# --- schemas ---------------------------------------------------------------------------------------------------------

_NESTED = "Tensor? nested_absmax=None, Tensor? nested_code=None, Tensor? nested_offset=None, int nested_blocksize=256"

define(
    "quantize_4bit(Tensor x, Tensor code, int blocksize=64) -> (Tensor packed, Tensor absmax)",
    _quantize_4bit,
    _fake_quantize_4bit,
)
define(
    "quantize_absmax(Tensor absmax, Tensor code, int blocksize=256) -> "
    "(Tensor quantized, Tensor nested_absmax, Tensor nested_offset)",
    _quantize_absmax,
    _fake_quantize_absmax,
)
define(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor code, int blocksize, SymInt[] shape, ScalarType dtype, "
    f"{_NESTED}) -> Tensor",
    _dequantize_4bit,
    _fake_dequantize_4bit,
)
define(
    f"dequantize_4bit.out(Tensor packed, Tensor absmax, Tensor code, int blocksize, {_NESTED}, *, "
    "Tensor(a!) out) -> ()",
    _dequantize_4bit_out,
    _fake_dequantize_4bit_out,
)


# --- what the rest of the package calls ------------------------------------------------------------------------------


def quantize_4bit(x: Tensor, code: Tensor = NF4, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize a tensor of any shape in blocks of its flattened elements.

    Args:
        x: fp32, fp16 or bf16; any strides.
        code: fp32 `[16]`, indexed by the 4-bit code; need not be sorted. On x's device.
        blocksize: a power of two from 32 to 4096.

    Returns:
        packed: uint8 `[ceil(n / 2), 1]`, as bitsandbytes keeps it.
        absmax: fp32 `[ceil(n / blocksize)]`. Finite exactly where the input was.

    Raises:
        TypeError: another dtype. ValueError: block size, codebook or device do not fit.
    """
    return torch.ops.peftcore.quantize_4bit(x, code, blocksize)


def quantize_absmax(absmax: Tensor, code: Tensor = DYNAMIC8, blocksize: int = 256) -> tuple[Tensor, NestedScales]:
    """Double quantization: fp32 scales to 8 bits around their mean.

    Args:
        absmax: fp32, `blocks` elements.
        code: fp32 `[256]`, sorted, on absmax's device.
        blocksize: scales that share a scale; a power of two from 32 to 4096.

    Returns:
        quantized: uint8 `[blocks]`, and what `dequantize_4bit` needs to read it.
    """
    quantized, nested_absmax, offset = torch.ops.peftcore.quantize_absmax(absmax, code, blocksize)
    return quantized, NestedScales(nested_absmax, code, offset, blocksize)


def dequantize_absmax(quantized: Tensor, nested: NestedScales) -> Tensor:
    """The fp32 scales `[blocks]` of a double-quantized tensor."""
    per_block = nested.absmax.reshape(-1).repeat_interleave(nested.blocksize)[: quantized.numel()]
    return nested.code[quantized.reshape(-1).int()] * per_block + nested.offset


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor = NF4,
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    blocksize: int = 64,
    nested: NestedScales | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Unpack to a new tensor of `shape` and `dtype`, or into `out` (which then gives both).

    Args:
        packed: uint8, ceil(n / 2) elements in any shape.
        absmax: fp32, or uint8 with `nested`; ceil(n / blocksize) elements.
        code: fp32 `[16]`.
        out: fp32, fp16 or bf16, any strides. Reusing one saves the page faults of fresh memory, which cost more
            than the unpacking.

    Raises:
        TypeError, ValueError: an argument that does not fit the others; the message has both values.
    """
    scales = () if nested is None else tuple(nested)
    if out is not None:
        for name, given, held in (("shape", shape, out.shape), ("dtype", dtype, out.dtype)):
            if given is not None and held != (torch.Size(given) if name == "shape" else given):
                raise ValueError(f"dequantize_4bit: out has {name} {held}, but {name}={given} was asked for")
        torch.ops.peftcore.dequantize_4bit.out(packed, absmax, code, blocksize, *scales, out=out)
        return out
    if shape is None or dtype is None:
        raise ValueError("dequantize_4bit: give shape and dtype, or out")
    return torch.ops.peftcore.dequantize_4bit(packed, absmax, code, blocksize, shape, dtype, *scales)
