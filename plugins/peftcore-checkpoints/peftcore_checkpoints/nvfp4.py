"""Reader of NVFP4 checkpoints: ModelOpt and compressed-tensors.

A weight W `[out, in]` is code * scale, with codes in E2M1 and one scale for each row and 16 inputs. The scale is an
E4M3 number, multiplied (ModelOpt) or divided (compressed-tensors) in fp32 by a scale of the whole weight. Layer X has:

ModelOpt
    X.weight               uint8 [out, in / 2], the even input in the lowest four bits
    X.weight_scale         E4M3 [out, in / 16]
    X.weight_scale_2       fp32, one number, which multiplies
    X.input_scale          ignored
compressed-tensors (`nvfp4-pack-quantized`)
    X.weight_packed        uint8 [out, in / 2] likewise
    X.weight_scale         E4M3 [out, in / 16]
    X.weight_global_scale  fp32 [1], which divides
    X.input_global_scale   ignored

In W4A4 checkpoints the tools also round the inputs of layers to NVFP4. peftcore does not, and warns.

Sources: modelopt/torch/quantization/qtensor/nvfp4_tensor.py and modelopt/torch/export of nvidia-modelopt 0.47,
compressors/nvfp4 of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from peftcore.ops import PackedWeight
from peftcore.ops.codebooks import E4M3
from peftcore.ops.huge_pages import in_huge_pages
from peftcore.ops.mxfp4 import swap_nibbles
from peftcore.ops.nvfp4 import BLOCKSIZE, not_finite, nvfp4_weight
from peftcore.plugin import CheckpointLayout, PeftcoreError, validation
from peftcore_checkpoints.configs import (
    config_groups,
    damaged_error,
    dense_layers,
    refuse_transforms,
    unsupported_error,
)

_PACKED, _WEIGHT = "weight_packed", "weight"
_SCALE_2, _DIVISOR = "weight_scale_2", "weight_global_scale"  # the scale of a whole weight: a factor, or a divisor
_CODE_OF_ONE = 56  # E4M3's code of 1
_KIND = "NVFP4"
_WARNING = "'{}' specifies 4-bit inputs of layers, which peftcore does not round: only the weights are in NVFP4"
_ADVICE = "Use a checkpoint in NVFP4, or the dense checkpoint"


def modelopt_layout(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout:
    """Return the layout of an NVFP4 checkpoint of ModelOpt with this `quantization_config`.

    Raises:
        PeftcoreError: the layout is not supported.
    """
    algorithm = config.get("quant_algo")
    if algorithm not in ("NVFP4", "W4A16_NVFP4"):
        raise unsupported_error(
            checkpoint, f"ModelOpt in {validation.shown(algorithm)}", "'NVFP4' and 'W4A16_NVFP4'", _ADVICE
        )
    sizes = (weights.get("group_size") for _, weights in config_groups(config, checkpoint).values())
    _check_sizes([config.get("group_size"), *sizes], "ModelOpt", checkpoint)
    warning = _WARNING.format(checkpoint) if algorithm == "NVFP4" else ""
    return _layout("ModelOpt", _SCALE_2, "input_scale", config, warning)


def is_nvfp4(config: Mapping[str, Any], checkpoint: str) -> bool:
    """Return whether a `quantization_config` of compressed-tensors has weights in NVFP4."""
    groups = config_groups(config, checkpoint).values()
    return "nvfp4-pack-quantized" in (config.get("format"), *(group.get("format") for group, _ in groups))


def compressed_tensors_layout(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout:
    """Return the layout of an NVFP4 checkpoint of compressed-tensors with this `quantization_config`.

    Raises:
        PeftcoreError: the layout is not supported.
    """
    tool, advice = "compressed-tensors", "Use a checkpoint with a single format, or the dense checkpoint"
    groups = config_groups(config, checkpoint).values()
    for group, weights in groups:
        kind = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
        file_format = group.get("format") or config.get("format")
        if file_format != "nvfp4-pack-quantized" or kind != ("float", 4, "tensor_group"):
            other_format = f"{validation.shown(file_format)} with weights of {kind[0]}{kind[1]}"
            problem = f"{tool} in several formats, of which one is {other_format}"
            raise unsupported_error(checkpoint, problem, "'nvfp4-pack-quantized' by itself", advice)
        if not weights.get("symmetric", True):
            raise unsupported_error(checkpoint, f"{tool} with zero points", "symmetric weights", advice)
    _check_sizes([weights.get("group_size") for _, weights in groups], tool, checkpoint)
    refuse_transforms(config, checkpoint, advice)
    has_inputs = any(group.get("input_activations") is not None for group, _ in groups)
    return _layout(tool, _DIVISOR, "input_global_scale", config, _WARNING.format(checkpoint) if has_inputs else "")


def _check_sizes(sizes: Iterable[Any], tool: str, checkpoint: str) -> None:
    for size in sizes:
        if size not in (None, BLOCKSIZE):
            raise unsupported_error(
                checkpoint, f"{tool} in groups of {validation.shown(size)}", f"groups of {BLOCKSIZE}", _ADVICE
            )


def _layout(tool: str, outer: str, unread: str, config: Mapping[str, Any], warning: str) -> CheckpointLayout:
    """Return a layout. `outer` is the name of the scale of a whole weight, `unread` that of the scale of inputs."""
    return CheckpointLayout(
        tool,
        _KIND,
        "nvfp4",
        (_PACKED, "weight_scale", outer),
        partial(_read, outer=outer),
        lambda weight, dtype, name: weight._replace(dtype=dtype, codes=in_huge_pages(weight.codes)),
        join_experts,
        empty_nvfp4,
        dense_layers(config),
        known_by=outer,
        ignored=(unread,),
        packed_names=nvfp4_weight_names if outer == _SCALE_2 else None,
        warning=warning,
    )


# --- reading a weight --------------------------------------------------------------------------------------------


def _read(tensors: Mapping[str, Tensor], name: str, *, outer: str) -> PackedWeight:
    """Read a weight. `outer` is the name of the scale of the whole weight."""
    is_modelopt = outer == _SCALE_2
    for part in (_PACKED, "weight_scale", outer):
        if part not in tensors:
            raise damaged_error(name, f"lacks '{name}.{_WEIGHT if is_modelopt and part == _PACKED else part}'", _KIND)
    packed, scales, weight_scale = tensors[_PACKED], tensors["weight_scale"], tensors[outer]
    rows, columns = (packed.shape[0], 2 * packed.shape[1]) if packed.dim() == 2 else (0, 0)
    if packed.dtype is not torch.uint8 or packed.dim() != 2 or columns % BLOCKSIZE:
        raise damaged_error(
            name, f"has codes {packed.dtype} {list(packed.shape)}, expected {torch.uint8} [out, in / 2]", _KIND
        )
    expected_shape = [rows, columns // BLOCKSIZE]
    if scales.dtype is not torch.float8_e4m3fn or list(scales.shape) != expected_shape:
        actual = f"{scales.dtype} {list(scales.shape)}"
        raise damaged_error(
            name, f"has 'weight_scale' {actual}, expected {torch.float8_e4m3fn} {expected_shape}", _KIND
        )
    if (
        weight_scale.dtype is not torch.float32
        or weight_scale.numel() != 1
        or not weight_scale.isfinite().all()
        or not weight_scale.all()
    ):
        actual = f"{weight_scale.dtype} {list(weight_scale.shape)}"
        if weight_scale.numel() == 1:
            actual += f" = {weight_scale.item()}"
        raise damaged_error(name, f"has '{outer}' {actual}, expected a number of {torch.float32} that is not 0", _KIND)
    codes = swap_nibbles(packed.detach().clone()).view(-1, 1)
    scale_bits = scales.contiguous().view(torch.uint8).reshape(-1).clone()
    weight_scale, scale_map = weight_scale.reshape(1).clone(), None
    if outer == _DIVISOR:  # a table of the 256 quotients is exact; multiplying by the reciprocal is not
        scale_map, weight_scale = E4M3.to(weight_scale.device) / weight_scale, torch.ones_like(weight_scale)
    weight = nvfp4_weight(codes, scale_bits, weight_scale, (rows, columns), torch.float32, scale_map)
    if reason := not_finite(weight):
        raise damaged_error(name, reason, _KIND)
    return weight


def join_experts(parts: Sequence[PackedWeight], experts: int, name: str) -> PackedWeight:
    """Concatenate NVFP4 weights of single experts into the parameter `name` `[experts, out, in]`.

    All experts share one table of scales. If compressed-tensors divides the parts by different scales, they are
    multiplied by the reciprocals in fp32 instead, which may differ from the quotients by two units in the last place.

    Args:
        parts: the projections of each expert, one expert after the other.
        experts: number of experts.
        name: name of the parameter, for errors.

    Raises:
        PeftcoreError: the parts differ in shape, or their sizes are not multiples of 512 values.
    """
    first, projections = parts[0], len(parts) // experts
    if len({part.shape for part in parts}) > 1:
        raise damaged_error(name, "has experts of different shapes", _KIND)
    tables = [part.nested_quant_map for part in parts]
    assert all(table is not None for table in tables)
    shared, scales = tables[0], [part.nested_absmax[:1] for part in parts]  # type: ignore[index]
    if not all(torch.equal(table, shared) for table in tables):  # type: ignore[arg-type]
        scales = [scale * table[_CODE_OF_ONE] for scale, table in zip(scales, tables, strict=True)]  # type: ignore[index]
        shared = None
    shape = experts, projections * first.shape[0], first.shape[1]
    codes, bits = torch.cat([part.codes for part in parts]), torch.cat([part.absmax for part in parts])
    try:
        return nvfp4_weight(codes, bits, torch.cat(scales), shape, first.dtype, shared)
    except ValueError as error:
        raise PeftcoreError(f"'{name}' has experts in NVFP4 that cannot be read: {error}. {_ADVICE}") from error


def empty_nvfp4(shape: tuple[int, ...], dtype: torch.dtype, _path: str) -> PackedWeight:
    """Return an uninitialized NVFP4 weight, for memory estimates."""
    count = torch.Size(shape).numel()
    codes, scales = torch.empty(count // 2, 1, dtype=torch.uint8), torch.empty(count // BLOCKSIZE, dtype=torch.uint8)
    return nvfp4_weight(codes, scales, torch.empty(torch.Size(shape[:-2]).numel()), shape, dtype)


# --- ModelOpt's names --------------------------------------------------------------------------------------------


def nvfp4_weight_names(files: Sequence[str]) -> set[str]:
    """Return the names of the NVFP4 weights in ModelOpt's safetensors files, where dense weights have the same names.

    Raises:
        PeftcoreError: the files have tensors of ModelOpt that are not supported.
    """
    names, uint8_names = set(), set()
    for file in files:
        with safe_open(file, framework="pt") as file_tensors:
            for name in file_tensors.keys():  # noqa: SIM118  # it is not a mapping
                names.add(name)
                if name.endswith(_WEIGHT) and file_tensors.get_slice(name).get_dtype() == "U8":
                    uint8_names.add(name)
    scale_names = {name for name in names if name.endswith(_SCALE_2)}
    packed_names = {f"{name.removesuffix(_SCALE_2)}{_WEIGHT}" for name in scale_names}
    other_names = sorted(name for name in scale_names if f"{name.removesuffix(_SCALE_2)}{_WEIGHT}" not in uint8_names)
    other_names += sorted(uint8_names - packed_names) + sorted(
        name for name in names if name.endswith("pre_quant_scale")
    )
    if other_names:
        raise PeftcoreError(
            f"cannot read '{other_names[0]}', a tensor of ModelOpt: only weights of layers and of single experts are "
            f"supported, stored as bytes with '{_SCALE_2}' and without 'pre_quant_scale'. {_ADVICE}"
        )
    return packed_names
