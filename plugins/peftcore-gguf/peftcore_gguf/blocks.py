"""4-bit weights of peftcore as GGUF's blocks of 32 values, with their codes.

MXFP4   E8M0 byte e, 16 bytes of codes; 2^(e - 127) E2M1
Q4_0    fp16 d, 16 bytes of codes;      d (q - 8)
Q4_1    fp16 d, fp16 m, 16 bytes;       d q + m

Byte i of a block has the code of value i in its low, of value i + 16 in its high nibble (ggml-common.h). affine4, scale
(q - zero), is Q4_0 where all zero points are 8, otherwise Q4_1 with m = -scale zero; larger groups repeat their scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore.ops import PackedWeight
from peftcore.plugin import PackedParameters, PeftcoreError, base_modules

BLOCK = 32
_ROUNDED = 2.0**-10  # of a number: what fp16 loses at most where it is not subnormal


class Blocks(NamedTuple):
    """A packed weight `[.., rows, in]` to write as blocks of the ggml type `kind`."""

    weight: PackedWeight
    kind: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the bytes."""
        import gguf

        return gguf.quant_shape_to_byte_shape(self.weight.shape, self.kind)

    def encoded(self) -> Tensor:
        """Return the blocks, uint8 `[.., rows, bytes of a row]`."""
        weight, count = self.weight, self.weight.absmax.numel() * (self.weight.blocksize // BLOCK)
        pairs = weight.codes.view(count, BLOCK // 2)
        codes = torch.stack((pairs >> 4, pairs & 15), -1).view(count, 2, BLOCK // 2)
        parts = list(_scales(weight))
        parts.append(codes[:, 0] | codes[:, 1] << 4)
        repeats = [count // len(part) for part in parts]
        whole = [part.repeat_interleave(times, 0) for part, times in zip(parts, repeats, strict=True)]
        return torch.cat(whole, 1).view(self.shape)


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Return the 4-bit weights of a model by name."""
    found = {}
    for path, module in base_modules(model):
        if not isinstance(module, PackedParameters):
            continue
        for name in module.packings:
            packed = module.packed_parameter(name)
            if packed is not None:
                found[f"{path}.{name}" if path else name] = packed
    return found


def as_blocks(weight: PackedWeight, name: str) -> Blocks:
    """Return the weight `name` as blocks of the type that has its codes.

    Raises:
        PeftcoreError: no type has them.
    """
    import gguf

    for why in _unlike(weight):
        raise PeftcoreError(
            f"'{name}' {why}, which no type of GGUF has. Call peftcore.dequantize(model) first, and choose a gguf_type"
        )
    kinds = gguf.GGMLQuantizationType
    if weight.quant_type == "mxfp4":
        return Blocks(weight, kinds.MXFP4)
    return Blocks(weight, kinds.Q4_0 if weight.zeros is None else kinds.Q4_1)


def is_exact(blocks: Blocks) -> bool:
    """Return whether the blocks have the weight's values bit for bit."""
    if blocks.weight.quant_type == "mxfp4":
        return True
    numbers = _numbers(blocks.weight)
    return all(torch.equal(each.half().double(), each) for each in numbers)


def _unlike(weight: PackedWeight) -> Iterator[str]:
    """Yield why no type of GGUF has a weight's values within the rounding of fp16."""
    if weight.quant_type not in ("mxfp4", "affine4"):
        yield f"is in {weight.quant_type}" + " with a scale of the whole weight" * (weight.quant_type == "nvfp4")
    elif weight.permutation is not None:
        yield "has groups of inputs that are not neighbours (act-order)"
    elif weight.quant_type == "affine4":
        for numbers in _numbers(weight):
            if ((numbers.half().double() - numbers).abs() > _ROUNDED * numbers.abs()).any():
                yield "has scales outside the range of fp16"


def _numbers(weight: PackedWeight) -> tuple[Tensor, ...]:
    """Return d and, with zero points, m of each group in float64."""
    scales = weight.absmax.double()
    return (scales,) if weight.zeros is None else (scales, -scales * weight.zeros.double())


def _scales(weight: PackedWeight) -> Iterator[Tensor]:
    """Yield the bytes of what comes before a block's codes, uint8 `[groups, ..]`."""
    if weight.quant_type == "mxfp4":
        yield weight.absmax.unsqueeze(1)
        return
    for numbers in _numbers(weight):
        yield numbers.half().unsqueeze(1).view(torch.uint8)
