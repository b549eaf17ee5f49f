"""The state of a 4-bit weight, and the tensors under which bitsandbytes keeps it.

X.weight                                 uint8 [n / 2, 1]; bitsandbytes may view these bytes as another dtype
X.weight.absmax                          fp32 [blocks], or uint8 with double quantization
X.weight.quant_map                       fp32 [16]
X.weight.nested_absmax, .nested_quant_map     fp32 [ceil(blocks / 256)] and [256], with double quantization
X.weight.quant_state.bitsandbytes__nf4   uint8, the bytes of a JSON text; `__fp4` for FP4
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore import ops
from peftcore.adapter_files.content import parse_json
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.ops import NestedScales
from peftcore.validation import shown

QUANT_TYPES = ("nf4", "fp4")
STATE_KEY = "quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE_KEY + kind for kind in QUANT_TYPES))
STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)  # as which packed bytes are viewed
_STATE_BYTES = 1 << 16
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ops.nf4.DTYPES}


@dataclass(frozen=True)
class QuantState:
    """What turns packed bytes back into a weight.

    Args:
        quant_type: `nf4` or `fp4`.
        shape: of the weight, `(out, in)`. dtype: the one it had.
        code: fp32 `[16]`. absmax: fp32, or uint8 with `nested`.
    """

    quant_type: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    absmax: Tensor
    code: Tensor
    nested: NestedScales | None = None


@torch.no_grad()
def pack(
    weight: Tensor, quant_type: str = "nf4", *, blocksize: int = 64, double_quant: bool = True
) -> tuple[Tensor, QuantState]:
    """Quantize a dense weight: (uint8 `[ceil(n / 2), 1]`, its state)."""
    code = ops.codebook(quant_type, weight.device)
    packed, absmax = ops.quantize_4bit(weight, code, blocksize)
    nested = None
    if double_quant:
        absmax, nested = ops.quantize_absmax(absmax, ops.codebook("dynamic8", weight.device))
    return packed, QuantState(quant_type, tuple(weight.shape), weight.dtype, blocksize, absmax, code, nested)


def unpack(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The dense weight, each value rounded once to `dtype`."""
    return ops.dequantize_4bit(
        packed,
        state.absmax,
        state.code,
        shape=state.shape,
        dtype=dtype,
        blocksize=state.blocksize,
        nested=state.nested,
    )


def check_blocksize(blocksize: Any, name: str = "blocksize") -> None:
    """Raise a PeftcoreError unless it is a power of two from 32 to 4096."""
    fits = isinstance(blocksize, int) and not isinstance(blocksize, bool) and 32 <= blocksize <= 4096
    if not fits or blocksize & (blocksize - 1):
        raise PeftcoreError(f"{name} must be a power of two from 32 to 4096, found {shown(blocksize)}")


def check_quant_type(quant_type: Any) -> None:
    """Raise a PeftcoreError unless it is one of `QUANT_TYPES`."""
    if quant_type not in QUANT_TYPES:
        raise PeftcoreError(f"there is no 4-bit type {shown(quant_type)}. Choose one of: {', '.join(QUANT_TYPES)}")


def to_tensors(state: QuantState) -> dict[str, Tensor]:
    """What lies beside `X.weight` on disk, by the part of the name behind `X.weight.`."""
    facts: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    tensors = {"absmax": state.absmax, "quant_map": state.code}
    if state.nested is not None:
        tensors |= {"nested_absmax": state.nested.absmax, "nested_quant_map": state.nested.code}
        facts |= {
            "nested_blocksize": state.nested.blocksize,
            "nested_dtype": "float32",
            "nested_offset": state.nested.offset.item(),
        }
    text = json.dumps(facts).encode()
    tensors[STATE_KEY + state.quant_type] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(state.absmax.device)
    return tensors


