"""4-bit blockwise quantization with a 16-entry codebook (NF4, FP4), and double quantization of its scales.

    a[b] = max |x[i]| over block b = i // blocksize of the flattened tensor
    q[i] = the entry of quant_map nearest to x[i] / a[b]; of two equally near ones the smaller value
    y[i] = round(quant_map[q[i]] * a[b]): the product in fp32, rounded once to the output dtype

A byte holds two codes, the even element in the high nibble. After an odd count, the unused nibble has the code of 0.

Double quantization stores the scales themselves in 8 bits, around their mean (`nested_offset`):

    a[b] = nested_quant_map[s[b]] * nested_absmax[b // nested_blocksize] + nested_offset, each step rounded to fp32

Source: Dettmers et al., arXiv 2305.14314, section 3 and appendix E. 4-bit codes, fp32 scales and dequantized values
equal those of bitsandbytes 0.50 on CPU bit for bit, so packed weights can be exchanged: a full block is multiplied by
the fp32 reciprocal of its scale, the partial block at the end is divided by it, and scales below 1e-38 count as 1e-38.
The 8-bit codes of scales are the nearest, as in bitsandbytes' CUDA kernels. On CPU bitsandbytes looks them up in a
table of 65,536 entries, which misses the nearest code for about 2 of 1,000 scales, by at most 3e-5 of `nested_absmax`.
Its `nested_absmax` and `nested_offset` are the same.

Non-finite input raises no error, so that a caller can check many tensors with one synchronization. A NaN makes the
scale of its block NaN, and the whole block dequantizes to NaN; an infinity makes the scale infinite. `absmax` is finite
if and only if the input is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftcore.ops._library import define_by
from peftcore.ops.codebooks import codebook
from peftcore.ops.weight import (
    PackedWeight,
    check_blocksize,
    check_dtype,
    check_quant_map,
    check_tensor,
    packed_weight_from_operands,
    require,
)

SMALLEST_SCALE = 1e-38
_OPS = torch.ops.peftcore


def _check_finite(quant_map: Tensor, op: str) -> None:
    bad_entries = (~quant_map.isfinite()).flatten().nonzero().flatten().tolist()
    if bad_entries:
        index = bad_entries[0]
        raise ValueError(f"{op}: quant_map[{index}] must be finite, found {quant_map.flatten()[index].item()}")


def _blocks(count: int, blocksize: int) -> int:
    return -(-count // blocksize)


def _normalize_blocks(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Divide the flattened values of x by the scales of their blocks. Return the result and the scales, both fp32."""
    flat = x.reshape(-1).float()
    full = flat.numel() // blocksize * blocksize
    blocks, tail = flat[:full].view(-1, blocksize), flat[full:]
    absmax = blocks.abs().amax(1)
    normalized = (blocks * (1 / absmax.clamp(min=SMALLEST_SCALE)).unsqueeze(1)).flatten()
    if tail.numel():
        tail_scale = tail.abs().amax().clamp(min=SMALLEST_SCALE)
        absmax = torch.cat([absmax, tail_scale.unsqueeze(0)])
        normalized = torch.cat([normalized, tail / tail_scale])
    return normalized, absmax


