"""MXFP4: codes in E2M1 with a power of two for each 32 values of a row (OCP Microscaling Formats 1.0).

X.weight                              uint8 [n / 2, 1], the even element in the high nibble
X.weight.absmax                       uint8 [blocks], E8M0: 2^(e - 127)
X.weight.quant_state.peftcore__mxfp4  uint8, the bytes of a JSON text: shape and dtype, and for experts stored as
                                      [experts, out, in], while the parameter is [experts, in, out], turned: true

Experts of gpt-oss in their published format (`from_blocks`):

X_blocks    uint8 [experts, out, in / 32, 16], the even element in the low nibble
X_scales    uint8 [experts, out, in / 32], E8M0
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from peftcore import ops
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.ops.mxfp4 import BLOCKSIZE, swap_nibbles
from peftcore.ops.weight import POWERS_OF_TWO, PackedWeight
from peftcore.plugin.validation import shown
from peftcore.quantization.four_bit_format import (
    FourBitFormat,
    check_parts,
    check_state,
    damaged_error,
    encode_json,
    state_metadata,
)

_STATE = "quant_state.peftcore__mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"  # suffixes of gpt-oss's tensor names
_LARGEST = 252  # largest E8M0 byte: the code 6 times 2^125 is still finite in fp32


def _settings(double_quant: bool, blocksize: int) -> tuple[bool, int]:
    """Return the format's fixed settings. NF4's defaults (True, 64) are accepted, because `quantize` passes them."""
    if blocksize not in (64, BLOCKSIZE):
        raise PeftcoreError(
            f"mxfp4 only supports blocksize={BLOCKSIZE}, found blocksize={shown(blocksize)}. Omit the argument"
        )
    return False, BLOCKSIZE


def _quantize(weight: Tensor, blocksize: int, double_quant: bool) -> PackedWeight:
    if weight.shape[-1] % BLOCKSIZE:
        raise PeftcoreError(
            f"mxfp4 needs rows whose length is a multiple of {BLOCKSIZE}, found a weight of shape "
            f"{list(weight.shape)}. Leave the layer dense: skip=[...]"
        )
    return ops.quantize_mxfp4(weight)


def to_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors stored with `X.weight` on disk, by the part of the name after `X.weight.`."""
    return {"absmax": weight.absmax, _STATE: encode_json(state_metadata(weight), weight.absmax.device)}


def from_tensors(codes: Tensor, tensors: Mapping[str, Tensor], name: str) -> PackedWeight:
    """Build the weight `name` from its codes and tensors, and check that they are consistent.

    Raises:
        CheckpointError: a tensor is missing or inconsistent, because the file is damaged or has another format.
    """
    _, shape, dtype, is_transposed = check_state(codes, tensors, _STATE, name)
    if not shape or shape[-1] % BLOCKSIZE:
        raise damaged_error(name, f"has shape={list(shape)}, whose row length is not a multiple of {BLOCKSIZE}")
    check_parts(tensors, {"absmax": (torch.uint8, math.prod(shape) // BLOCKSIZE)}, name)
    _check_scales(tensors["absmax"], name)
    return _packed(codes.detach().contiguous(), tensors["absmax"].detach().clone(), shape, dtype, is_transposed)


def from_blocks(blocks: Tensor, scales: Tensor, dtype: torch.dtype, name: str) -> PackedWeight:
    """Build the experts `name` from gpt-oss's `name_blocks` and `name_scales`, in the memory of `blocks`.

    Args:
        blocks: uint8 `[experts, out, in / 32, 16]`, changed in place.
        scales: uint8 `[experts, out, in / 32]`.
        dtype: dtype of the dequantized experts.

    Returns:
        Packed weight `[experts, out, in]` of a parameter `[experts, in, out]`.

    Raises:
        CheckpointError: the shapes or dtypes do not match, or a scale is NaN or too large.
    """
    fits = blocks.dtype is scales.dtype is torch.uint8 and blocks.dim() == 4 and blocks.shape[-1] == BLOCKSIZE // 2
    if not fits or scales.shape != blocks.shape[:-1]:
        raise CheckpointError(
            f"'{name}_blocks' is {blocks.dtype} {list(blocks.shape)} and '{name}_scales' {scales.dtype} "
            f"{list(scales.shape)}, expected {torch.uint8} [experts, out, in / 32, 16] and [experts, out, in / 32]. "
            "The checkpoint is damaged or has another format"
        )
    _check_scales(scales, name)
    experts, out, blocks_per_row = scales.shape
    codes = swap_nibbles(blocks.detach().contiguous()).view(-1, 1)
    return _packed(codes, scales.detach().reshape(-1).clone(), (experts, out, blocks_per_row * BLOCKSIZE), dtype, True)


def _check_scales(scales: Tensor, name: str) -> None:
    if scales.numel() and not scales.is_meta and int(scales.max()) > _LARGEST:
        exponent = int(scales.max())
        scale = "NaN" if exponent == 255 else f"2^{exponent - 127}"
        raise damaged_error(name, f"has a scale of {scale}, so values are not finite")


def _packed(
    codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype, is_transposed: bool
) -> PackedWeight:
    quant_map = ops.codebook("mxfp4", codes.device)
    weight = PackedWeight(codes, scales, quant_map, shape, BLOCKSIZE, dtype, "mxfp4", nested_blocksize=POWERS_OF_TWO)
    return weight._replace(turned=is_transposed)


MXFP4 = FourBitFormat(
    name="mxfp4",
    settings=_settings,
    quantize=_quantize,
    state=_STATE,
    parts=("absmax", _STATE),
    to_tensors=to_tensors,
    from_tensors=from_tensors,
    rows_are_blocks=True,
)
