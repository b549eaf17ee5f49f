"""Codebooks of 4-bit and 8-bit codes: NF4, FP4, E2M1 and integers for weights, the dynamic map and E4M3 for scales."""

from __future__ import annotations

import torch
from torch import Tensor

from peftcore.ops._library import constants


def _dynamic_map() -> Tensor:
    """Return the signed dynamic 8-bit map (Dettmers, arXiv 1511.04561), 256 sorted values.

    It contains 0, 1 and, for every power of ten from 1e-6 to 1, the midpoints of 1, 2, 4, ... 64 equal parts of [0.1,
    1] times that power, with both signs.
    """
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
    # Sign, two exponent bits and one mantissa bit, in the order of the bit patterns, divided by the largest value, 12.
    _FP4_MAGNITUDES = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12
    FP4 = torch.cat([_FP4_MAGNITUDES, 0.0 - _FP4_MAGNITUDES])
    # Sign, two exponent bits and one mantissa bit, in the order of the bit patterns (OCP Microscaling Formats 1.0).
    _E2M1_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    E2M1 = torch.cat([_E2M1_MAGNITUDES, -_E2M1_MAGNITUDES])
    INTEGERS = torch.arange(-8.0, 8.0)  # affine codes, relative to the middle zero point
    DYNAMIC8 = _dynamic_map()
    E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    # These are the codes of NaN, which no scale uses. Their values are finite so that codebooks can be compared.
    E4M3[127], E4M3[255] = 480, -480

_CODEBOOKS = {
    "nf4": NF4, "fp4": FP4, "mxfp4": E2M1, "nvfp4": E2M1, "affine4": INTEGERS, "dynamic8": DYNAMIC8, "e4m3": E4M3
}  # fmt: skip


def codebook(name: str, device: torch.device | str = "cpu") -> Tensor:
    """Return a codebook as a new tensor.

    `nf4`, `fp4`, `mxfp4`, `nvfp4`, `affine4` (fp32 `[16]`), or for scales `dynamic8` or `e4m3` (fp32 `[256]`).

    Raises ValueError for another name.
    """
    if name not in _CODEBOOKS:
        raise ValueError(f"unknown codebook {name!r}. Choose one of {', '.join(_CODEBOOKS)}")
    return _CODEBOOKS[name].to(device=device, copy=True)
