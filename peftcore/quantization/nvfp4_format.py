"""NVFP4: codes in E2M1 with a scale in E4M3 for each 16 values of a row, and one in fp32 for the matrix (`ops.nvfp4`).

X.weight                              uint8 [n / 2, 1], the even element in the high nibble
X.weight.absmax                       uint8 [blocks], the bits of E4M3
X.weight.nested_absmax                fp32 [1], the scale of the matrix; of experts [experts], or [experts * parts]
                                      where equal parts of their rows have a scale each
X.weight.nested_quant_map             fp32 [256], the values of `absmax` if other than E4M3's: compressed-tensors
                                      divides by a scale instead of multiplying
X.weight.quant_state.peftcore__nvfp4  uint8, the bytes of a JSON text: shape and dtype, and for experts stored as
                                      [experts, out, in], while the parameter is [experts, in, out], turned: true
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from peftcore import ops
from peftcore.errors import PeftcoreError
from peftcore.ops.codebooks import E4M3
from peftcore.ops.nvfp4 import BLOCKSIZE, EXPERT_VALUES, largest_of, matrices, not_finite, nvfp4_weight
from peftcore.ops.weight import PackedWeight
from peftcore.plugin.validation import shown
from peftcore.quantization.four_bit_format import (
    FourBitFormat,
    check_parts,
    check_state,
    damaged_error,
    encode_json,
    state_metadata,
)

_STATE, _GLOBAL, _MAP = "quant_state.peftcore__nvfp4", "nested_absmax", "nested_quant_map"


def _settings(double_quant: bool, blocksize: int) -> tuple[bool, int]:
    """Return the format's fixed settings. NF4's defaults (True, 64) are accepted, because `quantize` passes them."""
    if blocksize not in (64, BLOCKSIZE):
        raise PeftcoreError(
            f"nvfp4 only supports blocksize={BLOCKSIZE}, found blocksize={shown(blocksize)}. Omit the argument"
        )
    return False, BLOCKSIZE


def _quantize(weight: Tensor, blocksize: int, double_quant: bool) -> PackedWeight:
    shape = tuple(weight.shape)
    _check_shape(shape, f"found a weight of shape {list(shape)}. Leave the layer dense: skip=[...]")
    return ops.quantize_nvfp4(weight)


def _check_shape(shape: tuple[int, ...], problem: str) -> None:
    if shape[-1] % BLOCKSIZE:
        raise PeftcoreError(f"nvfp4 needs rows whose length is a multiple of {BLOCKSIZE}, {problem}")
    if len(shape) > 2 and math.prod(shape[-2:]) % EXPERT_VALUES:
        raise PeftcoreError(f"nvfp4 needs experts whose size is a multiple of {EXPERT_VALUES} values, {problem}")


def to_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors stored with `X.weight` on disk, by the part of the name after `X.weight.`."""
    global_scales, scale_map = weight.nested_absmax, weight.nested_quant_map
    assert global_scales is not None and scale_map is not None
    by_matrix = global_scales.reshape(max(matrices(weight.shape), 1), -1)
    is_uniform = bool((by_matrix == by_matrix[:, :1]).all())
    tensors = {"absmax": weight.absmax, _GLOBAL: by_matrix[:, 0].contiguous() if is_uniform else global_scales}
    if not torch.equal(scale_map, E4M3.to(scale_map.device)):
        tensors[_MAP] = scale_map
    return {**tensors, _STATE: encode_json(state_metadata(weight), weight.absmax.device)}


def from_tensors(codes: Tensor, tensors: Mapping[str, Tensor], name: str) -> PackedWeight:
    """Build the weight `name` from its codes and tensors, and check that they are consistent.

    Raises:
        CheckpointError: a tensor is missing or inconsistent, because the file is damaged or has another format.
    """
    _, shape, dtype, is_transposed = check_state(codes, tensors, _STATE, name)
    if not shape:
        raise damaged_error(name, "has the shape of a scalar")
    try:
        _check_shape(shape, f"found shape {list(shape)}")
    except PeftcoreError as error:
        raise damaged_error(name, f"cannot be read from '{_STATE}': {error}") from error
    parts, count = tensors[_GLOBAL].numel() if _GLOBAL in tensors else 0, matrices(shape)
    expected = {"absmax": (torch.uint8, math.prod(shape) // BLOCKSIZE)}
    expected[_GLOBAL] = (torch.float32, count if len(shape) < 3 or not parts or parts % count else parts)
    check_parts(tensors, expected, name)
    scale_map = tensors.get(_MAP)
    if scale_map is not None:
        is_map = scale_map.dtype is torch.float32 and scale_map.shape == (256,)
        if not is_map or not scale_map.isfinite().all():
            description = f"{scale_map.dtype} {list(scale_map.shape)}"
            raise damaged_error(name, f"has '{_MAP}' {description}, expected finite values {torch.float32} [256]")
        scale_map = scale_map.detach().clone()
    # Copies, so that small parts do not keep a memory-mapped file open.
    scales, outer = (tensors[part].detach().clone() for part in expected)
    try:
        weight = nvfp4_weight(codes.detach().contiguous(), scales, outer, shape, dtype, scale_map)
    except ValueError as error:
        raise damaged_error(name, f"has inconsistent tensors: {error}") from error
    if reason := not_finite(weight):
        raise damaged_error(name, reason)
    return weight._replace(turned=is_transposed)


NVFP4 = FourBitFormat(
    name="nvfp4",
    settings=_settings,
    quantize=_quantize,
    state=_STATE,
    parts=("absmax", _GLOBAL, _MAP, _STATE),
    to_tensors=to_tensors,
    from_tensors=from_tensors,
    rows_are_blocks=True,
    quantize_shard=lambda part, largest: ops.quantize_nvfp4(part, largest(largest_of(part))),
)
