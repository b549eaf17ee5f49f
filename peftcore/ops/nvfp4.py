"""NVFP4: 4-bit codes in E2M1, with an E4M3 scale for each block of 16 values of a row and an fp32 scale per matrix.

    g    = max |x| / (6 * 448), one per matrix [out, in]; at least 2^-126
    s[b] = max |x[i]| / (6 g) over block b, rounded to E4M3 (8 bits: 4 of exponent, 3 of mantissa), from 2^-9 to 448; 1
           where the block is zero
    q[i] = x[i] / (s[b] g) rounded to the nearest of ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}; of two equally near ones to the one
           with an even code
    y[i] = round(E2M1[q[i]] * (s[b] g)): both products in fp32, rounded once to the output dtype

A weight takes 4.5 bits. In memory the scales are stored as nested scales (quant4.py): s indexes a table of E4M3's
values, and g is repeated once per `nested_blocksize` scales, which divides the number of scales of an expert. Kernels
therefore need no code for the format.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), appendix. Scales and codes equal
those of NVFP4QTensor in nvidia-modelopt 0.47 bit for bit.

Non-finite input raises no error: its block, or its whole matrix, dequantizes to NaN or infinity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftcore.ops.codebooks import codebook
from peftcore.ops.huge_pages import in_huge_pages
from peftcore.ops.weight import MAX_BLOCKSIZE, MIN_BLOCKSIZE, PackedWeight, check_dtype, require

BLOCKSIZE = 16
EXPERT_VALUES = BLOCKSIZE * MIN_BLOCKSIZE  # divides the size of each expert, so that experts share no nested scale
_LARGEST_CODE, _LARGEST_SCALE, _SMALLEST_SCALE = 6.0, 448.0, 2.0**-9
_NAN = 127  # code of NaN in E4M3, without sign
_AT_ONCE = 1 << 18  # number of values quantized at once, few enough for temporary tensors to stay in cache


def matrices(shape: tuple[int, ...]) -> int:
    """Return the number of matrices in a weight `[.., out, in]`."""
    return math.prod(shape[:-2])


def nested_blocksize(shape: tuple[int, ...]) -> int:
    """Return the number of block scales that share one copy of the matrix's scale.

    Raises:
        ValueError: the number of values in an expert is not a multiple of 512.
    """
    if len(shape) < 3:
        return MAX_BLOCKSIZE
    size = math.prod(shape[-2:])
    requirement = f"an expert must have a multiple of {EXPERT_VALUES} values"
    require(size % EXPERT_VALUES == 0, "nvfp4", f"{requirement}, found {list(shape)}")
    half = 0 if size % (2 * EXPERT_VALUES) else size // 2  # gate and up may each have a scale
    return math.gcd((half or size) // BLOCKSIZE, MAX_BLOCKSIZE)


def nvfp4_weight(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    scale_map: Tensor | None = None,
) -> PackedWeight:
    """Build a packed weight from codes and scales.

    Args:
        codes: uint8 `[n / 2, 1]`, the even element in the high nibble.
        scales: uint8 `[n / 16]`, the bits of E4M3.
        global_scale: fp32, one value per matrix, or one for each of several equal parts of an expert's rows, such as
            its gate and up projections.
        shape: `(.., out, in)`; `in` is a multiple of 16.
        dtype: default dtype of the dequantized weight.
        scale_map: fp32 `[256]`, the values of `scales`; by default those of E4M3.

    Raises:
        ValueError: the number of values in an expert, or in one of its parts, is not a multiple of 512.
    """
    step = nested_blocksize(shape)
    nested, count = -(-(math.prod(shape) // BLOCKSIZE) // step), max(global_scale.numel(), 1)
    divides = count % max(matrices(shape), 1) == nested % count == 0 and (len(shape) > 2 or count == 1)
    require(divides or not nested, "nvfp4", f"{count} global scales do not divide a weight {list(shape)}")
    outer = global_scale.reshape(-1).repeat_interleave(nested // count)
    scale_map = codebook("e4m3", codes.device) if scale_map is None else scale_map
    weight = PackedWeight(codes, scales, codebook("nvfp4", codes.device), shape, BLOCKSIZE, dtype, "nvfp4")
    return weight._replace(
        nested_absmax=outer,
        nested_quant_map=scale_map,
        nested_offset=outer.new_zeros(()),
        nested_blocksize=step,
    )


@torch.no_grad()
def quantize_nvfp4(x: Tensor, largest: Tensor | None = None) -> PackedWeight:
    """Quantize a tensor `[.., out, in]` in blocks of 16 values of its rows.

    Args:
        x: fp32, fp16 or bf16; any strides; `in` is a multiple of 16.
        largest: largest magnitude of each full matrix, if x is only a shard of the matrices. By default it is computed
            from x.

    Returns:
        The packed weight on x's device. Its scales are finite if and only if the input is.

    Raises:
        TypeError: the dtype of x is not supported. ValueError: `in` is not a multiple of 16, or an expert's size is not
            a multiple of 512.
    """
    op, shape = "quantize_nvfp4", tuple(x.shape)
    check_dtype(x.dtype, op)
    has_whole_blocks = x.dim() > 0 and shape[-1] % BLOCKSIZE == 0
    require(has_whole_blocks, op, f"the last dimension of x must be a multiple of {BLOCKSIZE}, found {list(shape)}")
    count = matrices(shape)
    blocks = x.reshape(count, x.numel() // max(count, 1) // BLOCKSIZE, BLOCKSIZE)
    if largest is None:
        largest = largest_of(x)
    tiny = torch.finfo(torch.float32).tiny
    largest = largest.reshape(-1).float()
    # The divisor is a tensor, because on CUDA PyTorch replaces division by a number with a rounded reciprocal.
    outer = (largest / largest.new_full((), _LARGEST_CODE * _LARGEST_SCALE)).clamp_(min=tiny)
    codes = x.new_empty((count, blocks.shape[1], BLOCKSIZE // 2), dtype=torch.uint8)
    scales = x.new_empty(blocks.shape[:2], dtype=torch.uint8)
    step = _AT_ONCE // BLOCKSIZE
    for i in range(count):
        for start in range(0, blocks.shape[1], step):
            chunk = slice(start, start + step)
            values = blocks[i, chunk].float()
            scale = values.abs().amax(1) / (_LARGEST_CODE * outer[i])
            scale = scale.masked_fill_(scale == 0, 1).clamp_(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn)
            scales[i, chunk] = scale.view(torch.uint8)
            chunk_codes = _nearest(values / (scale.float() * outer[i]).unsqueeze(1))
            codes[i, chunk] = chunk_codes[:, ::2] << 4 | chunk_codes[:, 1::2]
    return nvfp4_weight(in_huge_pages(codes.view(-1, 1)), scales.view(-1), outer, shape, x.dtype)


def _nearest(x: Tensor) -> Tensor:
    """Return the codes of the nearest entries. Ties go to the even code, as in `round`."""
    size = torch.fmin(x.abs(), x.new_tensor(_LARGEST_CODE))  # 6 for NaN
    # Entries are 0.5 apart up to 2, then 1, then 2. The smallest of the three candidates is the right code.
    codes = torch.minimum((2 * size).round_(), size.round() + 2)
    codes = torch.minimum(codes, (size / 2).round_() + 4).to(torch.uint8)
    return codes | (x < 0).to(torch.uint8) << 3


def not_finite(weight: PackedWeight) -> str:
    """Return why a weight has infinite or NaN values, as the predicate of a sentence, or "" if all are finite."""
    if weight.absmax.is_meta or not weight.absmax.numel():
        return ""
    is_used = torch.bincount(weight.absmax.reshape(-1), minlength=256) > 0
    if is_used[_NAN] or is_used[_NAN | 128]:
        return "has a scale of NaN, so values are not finite"
    assert weight.nested_quant_map is not None and weight.nested_absmax is not None
    largest = weight.nested_quant_map[is_used].abs().max() * weight.nested_absmax.abs().max() * _LARGEST_CODE
    return "" if largest.isfinite() else "has scales whose products with the global scale are too large for float32"


def largest_of(x: Tensor) -> Tensor:
    """Return the largest magnitude of each matrix of x, in fp32."""
    flat = x.reshape(matrices(tuple(x.shape)), -1)
    if not flat.numel():
        return flat.new_zeros(flat.shape[0], dtype=torch.float32)
    return torch.maximum(flat.amax(1), -flat.amin(1)).float()
