"""MXFP4: 4-bit codes in E2M1, with a power of two as the scale of each block of 32 values of a row.

    e[b] = floor(log2(max |x[i]|)) - 2 over block b, at least -127; stored as the byte e[b] + 127 (E8M0)
    q[i] = x[i] / 2^e[b] rounded to the nearest of ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}; of two equally near ones to the one
           with an even code; magnitudes above 6 become 6
    y[i] = round(E2M1[q[i]] * 2^e[b]): exact in fp32, rounded once to the output dtype

A weight takes 4.25 bits. A byte holds two codes, the even element in the high nibble, as in quant4.py, whose
`dequantize_4bit` and products also accept MXFP4 weights. MXFP4 files have the even element in the low nibble.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.2, 5.3.3 and 6.3.

Non-finite input raises no error: a NaN or infinity sets the byte of its block to 255, and the block dequantizes to NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftcore.ops._library import constants, define_by
from peftcore.ops.codebooks import E2M1, codebook
from peftcore.ops.weight import POWERS_OF_TWO, PackedWeight, check_dtype, require

BLOCKSIZE = 32
_NOT_FINITE = 255
_LARGEST_EXPONENT = 2  # exponent of the largest entry, 6 = 1.5 * 2^2


def _thresholds() -> tuple[Tensor, Tensor]:
    """Return the 15 thresholds between the sorted entries, and the entries' codes in that order.

    `bucketize` gives a value on a threshold the lower entry. Where that entry's code is odd, the threshold is moved
    just below the midpoint, so that ties go to even codes.
    """
    order = torch.tensor([*range(15, 7, -1), *range(8)], dtype=torch.uint8)
    values = E2M1[order.int()]
    middle = (values[:-1] + values[1:]) / 2
    just_below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    thresholds = torch.where(order[:-1] % 2 == 0, middle, just_below)
    thresholds[7] = -torch.finfo(torch.float32).tiny  # between -0 and 0, so that 0 gets its own code
    return thresholds, order


with constants():
    THRESHOLDS, ORDER = _thresholds()


@dataclass
class QuantizeMxfp4:
    x: Tensor

    def __post_init__(self) -> None:
        op, x = "quantize_mxfp4", self.x
        check_dtype(x.dtype, op)
        has_whole_blocks = x.dim() > 0 and x.shape[-1] % BLOCKSIZE == 0
        require(
            has_whole_blocks, op, f"the last dimension of x must be a multiple of {BLOCKSIZE}, found {list(x.shape)}"
        )

    def compute(self) -> tuple[Tensor, Tensor]:
        blocks = self.x.reshape(-1, BLOCKSIZE).float()
        exponent = (blocks.abs().amax(1).view(torch.int32) & 0x7FFFFFFF) >> 23
        e = torch.where(exponent == _NOT_FINITE, exponent, (exponent - _LARGEST_EXPONENT).clamp(min=0))
        inverse = torch.where(e == _NOT_FINITE, 127 << 23, (254 - e) << 23).int().view(torch.float32)
        normalized = (blocks * inverse.unsqueeze(1)).flatten()
        rank = torch.bucketize(normalized, THRESHOLDS.to(normalized.device), out_int32=True)
        codes = ORDER.to(normalized.device)[rank]
        return (codes[::2] << 4 | codes[1::2]).unsqueeze(1), e.to(torch.uint8)

    def empty(self) -> tuple[Tensor, Tensor]:
        count, x = self.x.numel(), self.x
        codes = x.new_empty((count // 2, 1), dtype=torch.uint8)
        return codes, x.new_empty((count // BLOCKSIZE,), dtype=torch.uint8)


define_by("quantize_mxfp4(Tensor x) -> (Tensor codes, Tensor absmax)", QuantizeMxfp4)


@torch.no_grad()
def quantize_mxfp4(x: Tensor) -> PackedWeight:
    """Quantize a tensor `[.., in]` in blocks of 32 values of its rows.

    Args:
        x: fp32, fp16 or bf16; any strides; `in` is a multiple of 32.

    Returns:
        The packed weight on x's device. The scale of a block that contains NaN or Inf is 255.

    Raises:
        TypeError: the dtype of x is not supported. ValueError: `in` is not a multiple of 32.
    """
    codes, scales = torch.ops.peftcore.quantize_mxfp4(x)
    shape, quant_map = tuple(x.shape), codebook("mxfp4", x.device)
    return PackedWeight(codes, scales, quant_map, shape, BLOCKSIZE, x.dtype, "mxfp4", nested_blocksize=POWERS_OF_TWO)


def swap_nibbles(codes: Tensor) -> Tensor:
    """Swap the two codes of each byte in place, to convert between the order in files and in memory."""
    flat = codes.view(-1)
    for part in flat.split(1 << 20):  # keeps temporary memory small
        part.copy_(part << 4 | part >> 4)
    return codes
