"""What the readers of int4 checkpoints share: checks of the tensors, packing and unpacking of 4-bit values.

The checks raise CheckpointError with the name of the layer. All tools pack eight 4-bit values into an int32 word, the
first value in the lowest four bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftcore.ops.weight import DTYPES
from peftcore.plugin import PeftcoreError, validation
from peftcore_checkpoints.configs import damaged_error

CHUNK_ROWS = 256  # readers unpack this many rows of a weight at a time, to bound temporary memory


def group_size(config_value: Any, checkpoint: str) -> int | None:
    """Check the `group_size` of a config. Return the number of inputs in a group; None for one group per row.

    Raises:
        PeftcoreError: the value is not a positive number or -1.
    """
    if type(config_value) is not int or (config_value <= 0 and config_value != -1):
        raise PeftcoreError(
            f"'{checkpoint}' has group_size={validation.shown(config_value)} in its config, expected a positive "
            "number or -1"
        )
    return None if config_value == -1 else config_value


def require_tensors(tensors: Mapping[str, Tensor], suffixes: tuple[str, ...], name: str) -> list[Tensor]:
    """Return the tensors with these suffixes.

    Raises:
        CheckpointError: a tensor is missing, or has the wrong number of dimensions.
    """
    for suffix in suffixes:
        if suffix not in tensors:
            raise damaged_error(name, f"lacks '{name}.{suffix}'")
    for suffix in suffixes:
        dimensions = 1 if suffix == "weight_shape" else 2
        if tensors[suffix].dim() != dimensions:
            raise damaged_error(name, f"has '{suffix}' of shape {list(tensors[suffix].shape)}")
    return [tensors[suffix] for suffix in suffixes]


def check_tensor(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], suffix: str, name: str) -> None:
    """Raise a CheckpointError if a tensor does not have this dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        description = f"{tensor.dtype} {list(tensor.shape)}"
        raise damaged_error(name, f"has '{suffix}' {description}, expected {dtype} {list(shape)}")


def check_scales(scales: Tensor, shape: tuple[int, int], suffix: str, name: str) -> None:
    """Raise a CheckpointError if scales do not have this shape and a supported dtype, or are not finite."""
    if scales.dtype not in DTYPES:
        raise damaged_error(name, f"has '{suffix}' {scales.dtype}, expected float32, float16 or bfloat16")
    check_tensor(scales, scales.dtype, shape, suffix, name)
    if not scales.isfinite().all():
        raise damaged_error(name, f"has NaN or Inf in '{suffix}'")


def inputs_per_group(columns: int, groups: int, config_size: int | None, name: str) -> int:
    """Return the number of inputs that share a scale, from the shape of the scales.

    Args:
        columns: number of inputs.
        groups: number of groups in a row, as the scales have them.
        config_size: number of inputs in a group in the config; None if the scales alone decide.
        name: name of the layer, for errors.

    Raises:
        CheckpointError: the inputs cannot be divided into the groups, or the config has another group size.
    """
    if columns % 2 or not groups or columns % groups:
        raise damaged_error(name, f"has {groups} groups for {columns} inputs")
    size = columns // groups
    # A group size above the number of inputs is allowed: the row is then one group.
    if config_size is not None and config_size != size and config_size < columns:
        raise damaged_error(
            name, f"has {groups} groups for {columns} inputs, but the config says group_size={config_size}"
        )
    return size


def input_order(g_idx: Tensor, groups: int, size: int, name: str) -> Tensor | None:
    """Return the inputs sorted by group, int64 `[in]`; None if they already are in this order.

    Args:
        g_idx: int `[in]`, the group of each input. All -1: there is no act-order.
        groups: number of groups.
        size: number of inputs in a group.
        name: name of the layer, for errors.

    Raises:
        CheckpointError: `g_idx` has another shape or dtype, or its groups differ in size.
    """
    columns = groups * size
    if g_idx.is_floating_point() or g_idx.shape != (columns,):
        raise damaged_error(name, f"has g_idx {g_idx.dtype} {list(g_idx.shape)}, expected {torch.int32} [{columns}]")
    # compressed-tensors initializes g_idx with -1 and only fills it with act-order.
    if (g_idx == -1).all():
        return None
    order = torch.argsort(g_idx, stable=True)
    expected_groups = torch.arange(groups, device=g_idx.device).repeat_interleave(size)
    if not torch.equal(g_idx[order].long(), expected_groups):
        raise damaged_error(name, f"has a g_idx whose {groups} groups do not have {size} inputs each")
    is_sorted = torch.equal(order, torch.arange(columns, device=order.device))
    return None if is_sorted else order


def unpack_nibbles(words: Tensor) -> Tensor:
    """Unpack int32 words `[..., n]` to uint8 `[..., 8 n]`, the lowest four bits first."""
    code_pairs = words.contiguous().view(torch.uint8)
    return torch.stack((code_pairs & 15, code_pairs >> 4), -1).flatten(-2)


def pack_codes(codes: Tensor) -> Tensor:
    """Pack codes `[out, in]` to uint8 `[out * in / 2, 1]`, the even column in the high nibble."""
    return (codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1)


def none_if_default(zeros: Tensor) -> Tensor | None:
    """Return None if all zeros are 8, the default of affine4, otherwise the zeros."""
    return None if (zeros == 8).all() else zeros
