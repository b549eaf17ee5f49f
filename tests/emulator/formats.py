"""Weights of the formats with small blocks, MXFP4, NVFP4 and affine4, whose CUDA kernels tests compare with float64."""

import math

import torch
from emulator.products import normal

from peftcore import ops
from peftcore.ops.weight import PackedWeight

# Group (of a whole row: None), and dtypes of scales and zero points.
AFFINE = {
    "gptq": (128, torch.float16, torch.uint8),
    "awq": (64, torch.bfloat16, torch.uint8),
    "symmetric": (32, torch.float32, None),
    "fractions": (32, torch.float16, torch.float32),
    "columns": (None, torch.bfloat16, torch.uint8),
}
# What E4M3's values are divided by, and the offset of scales: NVFP4 of ModelOpt, and of compressed-tensors with one.
SIXTEENS = {"nvfp4": (1, 0.0), "divided": (27.3, 0.5)}
KINDS = ("mxfp4", *SIXTEENS, *AFFINE)


def group_of(kind):
    """Return the number of columns that rows must be a multiple of."""
    if kind in SIXTEENS:
        return 16
    return 32 if kind == "mxfp4" else AFFINE[kind][0] or 32


def packed(kind, *shape, seed=0):
    """Return a weight `[.., out, in]` of a kind of `KINDS`; scales of the blocks differ."""
    if kind == "mxfp4":
        scale = torch.randint(-6, 3, (*shape[:-1], shape[-1] // 32), generator=torch.Generator().manual_seed(seed))
        return ops.quantize_mxfp4(normal(*shape, seed=seed) * scale.repeat_interleave(32, -1).float().exp2())
    draw = torch.Generator().manual_seed(seed)
    if kind in SIXTEENS:
        return sixteens(kind, draw, shape)
    group, scales, zeros = AFFINE[kind]
    of_groups = (*shape[:-1], 1 if group is None else shape[-1] // group)
    scale = (torch.rand(of_groups, generator=draw) * 0.2 + 0.05).to(scales)
    codes = torch.randint(0, 16, shape, generator=draw)
    points = None if zeros is None else (torch.rand(of_groups, generator=draw) * 16).to(zeros)
    return ops.affine4_weight(codes, scale, points)


def sixteens(kind, draw, shape):
    """Return a weight of a kind of `SIXTEENS` with any codes and scales; 32 scales share one in fp32."""
    codes = torch.randint(0, 256, (math.prod(shape) // 2, 1), generator=draw).to(torch.uint8)
    scales = torch.randint(0, 127, (math.prod(shape) // 16,), generator=draw).to(torch.uint8)
    scales[::5] |= 128  # negative
    divisor, offset = SIXTEENS[kind]
    weight = PackedWeight(codes, scales, ops.codebook("nvfp4"), shape, 16, torch.float32, "nvfp4")
    return weight._replace(
        nested_absmax=torch.rand(-(-len(scales) // 32), generator=draw) / 50 + 0.01,
        nested_quant_map=ops.codebook("e4m3") / divisor,
        nested_offset=torch.tensor(offset),
        nested_blocksize=32,
    )


def exact(weight):
    """Return the values in float64, by the formula of the format."""
    codes = weight.codes.flatten()
    entries = weight.quant_map.double()[torch.stack([codes >> 4, codes & 15], 1).flatten().long()]
    scales, zeros = weight.scales().double(), weight.zeros
    shift = torch.zeros(()) if zeros is None else (zeros.double() - 8).repeat_interleave(weight.blocksize)
    return ((entries - shift) * scales.repeat_interleave(weight.blocksize)).view(weight.shape)
