"""Convert 4-bit weights to GGUF's blocks of 32 values, without changing the codes.

MXFP4   E8M0 byte e, 16 bytes of codes; 2^(e - 127) E2M1
Q4_0    fp16 d, 16 bytes of codes;      d (q - 8)
Q4_1    fp16 d, fp16 m, 16 bytes;       d q + m

Byte i of a block has the code of value i in its low nibble, and the code of value i + 16 in its high nibble
(ggml-common.h). affine4, scale (q - zero), becomes Q4_0 if all zero points are 8, and otherwise Q4_1 with m = -scale
zero. Groups larger than a block repeat their scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.ops import PackedWeight
from peftcore.plugin import PackedParameters, PeftcoreError, base_modules

BLOCK = 32
_FP16_ERROR = 2.0**-10  # largest relative error of rounding to fp16, for numbers that are not subnormal


class Blocks(NamedTuple):
    """A packed weight `[..., rows, in]` to write as blocks of the ggml type `kind`."""

    weight: PackedWeight
    kind: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the encoded bytes, `[..., rows, bytes per row]`."""
        import gguf

        return gguf.quant_shape_to_byte_shape(self.weight.shape, self.kind)

    def encode(self) -> Tensor:
        """Return the blocks, uint8 `[..., rows, bytes per row]`."""
        weight, count = self.weight, self.weight.absmax.numel() * (self.weight.blocksize // BLOCK)
        pairs = weight.codes.view(count, BLOCK // 2)
        codes = torch.stack((pairs >> 4, pairs & 15), -1).view(count, 2, BLOCK // 2)
        parts = list(_scale_bytes(weight))
        parts.append(codes[:, 0] | codes[:, 1] << 4)
        # Scales have one row per group, codes one row per block.
        columns = [part.repeat_interleave(count // len(part), 0) for part in parts]
        return torch.cat(columns, 1).view(self.shape)


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Return the 4-bit weights of a model by name."""
    weights = {}
    for path, module in base_modules(model):
        if not isinstance(module, PackedParameters):
            continue
        for name in module.packings:
            packed = module.packed_parameter(name)
            if packed is not None:
                weights[f"{path}.{name}" if path else name] = packed
    return weights


def pack_blocks(weight: PackedWeight, name: str) -> Blocks:
    """Return the weight `name` as blocks of the GGUF type with the same codes.

    Raises:
        PeftcoreError: no GGUF type can represent the weight.
    """
    import gguf

    for reason in _incompatibilities(weight):
        raise PeftcoreError(
            f"'{name}' {reason}, which no GGUF type supports. Call peftcore.dequantize(model) first, and choose a "
            "gguf_type"
        )
    kinds = gguf.GGMLQuantizationType
    if weight.quant_type == "mxfp4":
        return Blocks(weight, kinds.MXFP4)
    return Blocks(weight, kinds.Q4_0 if weight.zeros is None else kinds.Q4_1)


def is_exact(blocks: Blocks) -> bool:
    """Return whether the blocks represent the weight's values exactly."""
    if blocks.weight.quant_type == "mxfp4":
        return True
    return all(torch.equal(numbers.half().double(), numbers) for numbers in _scales_and_offsets(blocks.weight))


def _incompatibilities(weight: PackedWeight) -> Iterator[str]:
    """Yield the reasons why no GGUF type can represent a weight, even if its scales are rounded to fp16."""
    if weight.quant_type == "nvfp4":
        yield "is in nvfp4 with a per-tensor scale"
    elif weight.quant_type not in ("mxfp4", "affine4"):
        yield f"is in {weight.quant_type}"
    elif weight.permutation is not None:
        yield "has non-contiguous groups of inputs (act-order)"
    elif weight.quant_type == "affine4":
        for numbers in _scales_and_offsets(weight):
            if ((numbers.half().double() - numbers).abs() > _FP16_ERROR * numbers.abs()).any():
                yield "has scales outside the range of fp16"


def _scales_and_offsets(weight: PackedWeight) -> tuple[Tensor, ...]:
    """Return d of each group, and m if the weight has zero points, in float64."""
    scales = weight.absmax.double()
    return (scales,) if weight.zeros is None else (scales, -scales * weight.zeros.double())


def _scale_bytes(weight: PackedWeight) -> Iterator[Tensor]:
    """Yield the bytes that precede the codes in a block, uint8 `[groups, bytes]`."""
    if weight.quant_type == "mxfp4":
        yield weight.absmax.unsqueeze(1)
        return
    for numbers in _scales_and_offsets(weight):
        yield numbers.half().unsqueeze(1).view(torch.uint8)
