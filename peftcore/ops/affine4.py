"""affine4: integer codes, with a scale and a zero point for each group of values of a row (GPTQ, AWQ, W4A16).

    y[i] = scale[b] * (code[i] - zero[b]), b = i // blocksize of the flattened weight, whose rows are whole groups

Scales are stored in fp32, fp16 or bf16, zero points as uint8, or as fp32 if they are not integers. The codebook has the
values code - 8, so y = scale * (codebook[code] - (zero - 8)). The difference is exact for integer zero points, and the
product is rounded to fp32 and then to the output dtype. Without `zeros`, all zero points are 8.

Some checkpoints have groups that are not contiguous (`g_idx`, act-order). For these, the inputs are permuted: column j
of the codes belongs to input `permutation[j]`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftcore.ops.codebooks import codebook
from peftcore.ops.huge_pages import in_huge_pages
from peftcore.ops.weight import (
    AFFINE,
    MAX_BLOCKSIZE,
    MIN_BLOCKSIZE,
    PackedWeight,
    check_blocksize,
    check_dtype,
    check_numel,
    require,
)

_LARGEST = 15  # code
_AT_ONCE = 1 << 22  # number of values quantized at once, which limits temporary memory


def affine4_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    permutation: Tensor | None = None,
) -> PackedWeight:
    """Build a packed weight from unpacked codes, scales and zero points.

    Args:
        codes: integers from 0 to 15, `[.., out, in]`, of any integer dtype.
        scales: fp32, fp16 or bf16 `[.., out, groups]`, stored in their dtype. Each group has in / groups adjacent
            columns, which must be a multiple of 32. A group whose size is not a power of two up to 4096 is stored as
            several smaller groups.
        zeros: zero points with the shape of `scales`, either integers from 0 to 255 or floating point. None means 8.
        dtype: default dtype of the dequantized weight; None means the dtype of the scales.
        permutation: int64 `[in]`, such that column j of `codes` belongs to input `permutation[j]`. Only supported for a
            matrix.

    Returns:
        The packed weight `[.., out, in]`, on the device of the codes.

    Raises:
        TypeError: a dtype is not supported. ValueError: the shapes do not match, or a value is out of range.
    """
    op, shape = "affine4_weight", tuple(codes.shape)
    dtype = dtype or scales.dtype
    check_dtype(scales.dtype, op)
    check_dtype(dtype, op)
    groups = scales.shape[-1] if scales.dim() else 0
    found_shapes = f"found codes {list(shape)} and scales {list(scales.shape)}"
    fits = len(shape) >= 2 and scales.shape[:-1] == codes.shape[:-1] and groups > 0 and shape[-1] % groups == 0
    require(fits, op, f"codes must be [.., out, in] and scales [.., out, groups], {found_shapes}")
    if codes.is_floating_point() or codes.dtype is torch.bool:
        raise TypeError(f"{op}: codes must be integers, found {codes.dtype}")
    group, requirement = shape[-1] // groups, f"groups must be multiples of {MIN_BLOCKSIZE} columns"
    require(group % MIN_BLOCKSIZE == 0, op, f"{requirement}, found {group}: {found_shapes}")
    if codes.numel() and not codes.is_meta:
        low, high = (int(limit) for limit in torch.aminmax(codes))
        require(0 <= low <= high <= _LARGEST, op, f"codes must be from 0 to {_LARGEST}, found {low} to {high}")
    blocksize = math.gcd(group, MAX_BLOCKSIZE)
    scales = scales.repeat_interleave(group // blocksize, -1).reshape(-1)
    if zeros is not None:
        check_numel(zeros, scales.numel() * blocksize // group, op, "zeros", "one a scale")
        zeros = _normalize_zeros(zeros, op).repeat_interleave(group // blocksize)
    if permutation is not None:
        permutation = _validate_permutation(permutation, shape, op).to(codes.device)
    flat = codes.reshape(-1).to(torch.uint8)
    packed = in_huge_pages((flat[::2] << 4 | flat[1::2]).unsqueeze(1))
    weight = PackedWeight(packed, scales.contiguous(), codebook("affine4", codes.device), shape, blocksize, dtype)
    return weight._replace(quant_type="affine4", nested_blocksize=AFFINE, zeros=zeros, permutation=permutation)


def _normalize_zeros(zeros: Tensor, op: str) -> Tensor:
    flat = zeros.reshape(-1)
    if flat.is_floating_point():
        return flat.float()
    if flat.numel() and not flat.is_meta:
        low, high = (int(limit) for limit in torch.aminmax(flat))
        require(0 <= low <= high <= 255, op, f"zeros must be from 0 to 255, found {low} to {high}")
    return flat.to(torch.uint8)


def _validate_permutation(permutation: Tensor, shape: tuple[int, ...], op: str) -> Tensor:
    found_shapes = f"found {permutation.dtype} {list(permutation.shape)} for a weight {list(shape)}"
    require(
        len(shape) == 2 and permutation.shape == shape[1:], op, f"permutation must be [in] of a matrix, {found_shapes}"
    )
    permutation = permutation.long()
    is_permutation = permutation.is_meta or torch.equal(permutation.sort().values.cpu(), torch.arange(shape[1]))
    require(is_permutation, op, f"permutation must have each of the {shape[1]} inputs once")
    return permutation


@torch.no_grad()
def quantize_affine4(x: Tensor, blocksize: int = 64) -> PackedWeight:
    """Quantize a tensor `[.., in]` by rounding to nearest, with a zero point for each group.

    The range of a group, extended to contain 0, is divided into 15 steps, whose size is rounded to bf16.

    Args:
        x: fp32, fp16 or bf16; any strides; `in` is a multiple of `blocksize`.
        blocksize: a power of two from 32 to 4096.

    Returns:
        The packed weight on x's device. A block that contains NaN or Inf gets a non-finite scale.

    Raises:
        TypeError: the dtype of x is not supported. ValueError: `in` is not a multiple of `blocksize`.
    """
    op = "quantize_affine4"
    check_dtype(x.dtype, op)
    check_blocksize(blocksize, op)
    fits = x.dim() > 0 and x.shape[-1] % blocksize == 0
    require(fits, op, f"the last dimension of x must be a multiple of {blocksize}, found {list(x.shape)}")
    blocks = x.reshape(-1, blocksize)
    codes = x.new_empty((blocks.shape[0], blocksize // 2), dtype=torch.uint8)
    scales = x.new_empty((blocks.shape[0],), dtype=torch.bfloat16)
    zeros = x.new_empty((blocks.shape[0],), dtype=torch.uint8)
    step = max(1, _AT_ONCE // blocksize)
    for start in range(0, blocks.shape[0], step):
        chunk = slice(start, start + step)
        values = blocks[chunk].float()
        low, high = values.amin(1).clamp_(max=0), values.amax(1).clamp_(min=0)
        scale = ((high - low) / _LARGEST).to(torch.bfloat16)
        scales[chunk] = scale
        inverse = (1 / scale.float()).masked_fill_(scale == 0, 0).unsqueeze(1)
        zero = (-low.unsqueeze(1) * inverse).round_().clamp_(0, _LARGEST)
        chunk_codes = (values * inverse).round_().add_(zero).clamp_(0, _LARGEST).nan_to_num_().to(torch.uint8)
        codes[chunk] = chunk_codes[:, ::2] << 4 | chunk_codes[:, 1::2]
        zeros[chunk] = zero.nan_to_num_().flatten().to(torch.uint8)
    quant_map, shape = codebook("affine4", x.device), tuple(x.shape)
    weight = PackedWeight(in_huge_pages(codes.view(-1, 1)), scales, quant_map, shape, blocksize, x.dtype, "affine4")
    return weight._replace(nested_blocksize=AFFINE, zeros=zeros)