def _facts(tensor: Tensor, name: str) -> dict[str, Any]:
    """What the JSON text in a state's tensor says."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _STATE_BYTES:
        raise PeftcoreError(f"it is {tensor.dtype} {list(tensor.shape)}, where the bytes of a short text belong")
    facts = parse_json(bytes(tensor.tolist()), name)
    if not isinstance(facts, dict):
        raise PeftcoreError(f"it is {shown(facts)}, no table")
    return facts


def from_tensors(packed: Tensor, tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, QuantState]:
    """The packed bytes and the state of the weight `name`, from the tensors beside it, checked against each other.

    Raises:
        CheckpointError: a part is missing or does not fit; the file is damaged or not in this format.
    """

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"the 4-bit state of '{name}' {what}. The checkpoint is damaged, or of another format")

    keys = [key for key in tensors if key.startswith(STATE_KEY)]
    if len(keys) != 1:
        raise wrong(f"needs one tensor '{name}.{STATE_KEY}nf4' or '...fp4', found {keys or 'none'}")
    try:
        facts = _facts(tensors[keys[0]], f"{name}.{keys[0]}")
        quant_type, blocksize, shape, dtype = (facts.get(key) for key in ("quant_type", "blocksize", "shape", "dtype"))
        check_quant_type(quant_type)
        check_blocksize(blocksize)
        nested_blocksize, offset = facts.get("nested_blocksize", 256), facts.get("nested_offset")
        check_blocksize(nested_blocksize, "nested_blocksize")
    except PeftcoreError as error:
        raise wrong(f"cannot be read from '{keys[0]}': {error}") from error
    if quant_type != keys[0].removeprefix(STATE_KEY):
        raise wrong(f"has quant_type={quant_type!r} in '{keys[0]}'")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"has dtype={shown(dtype)}, where {', '.join(DTYPES)} are known")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):
        raise wrong(f"has shape={shown(shape)}, which is no shape of a weight")
    shape, dtype, count = tuple(shape), DTYPES[dtype], math.prod(shape)
    blocks = -(-count // blocksize)
    nested = "nested_absmax" in tensors
    wanted = {"absmax": (torch.uint8 if nested else torch.float32, blocks), "quant_map": (torch.float32, 16)}
    if nested:
        if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
            raise wrong(f"has nested_offset={shown(offset)}, which is no finite number of float32")
        wanted["nested_absmax"] = (torch.float32, -(-blocks // nested_blocksize))
        wanted["nested_quant_map"] = (torch.float32, 256)
    for part, (part_dtype, size) in wanted.items():
        found = tensors.get(part)
        if found is None:
            raise wrong(f"lacks '{name}.{part}'")
        if found.dtype != part_dtype or found.shape != (size,):
            raise wrong(f"has '{part}' {found.dtype} {list(found.shape)}, where {part_dtype} [{size}] belongs")
        if found.is_floating_point() and not found.isfinite().all():
            raise wrong(f"has values in '{part}' that are not finite")
    if packed.dtype not in STORAGE or packed.dim() != 2 or packed.shape[1] != 1:
        raise wrong(
            f"has bytes {packed.dtype} {list(packed.shape)}, where {torch.uint8} [{(count + 1) // 2}, 1] belongs"
        )
    data = packed.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() != (count + 1) // 2:
        raise wrong(f"has {data.numel()} bytes, where shape {list(shape)} takes {(count + 1) // 2}")
    # Copies: a file that is mapped into memory must not stay mapped for the small parts.
    part = {key: tensors[key].detach().clone() for key in wanted}
    scales = None
    if nested:
        offset = torch.tensor(float(offset), dtype=torch.float32, device=part["absmax"].device)
        scales = NestedScales(part["nested_absmax"], part["nested_quant_map"], offset, nested_blocksize)
    state = QuantState(
        quant_type, shape, dtype, blocksize, part["absmax"].reshape(-1), part["quant_map"].reshape(-1), scales
    )
    return data.view(-1, 1), state
