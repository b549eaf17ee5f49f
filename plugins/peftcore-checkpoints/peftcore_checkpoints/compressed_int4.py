"""Reader of int4 checkpoints of compressed-tensors (W4A16), in its format `pack-quantized`.

`nvfp4.py` reads the NVFP4 checkpoints of the same tool. Layer X has these tensors; words are int32 with the first value
in the lowest four bits:

    X.weight_packed       words [out, ceil(in / 8)], eight inputs each
    X.weight_scale        [out, groups]
    X.weight_zero_point   words [ceil(out / 8), groups], eight outputs each; before version 0.9, int8 [out, groups] from
                          -8 to 7; absent in symmetric layers, where each zero is 8
    X.weight_shape        int64 [2]
    X.weight_g_idx        int32 [in], the group of each input (act-order); may be absent

Source: compressors/pack_quantized of vllm-project/compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftcore.ops.mxfp4 import swap_nibbles
from peftcore.plugin import CheckpointLayout, validation
from peftcore_checkpoints.configs import config_groups, damaged_error, refuse_transforms, unsupported_error
from peftcore_checkpoints.int4 import Int4Scheme, Int4Weight, int4_layout
from peftcore_checkpoints.int4_tensors import (
    CHUNK_ROWS,
    check_scales,
    check_tensor,
    input_order,
    inputs_per_group,
    none_if_default,
    pack_codes,
    require_tensors,
    unpack_nibbles,
)

_TOOL = "compressed-tensors"
_ADVICE = "Use a W4A16 checkpoint of the model, or the dense checkpoint"
_TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def compressed_int4_layout(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout:
    """Return the layout of an int4 checkpoint of compressed-tensors with this `quantization_config`.

    Raises:
        PeftcoreError: the layout is not supported.
    """
    groups = config_groups(config, checkpoint)
    default_format = config.get("format")
    group_formats = [group.get("format") or default_format for group, _ in groups.values()]
    for file_format in (default_format, *group_formats):
        if file_format != "pack-quantized":
            problem = f"{_TOOL} in the format {validation.shown(file_format)}"
            raise unsupported_error(checkpoint, problem, "the format 'pack-quantized'", _ADVICE)
    for name, (group, weights) in groups.items():
        number_type, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
        if (number_type, bits) != ("int", 4) or strategy not in ("group", "channel"):
            problem = f"{_TOOL} with weights of {number_type}{bits} per {strategy} in '{name}'"
            raise unsupported_error(checkpoint, problem, "int4 per group or channel", _ADVICE)
        if group.get("input_activations") is not None:
            raise unsupported_error(checkpoint, f"{_TOOL} with quantized inputs in '{name}'", "W4A16", _ADVICE)
    refuse_transforms(config, checkpoint, _ADVICE)
    # Symmetric layers have no zero points. If layers of both kinds were allowed, an asymmetric layer that lost its zero
    # points would be read as a symmetric one.
    symmetric = {bool(weights.get("symmetric", True)) for _, weights in groups.values()}
    if len(symmetric) > 1:
        problem = f"{_TOOL} with symmetric and asymmetric groups"
        raise unsupported_error(checkpoint, problem, "groups of one kind", _ADVICE)
    _, weights = next(iter(groups.values()), ({}, {}))
    scheme = Int4Scheme(
        group=weights.get("group_size") or -1,
        has_zeros=not weights.get("symmetric", True),
        is_ordered=weights.get("actorder") in ("group", "dynamic"),
    )
    read = partial(_read_weight, needs_zeros=scheme.has_zeros)
    return int4_layout(_TOOL, _TENSORS, read, config, scheme)


def _read_weight(tensors: Mapping[str, Tensor], name: str, *, needs_zeros: bool) -> Int4Weight:
    """Read a weight.

    Args:
        tensors: the tensors of the layer by suffix.
        name: name of the layer, for errors.
        needs_zeros: the config is asymmetric: a weight without zero points is an error.

    Raises:
        CheckpointError: a tensor is missing or does not fit the layout.
    """
    packed_weight, scales, shape = require_tensors(tensors, ("weight_packed", "weight_scale", "weight_shape"), name)
    check_tensor(shape, torch.int32 if shape.dtype is torch.int32 else torch.int64, (2,), "weight_shape", name)
    rows, columns = (int(size) for size in shape.tolist())
    check_tensor(packed_weight, torch.int32, (rows, -(-columns // 8)), "weight_packed", name)
    groups = scales.shape[-1]
    check_scales(scales, (rows, groups), "weight_scale", name)
    group = inputs_per_group(columns, groups, None, name)
    g_idx = tensors.get("weight_g_idx")
    order = None if g_idx is None else input_order(g_idx, groups, group, name)
    zero_points = tensors.get("weight_zero_point")
    if zero_points is None and needs_zeros:
        raise damaged_error(name, "lacks 'weight_zero_point', but the config says symmetric=false")
    zeros = None
    if zero_points is not None:
        zeros = none_if_default(_read_zeros(zero_points, rows, groups, name))
    if order is None and columns % 8 == 0:
        codes = swap_nibbles(packed_weight.detach().clone().view(torch.uint8)).view(-1, 1)
    else:
        # Select the columns also without act-order: the last word of a row may have fewer than eight of them.
        selection = slice(columns) if order is None else order
        chunks = packed_weight.split(CHUNK_ROWS)
        codes = torch.cat([pack_codes(unpack_nibbles(chunk)[:, selection]) for chunk in chunks])
    return Int4Weight(codes, scales.contiguous(), zeros, (rows, columns), group, order)


def _read_zeros(zero_points: Tensor, rows: int, groups: int, name: str) -> Tensor:
    """Return the zeros, uint8 `[out, groups]`, from int8 values or int32 words."""
    if zero_points.dtype is torch.int8:
        check_tensor(zero_points, torch.int8, (rows, groups), "weight_zero_point", name)
        zeros = (zero_points.to(torch.int16) + 8).to(torch.uint8)
        if (zeros > 15).any():
            raise damaged_error(name, "has values of 'weight_zero_point' outside -8..7")
        return zeros
    check_tensor(zero_points, torch.int32, (-(-rows // 8), groups), "weight_zero_point", name)
    return unpack_nibbles(zero_points.T.contiguous())[:, :rows].T.contiguous()
