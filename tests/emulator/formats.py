"""Weights of the formats with small blocks, MXFP4 and affine4, whose CUDA kernels tests compare with float64."""

import torch
from emulator.products import normal

from peftcore import ops

# Group (of a whole row: None), and dtypes of scales and zero points.
AFFINE = {
    "gptq": (128, torch.float16, torch.uint8),
    "awq": (64, torch.bfloat16, torch.uint8),
    "symmetric": (32, torch.float32, None),
    "fractions": (32, torch.float16, torch.float32),
    "columns": (None, torch.bfloat16, torch.uint8),
}
KINDS = ("mxfp4", *AFFINE)


def group_of(kind):
    """Return the number of columns that rows must be a multiple of."""
    return 32 if kind == "mxfp4" else AFFINE[kind][0] or 32


def packed(kind, *shape, seed=0):
    """Return a weight `[.., out, in]` of a kind of `KINDS`; scales of the blocks differ."""
    if kind == "mxfp4":
        scale = torch.randint(-6, 3, (*shape[:-1], shape[-1] // 32), generator=torch.Generator().manual_seed(seed))
        return ops.quantize_mxfp4(normal(*shape, seed=seed) * scale.repeat_interleave(32, -1).float().exp2())
    group, scales, zeros = AFFINE[kind]
    draw = torch.Generator().manual_seed(seed)
    of_groups = (*shape[:-1], 1 if group is None else shape[-1] // group)
    scale = (torch.rand(of_groups, generator=draw) * 0.2 + 0.05).to(scales)
    codes = torch.randint(0, 16, shape, generator=draw)
    points = None if zeros is None else (torch.rand(of_groups, generator=draw) * 16).to(zeros)
    return ops.affine4_weight(codes, scale, points)


def exact(weight):
    """Return the values in float64, by the formula of the format."""
    codes = weight.codes.flatten()
    entries = weight.quant_map.double()[torch.stack([codes >> 4, codes & 15], 1).flatten().long()]
    scales, zeros = weight.scales().double(), weight.zeros
    shift = torch.zeros(()) if zeros is None else (zeros.double() - 8).repeat_interleave(weight.blocksize)
    return ((entries - shift) * scales.repeat_interleave(weight.blocksize)).view(weight.shape)
