"""NF4 and FP4: 4-bit codes of a codebook, stored in bitsandbytes' format.

X.weight                                 uint8 [n / 2, 1]; bitsandbytes may view these bytes as another dtype
X.weight.absmax                          fp32 [blocks], or uint8 with double quantization
X.weight.quant_map                       fp32 [16]
X.weight.nested_absmax, .nested_quant_map     fp32 [ceil(blocks / 256)] and [256], with double quantization
X.weight.quant_state.bitsandbytes__nf4   uint8, the bytes of a JSON text; `__fp4` for FP4
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftcore import ops
from peftcore.errors import PeftcoreError
from peftcore.ops.weight import PackedWeight
from peftcore.plugin.validation import shown
from peftcore.quantization.four_bit_format import (
    FourBitFormat,
    check_blocksize,
    check_parts,
    damaged_error,
    decode_json,
    encode_json,
    shape_and_dtype,
)

STATE_KEY = "quant_state.bitsandbytes__"
_STORAGE = (  # values of bitsandbytes' quant_storage: dtypes in which packed bytes may be stored
    torch.uint8,
    torch.int8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
)


def to_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors stored with `X.weight` on disk, by the part of the name after `X.weight.`."""
    metadata: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {"absmax": weight.absmax, "quant_map": weight.quant_map}
    nested_absmax, nested_quant_map, nested_offset = weight.nested_absmax, weight.nested_quant_map, weight.nested_offset
    if nested_absmax is not None and nested_quant_map is not None and nested_offset is not None:
        tensors |= {"nested_absmax": nested_absmax, "nested_quant_map": nested_quant_map}
        metadata |= {
            "nested_blocksize": weight.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": nested_offset.item(),
        }
    return {**tensors, STATE_KEY + weight.quant_type: encode_json(metadata, weight.absmax.device)}


def from_tensors(codes: Tensor, tensors: Mapping[str, Tensor], name: str, quant_type: str) -> PackedWeight:
    """Build the weight `name` from its codes and tensors, and check that they are consistent.

    Raises:
        CheckpointError: a tensor is missing or inconsistent, because the file is damaged or has another format.
    """
    key = STATE_KEY + quant_type
    try:
        metadata = decode_json(tensors[key], f"{name}.{key}")
        blocksize, nested_blocksize = metadata.get("blocksize"), metadata.get("nested_blocksize", 256)
        check_blocksize(blocksize)
        check_blocksize(nested_blocksize, "nested_blocksize")
    except PeftcoreError as error:
        raise damaged_error(name, f"cannot be read from '{key}': {error}") from error
    if metadata.get("quant_type") != quant_type:
        raise damaged_error(name, f"has quant_type={shown(metadata.get('quant_type'))} in '{key}'")
    shape, dtype = shape_and_dtype(metadata, name)
    offset: Any = metadata.get("nested_offset")
    assert blocksize is not None
    count = math.prod(shape)
    blocks, is_nested = -(-count // blocksize), "nested_absmax" in tensors
    expected_parts = {"absmax": (torch.uint8 if is_nested else torch.float32, blocks), "quant_map": (torch.float32, 16)}
    if is_nested:
        if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
            raise damaged_error(name, f"has nested_offset={shown(offset)}, which is not a finite float32")
        expected_parts["nested_absmax"] = (torch.float32, -(-blocks // nested_blocksize))
        expected_parts["nested_quant_map"] = (torch.float32, 256)
    check_parts(tensors, expected_parts, name)
    if codes.dtype not in _STORAGE or codes.dim() != 2 or codes.shape[1] != 1:
        expected = f"expected {torch.uint8} [{(count + 1) // 2}, 1]"
        raise damaged_error(name, f"has bytes {codes.dtype} {list(codes.shape)}, {expected}")
    data = codes.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() != (count + 1) // 2:
        raise damaged_error(name, f"has {data.numel()} bytes, but shape {list(shape)} needs {(count + 1) // 2}")
    # Copies, so that small parts do not keep a memory-mapped file open.
    parts: dict[str, Any] = {part: tensors[part].detach().clone() for part in expected_parts}
    if is_nested:
        offset = torch.tensor(float(offset), dtype=torch.float32, device=parts["absmax"].device)
        parts |= {"nested_offset": offset, "nested_blocksize": nested_blocksize}
    return PackedWeight(data.view(-1, 1), shape=shape, blocksize=blocksize, dtype=dtype, quant_type=quant_type, **parts)


def _settings(double_quant: bool, blocksize: int) -> tuple[bool, int]:
    check_blocksize(blocksize)
    return double_quant, blocksize


def _format(name: str) -> FourBitFormat:
    def quantize(weight: Tensor, blocksize: int, double_quant: bool) -> PackedWeight:
        return ops.quantize_4bit(weight, name, blocksize=blocksize, double_quant=double_quant)

    return FourBitFormat(
        name=name,
        settings=_settings,
        quantize=quantize,
        state=STATE_KEY + name,
        parts=("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY + name),
        to_tensors=to_tensors,
        from_tensors=partial(from_tensors, quant_type=name),
        quant_method="bitsandbytes",
    )


NF4, FP4 = _format("nf4"), _format("fp4")
