"""The record that describes a 4-bit format, and the checks that formats share."""

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

METHOD = "peftcore_4bit"  # quant_method of models in formats that bitsandbytes cannot read
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_STATE_BYTES = 1 << 16


@dataclass(frozen=True)
class FourBitFormat:
    """A 4-bit format: how weights are quantized, and how they are stored on disk.

    `formats.FORMATS` lists the formats. Kernels read a packed weight through its operands (`ops.weight`), so a new
    format needs C++ only for a new kind of scales (csrc/weight/view.h).

    Args:
        name: the `quant_type`.
        settings: (double_quant, blocksize) as passed by the user -> the values that the format applies. Raises
            PeftcoreError for unsupported values.
        quantize: (weight, blocksize, double_quant) -> packed weight.
        state: suffix, after `X.`, of the tensor of JSON metadata that is stored with a weight `X`.
        parts: suffixes, after `X.`, of all tensors that are stored with a weight `X`.
        to_tensors: packed weight -> tensors by suffix.
        from_tensors: (codes of X, tensors by suffix, X) -> packed weight. Raises CheckpointError if the tensors are not
            consistent.
        quant_method: `quantization_config["quant_method"]` of a model in this format.
        rows_are_blocks: True if blocks run along rows, whose length must then be a multiple of the block size; False if
            blocks run over the flattened weight.
        quantize_shard: (rows or columns of a weight, function that all-reduces a tensor by MAX over the ranks) ->
            packed weight, for a format whose scales depend on the full weight; None if blocks are independent.
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
    quantize_shard: Callable[[Tensor, Callable[[Tensor], Tensor]], PackedWeight] | None = None


def check_blocksize(blocksize: Any, name: str = "blocksize") -> None:
    """Raise a PeftcoreError unless the block size is a power of two from 32 to 4096."""
    fits = isinstance(blocksize, int) and not isinstance(blocksize, bool) and 32 <= blocksize <= 4096
    if not fits or blocksize & (blocksize - 1):
        raise PeftcoreError(f"{name} must be a power of two from 32 to 4096, found {shown(blocksize)}")


def damaged_error(name: str, problem: str) -> CheckpointError:
    """Return the error for a stored weight whose 4-bit state is inconsistent."""
    return CheckpointError(f"the 4-bit state of '{name}' {problem}. The checkpoint is damaged or has another format")


def encode_json(metadata: Mapping[str, Any], device: torch.device) -> Tensor:
    """Return `metadata` as a uint8 tensor of JSON text."""
    return torch.frombuffer(bytearray(json.dumps(metadata).encode()), dtype=torch.uint8).to(device)


def decode_json(tensor: Tensor, name: str) -> dict[str, Any]:
    """Parse the JSON object in a uint8 tensor.

    Raises:
        PeftcoreError: the tensor has another dtype or shape, or its text is not a JSON object.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _STATE_BYTES:
        raise PeftcoreError(f"it is {tensor.dtype} {list(tensor.shape)}, expected at most {_STATE_BYTES} bytes of JSON")
    metadata = parse_json(bytes(tensor.tolist()), name)
    if not isinstance(metadata, dict):
        raise PeftcoreError(f"it is {shown(metadata)}, expected a JSON object")
    return metadata


def shape_and_dtype(metadata: Mapping[str, Any], name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape and the original dtype that a state records.

    Raises:
        CheckpointError: the shape or the dtype is invalid.
    """
    shape, dtype = metadata.get("shape"), metadata.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged_error(name, f"has dtype={shown(dtype)}, but it must be one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):
        raise damaged_error(name, f"has shape={shown(shape)}, which is not the shape of a weight")
    return tuple(shape), DTYPES[dtype]


def state_metadata(weight: PackedWeight) -> dict[str, Any]:
    """Return the metadata that all of peftcore's formats store."""
    metadata: dict[str, Any] = {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}
    return {**metadata, "turned": True} if weight.turned else metadata


def check_state(
    codes: Tensor, tensors: Mapping[str, Tensor], state: str, name: str
) -> tuple[dict[str, Any], tuple[int, ...], torch.dtype, bool]:
    """Check the codes of a weight against its state, which `state_metadata` wrote.

    Returns:
        (metadata, shape, dtype, whether the experts are stored transposed)

    Raises:
        CheckpointError: the state is invalid, or its shape does not match the size of the codes.
    """
    try:
        metadata = decode_json(tensors[state], f"{name}.{state}")
    except PeftcoreError as error:
        raise damaged_error(name, f"cannot be read from '{state}': {error}") from error
    (shape, dtype), is_transposed = shape_and_dtype(metadata, name), metadata.get("turned", False)
    if type(is_transposed) is not bool or (is_transposed and len(shape) != 3):
        raise damaged_error(name, f"has turned={shown(is_transposed)} for shape {list(shape)}")
    count = math.prod(shape)
    if codes.dtype is not torch.uint8 or codes.shape != (count // 2, 1) or count % 2:
        raise damaged_error(
            name, f"has bytes {codes.dtype} {list(codes.shape)}, expected {torch.uint8} [{count // 2}, 1]"
        )
    return metadata, shape, dtype, is_transposed


def check_parts(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, int]], name: str) -> None:
    """Raise a CheckpointError unless each expected tensor is present with its dtype and size, and finite."""
    for part, (dtype, size) in expected.items():
        tensor = tensors.get(part)
        if tensor is None:
            raise damaged_error(name, f"lacks '{name}.{part}'")
        if tensor.dtype != dtype or tensor.shape != (size,):
            raise damaged_error(name, f"has '{part}' {tensor.dtype} {list(tensor.shape)}, expected {dtype} [{size}]")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise damaged_error(name, f"has NaN or Inf in '{part}'")
