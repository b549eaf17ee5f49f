"""Description of a 4-bit format, and checks that formats share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.ops.weight import DTYPES as FLOATS, PackedWeight
from peftcore.plugin.safe_reading import parse_json
from peftcore.plugin.validation import shown

METHOD = "peftcore_4bit"  # quant_method of models that bitsandbytes does not read
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_STATE_BYTES = 1 << 16


@dataclass(frozen=True)
class FourBitFormat:
    """A 4-bit format: how weights are quantized, and how they are stored on disk.

    `formats.FORMATS` has all of them. The kernels read a packed weight by its operands (`ops.weight`), so that a format
    adds C++ only for a new kind of scales (csrc/weight/view.h).

    Args:
        name: the `quant_type`.
        settings: (double_quant, blocksize) as a user gives them -> the values that the format uses. Raises
            PeftcoreError for values that it lacks.
        quantize: (weight, blocksize, double_quant) -> packed weight.
        state: name, after `X.`, of the tensor with facts in JSON that is stored with a weight `X`.
        parts: names of all tensors that are stored with a weight `X`, after `X.`.
        to_tensors: packed weight -> tensors by part.
        from_tensors: (bytes of X, tensors by part, X) -> packed weight, all checked against each other. Raises
            CheckpointError.
        quant_method: `quantization_config["quant_method"]` of a model in this format.
        rows_are_blocks: blocks are parts of a row along the input dimension, which must be a multiple of a block. If
            False, blocks run over the flattened weight.
        quantize_part: (rows or columns of a weight, function that returns the largest value of a tensor over all ranks'
            parts) -> packed weight, if it depends on the whole weight; None if blocks are quantized one by one.
    """

    name: str
    settings: Callable[[bool, int], tuple[bool, int]]
    quantize: Callable[[Tensor, int, bool], PackedWeight]
    state: str
    parts: tuple[str, ...]
    to_tensors: Callable[[PackedWeight], dict[str, Tensor]]
    from_tensors: Callable[[Tensor, Mapping[str, Tensor], str], PackedWeight]
    quant_method: str = METHOD
    rows_are_blocks: bool = False
    quantize_part: Callable[[Tensor, Callable[[Tensor], Tensor]], PackedWeight] | None = None


def check_blocksize(blocksize: Any, name: str = "blocksize") -> None:
    """Raise a PeftcoreError unless the block size is a power of two from 32 to 4096."""
    fits = isinstance(blocksize, int) and not isinstance(blocksize, bool) and 32 <= blocksize <= 4096
    if not fits or blocksize & (blocksize - 1):
        raise PeftcoreError(f"{name} must be a power of two from 32 to 4096, found {shown(blocksize)}")


def damaged(name: str, problem: str) -> CheckpointError:
    """Return the error for a stored weight whose 4-bit state is wrong."""
    return CheckpointError(f"the 4-bit state of '{name}' {problem}. The checkpoint is damaged or has another format")


def encoded(facts: Mapping[str, Any], device: torch.device) -> Tensor:
    """Return the bytes of a JSON text as a tensor."""
    return torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8).to(device)


def decoded(tensor: Tensor, name: str) -> dict[str, Any]:
    """Return the JSON object in a state's tensor.

    Raises:
        PeftcoreError: it is another tensor or text.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _STATE_BYTES:
        raise PeftcoreError(f"it is {tensor.dtype} {list(tensor.shape)}, expected the bytes of a short text")
    facts = parse_json(bytes(tensor.tolist()), name)
    if not isinstance(facts, dict):
        raise PeftcoreError(f"it is {shown(facts)}, expected a JSON object")
    return facts


def shape_and_dtype(facts: Mapping[str, Any], name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape and the original dtype that a state records.

    Raises:
        CheckpointError: a value is not one.
    """
    shape, dtype = facts.get("shape"), facts.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(name, f"has dtype={shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):
        raise damaged(name, f"has shape={shown(shape)}, which is not the shape of a weight")
    return tuple(shape), DTYPES[dtype]


def facts_of(weight: PackedWeight) -> dict[str, Any]:
    """Return the facts that the state of every format of peftcore's own records."""
    facts: dict[str, Any] = {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}
    return {**facts, "turned": True} if weight.turned else facts


def check_state(
    codes: Tensor, tensors: Mapping[str, Tensor], state: str, name: str
) -> tuple[dict[str, Any], tuple[int, ...], torch.dtype, bool]:
    """Return (facts, shape, dtype, turned) of a weight whose state was made by `facts_of`, and check its bytes.

    Raises:
        CheckpointError: the state or the bytes do not fit.
    """
    try:
        facts = decoded(tensors[state], f"{name}.{state}")
    except PeftcoreError as error:
        raise damaged(name, f"cannot be read from '{state}': {error}") from error
    (shape, dtype), is_turned = shape_and_dtype(facts, name), facts.get("turned", False)
    if type(is_turned) is not bool or (is_turned and len(shape) != 3):
        raise damaged(name, f"has turned={shown(is_turned)} for shape {list(shape)}")
    count = math.prod(shape)
    if codes.dtype is not torch.uint8 or codes.shape != (count // 2, 1) or count % 2:
        raise damaged(name, f"has bytes {codes.dtype} {list(codes.shape)}, expected {torch.uint8} [{count // 2}, 1]")
    return facts, shape, dtype, is_turned


def check_parts(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, int]], name: str) -> None:
    """Raise a CheckpointError unless each wanted part is there with its dtype and size, and finite."""
    for part, (dtype, size) in expected.items():
        tensor = tensors.get(part)
        if tensor is None:
            raise damaged(name, f"lacks '{name}.{part}'")
        if tensor.dtype != dtype or tensor.shape != (size,):
            raise damaged(name, f"has '{part}' {tensor.dtype} {list(tensor.shape)}, expected {dtype} [{size}]")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise damaged(name, f"has NaN or Inf in '{part}'")
