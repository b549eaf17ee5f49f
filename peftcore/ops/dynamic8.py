"""Dynamic 8-bit maps for optimizer state, signed and unsigned, in blocks of 256 elements that share a scale.

The format is described in csrc/optim/dynamic8.h. Source: Dettmers et al., arXiv 2110.02861, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftcore.ops._library import constants
from peftcore.ops.codebooks import DYNAMIC8

BLOCK = 256


def block_count(count: int) -> int:
    """Return the number of blocks that hold `count` elements."""
    return -(-count // BLOCK)


def _unsigned_map() -> Tensor:
    """Return the unsigned dynamic map, 256 sorted values.

    It contains 0, 1 and, for every power of ten from 1e-6 to 1, the midpoints of 2, 4, ... 128 equal parts of [0.1, 1]
    times that power.
    """
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 1) + 1)
        values.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    return torch.cat(values).sort().values


def _encoder(table: Tensor, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    s, zero = (0, 127) if signed else (1, -1)
    parts = [2 ** (d + s) for d in range(7)]
    begin = [table[zero + 1] / 2 if signed else table[1]]
    begin += [(table[zero + n - 1] + table[zero + n]) / 2 for n in (*parts[1:], 2 ** (7 + s))]
    slope = [0.0, *(10.0 ** (6 - d) / 0.9 for d in range(7)), 2.0]
    ends = [0.0 if signed else 2.5, *parts, (2 ** (7 + s) + 0.5) / 2]
    return torch.stack(begin), torch.tensor(slope), torch.tensor(ends)


SIGNED_MAP = DYNAMIC8
with constants():
    UNSIGNED_MAP = _unsigned_map()
    # (start, slope and number of parts of each region) of the signed and the unsigned map. See csrc/optim/dynamic8.h.
    ENCODERS = {True: _encoder(SIGNED_MAP, True), False: _encoder(UNSIGNED_MAP, False)}


def decode(codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    """Return 8-bit state in fp32: the table's entry of each code times the scale of its block. All tensors are flat."""
    scales = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return table.to(codes.device)[codes.long()] * scales


def encode(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize flat fp32 values to the nearest entries of the table. Return codes, and absmax per block.

    Non-finite values become 0, since one of them would become the scale of 256 elements.
    """
    signed = table is SIGNED_MAP
    x = x.where(x.isfinite(), 0)
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    inverse = torch.where(absmax > 0, 1 / absmax, 0)
    normalized = (blocks * inverse[:, None]).flatten()[: x.numel()]
    begin, slope, parts = (t.to(x.device) for t in ENCODERS[signed])
    a = normalized.abs().clamp(min=2.0**-31).nan_to_num(2.0**-31)
    region = torch.bucketize(a, begin)
    n = ((a * slope[region] + 8 / 9).clamp(max=2 - 2.0**-23) * parts[region]).int()
    if signed:
        return torch.where(normalized < 0, 127 - n, 127 + n).clamp(min=0).to(torch.uint8), absmax
    return torch.where(normalized > 0, n - 1, 0).to(torch.uint8), absmax