@dataclass
class Quantize4bit:
    x: Tensor
    quant_map: Tensor
    blocksize: int = 64

    def __post_init__(self) -> None:
        op = "quantize_4bit"
        check_dtype(self.x.dtype, op)
        check_blocksize(self.blocksize, op)
        check_quant_map(self.quant_map, 16, self.x.device, op)

    def compute(self) -> tuple[Tensor, Tensor]:
        quant_map = self.quant_map.reshape(16)
        _check_finite(quant_map, "quantize_4bit")
        values, order = quant_map.sort(stable=True)
        normalized, absmax = _normalize_blocks(self.x, self.blocksize)
        if normalized.numel() % 2:
            normalized = torch.cat([normalized, normalized.new_zeros(1)])
        rank = torch.bucketize(normalized, (values[:-1] + values[1:]) / 2, out_int32=True)
        codes = order.to(torch.uint8)[rank]
        return (codes[::2] << 4 | codes[1::2]).unsqueeze(1), absmax

    def empty(self) -> tuple[Tensor, Tensor]:
        count = self.x.numel()
        codes = self.x.new_empty(((count + 1) // 2, 1), dtype=torch.uint8)
        return codes, self.x.new_empty((_blocks(count, self.blocksize),), dtype=torch.float32)


@dataclass
class QuantizeAbsmax:
    absmax: Tensor
    quant_map: Tensor
    blocksize: int = 256

    def __post_init__(self) -> None:
        op = "quantize_absmax"
        check_tensor(self.absmax, torch.float32, self.absmax.device, op, "absmax")
        check_blocksize(self.blocksize, op)
        check_quant_map(self.quant_map, 256, self.absmax.device, op)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        op, absmax, values = "quantize_absmax", self.absmax, self.quant_map.reshape(256)
        _check_finite(values, op)
        require(bool((values[:-1] <= values[1:]).all()), op, "quant_map must be sorted")
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        centered = absmax.reshape(-1) - offset
        padded = torch.nn.functional.pad(centered, (0, -centered.numel() % self.blocksize)).view(-1, self.blocksize)
        nested = padded.abs().amax(1)
        normalized = padded * (1 / nested.clamp(min=SMALLEST_SCALE)).unsqueeze(1)
        codes = torch.bucketize(
            normalized.flatten()[: centered.numel()], (values[:-1] + values[1:]) / 2, out_int32=True
        )
        return codes.to(torch.uint8), nested, offset

    def empty(self) -> tuple[Tensor, Tensor, Tensor]:
        absmax = self.absmax
        codes = absmax.new_empty((absmax.numel(),), dtype=torch.uint8)
        return codes, absmax.new_empty((_blocks(absmax.numel(), self.blocksize),)), absmax.new_empty(())


@dataclass
class Dequantize4bit:
    weight: Sequence[Tensor]
    packing: Sequence[int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        check_dtype(self.dtype, "dequantize_4bit")
        self.packed = packed_weight_from_operands(self.weight, self.packing, "dequantize_4bit")

    def compute(self) -> Tensor:
        return self.packed.values(self.dtype)

    def empty(self) -> Tensor:
        return self.packed.codes.new_empty(self.packed.shape, dtype=self.dtype)


@dataclass
class Dequantize4bitOut:
    weight: Sequence[Tensor]
    packing: Sequence[int]
    out: Tensor

    def __post_init__(self) -> None:
        op, out = "dequantize_4bit", self.out
        check_dtype(out.dtype, op)
        self.packed = packed_weight_from_operands(self.weight, self.packing, op)
        device, shape = self.packed.codes.device, self.packed.shape
        require(out.device == device, op, f"out must be on {device}, found {out.device}")
        requirement = f"out must have the weight's shape {list(shape)}"
        require(out.shape == torch.Size(shape), op, f"{requirement}, found {list(out.shape)}")

    def compute(self) -> None:
        overlaps = any(
            torch._C._overlaps(self.out, part) for part in self.weight
        )  # the weight would be read while `out` is written
        require(not overlaps, "dequantize_4bit", "out shares memory with the weight. Pass memory of its own")
        self.out.copy_(self.packed.values(self.out.dtype))

    def empty(self) -> None:
        return None


define_by("quantize_4bit(Tensor x, Tensor quant_map, int blocksize=64) -> (Tensor codes, Tensor absmax)", Quantize4bit)
define_by(
    "quantize_absmax(Tensor absmax, Tensor quant_map, int blocksize=256) -> "
    "(Tensor codes, Tensor nested_absmax, Tensor nested_offset)",
    QuantizeAbsmax,
)
define_by("dequantize_4bit(Tensor[] weight, SymInt[] packing, ScalarType dtype) -> Tensor", Dequantize4bit)
define_by("dequantize_4bit.out(Tensor[] weight, SymInt[] packing, *, Tensor(a!) out) -> ()", Dequantize4bitOut)


# --- functions for the rest of the package ---------------------------------------------------------------------------


@torch.no_grad()
def quantize_4bit(
    x: Tensor,
    quant_type: str = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = False,
    nested_blocksize: int = 256,
) -> PackedWeight:
    """Quantize a tensor of any shape in blocks of its flattened elements.

    Args:
        x: fp32, fp16 or bf16; any strides.
        quant_type: `nf4` or `fp4`.
        blocksize: a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits around their mean, with a scale for each `nested_blocksize` of them.

    Returns:
        The packed weight on x's device. Its scales are finite if and only if the input is.

    Raises:
        TypeError: the dtype of x is not supported. ValueError: the block size or codebook is invalid.
    """
    quant_map = codebook(quant_type, x.device)
    codes, absmax = _OPS.quantize_4bit(x, quant_map, blocksize)
    weight = PackedWeight(codes, absmax, quant_map, tuple(x.shape), blocksize, x.dtype, quant_type)
    return with_nested_scales(weight, nested_blocksize) if double_quant else weight


@torch.no_grad()
def with_nested_scales(weight: PackedWeight, nested_blocksize: int = 256) -> PackedWeight:
    """Quantize the fp32 scales of a weight to 8 bits, as `quantize_4bit(.., double_quant=True)` does."""
    nested_map = codebook("dynamic8", weight.absmax.device)
    absmax, nested_absmax, offset = _OPS.quantize_absmax(weight.absmax, nested_map, nested_blocksize)
    return weight._replace(
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_quant_map=nested_map,
        nested_offset=offset,
        nested_blocksize=nested_blocksize,
    )


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """Dequantize a weight into a new tensor, or into `out`.

    Args:
        weight: the packed weight.
        dtype: dtype of the new tensor, by default `weight.dtype`. If `out` is given, None or the dtype of `out`.
        out: fp32, fp16 or bf16 tensor of the weight's shape, with any strides. Reusing one avoids page faults, which
            take longer than dequantizing.

    Raises:
        TypeError, ValueError: the tensors of the weight do not match; the message gives both values.
    """
    if out is not None and dtype not in (None, out.dtype):
        raise ValueError(f"dequantize_4bit: out has dtype {out.dtype}, but dtype={dtype} was requested")
    tensors, packing = weight.operands()
    if out is None:
        dense = _OPS.dequantize_4bit(tensors, packing, dtype or weight.dtype)
    else:
        _OPS.dequantize_4bit.out(tensors, packing, out=out)
        dense = out
    if weight.permutation is None:
        return dense
    dense = dense.index_select(-1, weight.permutation.argsort())
    return dense if out is None else out.copy_(dense)
