"""affine4: integer codes with a scale and a zero point for each group of a row's values (`ops.affine4`).

X.weight                                uint8 [n / 2, 1], the even element in the high nibble
X.weight.absmax                         scales, fp32, fp16 or bf16 [groups]
X.weight.zeros                          zero points, uint8 or fp32 [groups]; missing where all are 8
X.weight.permutation                    int64 [in]: column j of the codes belongs to input permutation[j], or missing
X.weight.quant_state.peftcore__affine4  uint8, the bytes of a JSON text: shape, dtype and blocksize, and for experts
                                        stored as [experts, out, in], while the parameter is [experts, in, out],
                                        turned: true
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore import ops
from peftcore.errors import PeftcoreError
from peftcore.ops.weight import AFFINE, PackedWeight
from peftcore.plugin.validation import shown
from peftcore.quantization.four_bit_format import (
    FourBitFormat,
    check_blocksize,
    check_parts,
    check_state,
    damaged_error,
    encode_json,
    state_metadata,
)

_STATE = "quant_state.peftcore__affine4"


def _settings(double_quant: bool, blocksize: int) -> tuple[bool, int]:
    check_blocksize(blocksize)
    return False, blocksize


def _quantize(weight: Tensor, blocksize: int, double_quant: bool) -> PackedWeight:
    if weight.shape[-1] % blocksize:
        raise PeftcoreError(
            f"affine4 with blocksize={blocksize} needs rows whose length is a multiple of {blocksize}, found a "
            f"weight of shape {list(weight.shape)}. Choose a smaller blocksize, or leave the layer dense: skip=[...]"
        )
    return ops.quantize_affine4(weight, blocksize)


def to_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors stored with `X.weight` on disk, by the part of the name after `X.weight.`."""
    tensors = {"absmax": weight.absmax}
    if weight.zeros is not None:
        tensors["zeros"] = weight.zeros
    if weight.permutation is not None:
        tensors["permutation"] = weight.permutation
    return {
        **tensors,
        _STATE: encode_json({**state_metadata(weight), "blocksize": weight.blocksize}, weight.absmax.device),
    }


def from_tensors(codes: Tensor, tensors: Mapping[str, Tensor], name: str) -> PackedWeight:
    """Build the weight `name` from its codes and tensors, and check that they are consistent.

    Raises:
        CheckpointError: a tensor is missing or inconsistent, because the file is damaged or has another format.
    """
    metadata, shape, dtype, is_transposed = check_state(codes, tensors, _STATE, name)
    blocksize: Any = metadata.get("blocksize")
    try:
        check_blocksize(blocksize)
    except PeftcoreError as error:
        raise damaged_error(name, f"cannot be read from '{_STATE}': {error}") from error
    if not shape or shape[-1] % blocksize:
        raise damaged_error(name, f"has shape={list(shape)}, whose row length is not a multiple of {blocksize}")
    blocks, dtypes = math.prod(shape) // blocksize, {part: t.dtype for part, t in tensors.items()}
    scales, zeros = dtypes.get("absmax"), dtypes.get("zeros")
    expected = {"absmax": (scales if scales in (torch.float16, torch.bfloat16) else torch.float32, blocks)}
    if zeros is not None:
        expected["zeros"] = (torch.uint8 if zeros is torch.uint8 else torch.float32, blocks)
    if "permutation" in tensors:
        expected["permutation"] = (torch.int64, shape[-1])
    check_parts(tensors, expected, name)
    # Copies, so that small parts do not keep a memory-mapped file open.
    parts: dict[str, Any] = {part: tensors[part].detach().clone() for part in expected}
    if "permutation" in parts:
        _check_permutation(parts["permutation"], shape, name)
    quant_map = ops.codebook("affine4", codes.device)
    metadata = {
        "shape": shape,
        "blocksize": blocksize,
        "dtype": dtype,
        "quant_type": "affine4",
        "turned": is_transposed,
    }
    codes = codes.detach().contiguous()
    return PackedWeight(codes, quant_map=quant_map, nested_blocksize=AFFINE, **metadata, **parts)


def _check_permutation(permutation: Tensor, shape: tuple[int, ...], name: str) -> None:
    if permutation.is_meta:
        return
    if len(shape) != 2 or not torch.equal(permutation.sort().values.cpu(), torch.arange(shape[-1])):
        values = shown(permutation.tolist())
        raise damaged_error(
            name, (f"has permutation={values}, which is not a permutation of the inputs of shape {list(shape)}")
        )


AFFINE4 = FourBitFormat(
    name="affine4",
    settings=_settings,
    quantize=_quantize,
    state=_STATE,
    parts=("absmax", "zeros", "permutation", _STATE),
    to_tensors=to_tensors,
    from_tensors=from_tensors,
    rows_are_blocks=True,
)
