"""Tensors of a 4-bit weight in bitsandbytes' format.

X.weight                                 uint8 [n / 2, 1]; bitsandbytes may view these bytes as another dtype
X.weight.absmax                          fp32 [blocks], or uint8 with double quantization
X.weight.quant_map                       fp32 [16]
X.weight.nested_absmax, .nested_quant_map     fp32 [ceil(blocks / 256)] and [256], with double quantization
X.weight.quant_state.bitsandbytes__nf4   uint8, the bytes of a JSON text; `__fp4` for FP4
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.files.safe_reading import parse_json
from peftcore.ops.weight import DTYPES as FLOATS
from peftcore.ops.weight import PackedWeight
from peftcore.validation import shown

QUANT_TYPES = ("nf4", "fp4")
STATE_KEY = "quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE_KEY + kind for kind in QUANT_TYPES))
STORAGE = (
    torch.uint8,
    torch.int8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
)  # dtypes that packed bytes are viewed as
_STATE_BYTES = 1 << 16
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def check_blocksize(blocksize: Any, name: str = "blocksize") -> None:
    """Raise a PeftcoreError unless the block size is a power of two from 32 to 4096."""
    fits = isinstance(blocksize, int) and not isinstance(blocksize, bool) and 32 <= blocksize <= 4096
    if not fits or blocksize & (blocksize - 1):
        raise PeftcoreError(f"{name} must be a power of two from 32 to 4096, found {shown(blocksize)}")


def check_quant_type(quant_type: Any) -> None:
    """Raise a PeftcoreError unless the type is one of `QUANT_TYPES`."""
    if quant_type not in QUANT_TYPES:
        raise PeftcoreError(f"quant_type={shown(quant_type)} is not known. Choose one of: {', '.join(QUANT_TYPES)}")


def to_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors stored with `X.weight` on disk, by the part of the name after `X.weight.`."""
    facts: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {"absmax": weight.absmax, "quant_map": weight.quant_map}
    nested_absmax, nested_quant_map, nested_offset = weight.nested_absmax, weight.nested_quant_map, weight.nested_offset
    if nested_absmax is not None and nested_quant_map is not None and nested_offset is not None:
        tensors |= {"nested_absmax": nested_absmax, "nested_quant_map": nested_quant_map}
        facts |= {
            "nested_blocksize": weight.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": nested_offset.item(),
        }
    text = json.dumps(facts).encode()
    as_tensor = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    tensors[STATE_KEY + weight.quant_type] = as_tensor.to(weight.absmax.device)
    return tensors


def _facts(tensor: Tensor, name: str) -> dict[str, Any]:
    """Parse the JSON text in a state's tensor."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _STATE_BYTES:
        raise PeftcoreError(f"it is {tensor.dtype} {list(tensor.shape)}, expected the bytes of a short text")
    facts = parse_json(bytes(tensor.tolist()), name)
    if not isinstance(facts, dict):
        raise PeftcoreError(f"it is {shown(facts)}, expected a JSON object")
    return facts


def from_tensors(codes: Tensor, tensors: Mapping[str, Tensor], name: str) -> PackedWeight:
    """Build the weight `name` from its bytes and tensors, checked against each other.

    Raises:
        CheckpointError: a part is missing or does not fit: the file is damaged or has another format.
    """

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"the 4-bit state of '{name}' {what}. The checkpoint is damaged or has another format")

    keys = [key for key in tensors if key.startswith(STATE_KEY)]
    if len(keys) != 1:
        raise wrong(f"needs one tensor '{name}.{STATE_KEY}nf4' or '...fp4', found {keys or 'none'}")
    try:
        facts = _facts(tensors[keys[0]], f"{name}.{keys[0]}")
        fact: Callable[..., Any] = facts.get
        quant_type, blocksize, shape, dtype = map(fact, ("quant_type", "blocksize", "shape", "dtype"))
        check_quant_type(quant_type)
        check_blocksize(blocksize)
        nested_blocksize, offset = fact("nested_blocksize", 256), fact("nested_offset")
        check_blocksize(nested_blocksize, "nested_blocksize")
    except PeftcoreError as error:
        raise wrong(f"cannot be read from '{keys[0]}': {error}") from error
    if quant_type != keys[0].removeprefix(STATE_KEY):
        raise wrong(f"has quant_type={quant_type!r} in '{keys[0]}'")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"has dtype={shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):
        raise wrong(f"has shape={shown(shape)}, which is not the shape of a weight")
    shape, dtype, count = tuple(shape), DTYPES[dtype], math.prod(shape)
    blocks = -(-count // blocksize)
    nested = "nested_absmax" in tensors
    wanted = {"absmax": (torch.uint8 if nested else torch.float32, blocks), "quant_map": (torch.float32, 16)}
    if nested:
        if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
            raise wrong(f"has nested_offset={shown(offset)}, which is not a finite float32")
        wanted["nested_absmax"] = (torch.float32, -(-blocks // nested_blocksize))
        wanted["nested_quant_map"] = (torch.float32, 256)
    for part, (part_dtype, size) in wanted.items():
        found = tensors.get(part)
        if found is None:
            raise wrong(f"lacks '{name}.{part}'")
        if found.dtype != part_dtype or found.shape != (size,):
            raise wrong(f"has '{part}' {found.dtype} {list(found.shape)}, expected {part_dtype} [{size}]")
        if found.is_floating_point() and not found.isfinite().all():
            raise wrong(f"has NaN or Inf in '{part}'")
    if codes.dtype not in STORAGE or codes.dim() != 2 or codes.shape[1] != 1:
        raise wrong(f"has bytes {codes.dtype} {list(codes.shape)}, expected {torch.uint8} [{(count + 1) // 2}, 1]")
    data = codes.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() != (count + 1) // 2:
        raise wrong(f"has {data.numel()} bytes, but shape {list(shape)} needs {(count + 1) // 2}")
    # Copies, so that small parts do not keep a memory-mapped file open.
    parts: dict[str, Any] = {key: tensors[key].detach().clone() for key in wanted}
    if nested:
        offset = torch.tensor(float(offset), dtype=torch.float32, device=parts["absmax"].device)
        parts |= {"nested_offset": offset, "nested_blocksize": nested_blocksize}
    return PackedWeight(data.view(-1, 1), shape=shape, blocksize=blocksize, dtype=dtype, quant_type=quant_type, **parts)
