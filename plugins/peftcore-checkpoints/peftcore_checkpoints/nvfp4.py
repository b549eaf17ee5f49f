"""Reader of NVFP4 checkpoints: ModelOpt and compressed-tensors.

A weight W `[out, in]` is code * scale, with codes in E2M1 and one scale for each row and block of 16 inputs. The scale
is an E4M3 number, multiplied (ModelOpt) or divided (compressed-tensors) in fp32 by a scale of the whole weight.
`modelopt_layout` and `compressed_tensors_layout` describe a checkpoint to peftcore. Layer X has these tensors:

ModelOpt
    X.weight               uint8 [out, in / 2], the even input in the lowest four bits
    X.weight_scale         E4M3 [out, in / 16]
    X.weight_scale_2       fp32, one number, the factor of all scales
    X.input_scale          ignored
compressed-tensors (`nvfp4-pack-quantized`)
    X.weight_packed        uint8 [out, in / 2], the even input in the lowest four bits
    X.weight_scale         E4M3 [out, in / 16]
    X.weight_global_scale  fp32 [1], the divisor of all scales
    X.input_global_scale   ignored

With W4A4 checkpoints, these tools also round the inputs of layers to NVFP4. peftcore does not, and warns.

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

_PACKED = "weight_packed"
_WEIGHT = "weight"  # ModelOpt's name for the packed weight, which is read as weight_packed
_SCALE_2 = "weight_scale_2"  # ModelOpt's scale of a whole weight, a factor
_DIVISOR = "weight_global_scale"  # compressed-tensors' scale of a whole weight, a divisor
_CODE_OF_ONE = 56  # the byte that is 1 in E4M3
_KIND = "NVFP4"
_WARNING = "'{}' specifies 4-bit inputs of layers, which peftcore does not use: only the weights are in NVFP4"
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
    group_sizes = [weights.get("group_size") for _, weights in config_groups(config, checkpoint).values()]
    _check_group_sizes([config.get("group_size"), *group_sizes], "ModelOpt", checkpoint)
    warning = _WARNING.format(checkpoint) if algorithm == "NVFP4" else ""
    return _layout("ModelOpt", _SCALE_2, "input_scale", config, warning)


def is_nvfp4(config: Mapping[str, Any], checkpoint: str) -> bool:
    """Return whether a `quantization_config` of compressed-tensors has weights in NVFP4."""
    group_formats = [group.get("format") for group, _ in config_groups(config, checkpoint).values()]
    return "nvfp4-pack-quantized" in (config.get("format"), *group_formats)


def compressed_tensors_layout(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout:
    """Return the layout of an NVFP4 checkpoint of compressed-tensors with this `quantization_config`.

    Raises:
        PeftcoreError: the layout is not supported.
    """
    tool, advice = "compressed-tensors", "Use a checkpoint with a single format, or the dense checkpoint"
    groups = config_groups(config, checkpoint).values()
    for group, weights in groups:
        number_type, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
        file_format = group.get("format") or config.get("format")
        if file_format != "nvfp4-pack-quantized" or (number_type, bits, strategy) != ("float", 4, "tensor_group"):
            other_format = f"{validation.shown(file_format)} with weights of {number_type}{bits}"
            problem = f"{tool} in several formats, one of them {other_format}"
            raise unsupported_error(checkpoint, problem, "'nvfp4-pack-quantized' by itself", advice)
        if not weights.get("symmetric", True):
            raise unsupported_error(checkpoint, f"{tool} with zero points", "symmetric weights", advice)
    _check_group_sizes([weights.get("group_size") for _, weights in groups], tool, checkpoint)
    refuse_transforms(config, checkpoint, advice)
    quantizes_inputs = any(group.get("input_activations") is not None for group, _ in groups)
    warning = _WARNING.format(checkpoint) if quantizes_inputs else ""
    return _layout(tool, _DIVISOR, "input_global_scale", config, warning)


def _check_group_sizes(sizes: Iterable[Any], tool: str, checkpoint: str) -> None:
    for size in sizes:
        if size not in (None, BLOCKSIZE):
            raise unsupported_error(
                checkpoint, f"{tool} in groups of {validation.shown(size)}", f"groups of {BLOCKSIZE}", _ADVICE
            )


def _layout(
    tool: str, weight_scale_name: str, input_scale_name: str, config: Mapping[str, Any], warning: str
) -> CheckpointLayout:
    """Return the layout of a tool that gives the scales of a whole weight and of its inputs these names."""
    return CheckpointLayout(
        tool,
        kind=_KIND,
        quant_type="nvfp4",
        parts=(_PACKED, "weight_scale", weight_scale_name),
        read=partial(_read_weight, weight_scale_name=weight_scale_name),
        pack=lambda weight, dtype, name: weight._replace(dtype=dtype, codes=in_huge_pages(weight.codes)),
        join=join_experts,
        empty=empty_nvfp4,
        dense=dense_layers(config),
        known_by=weight_scale_name,
        ignored=(input_scale_name,),
        packed_names=nvfp4_weight_names if weight_scale_name == _SCALE_2 else None,
        warning=warning,
    )


# --- reading a weight --------------------------------------------------------------------------------------------


def _read_weight(tensors: Mapping[str, Tensor], name: str, *, weight_scale_name: str) -> PackedWeight:
    """Read a weight.

    Args:
        tensors: the tensors of the layer by suffix.
        name: name of the layer, for errors.
        weight_scale_name: suffix of the scale of the whole weight.

    Raises:
        CheckpointError: a tensor is missing or does not fit the layout.
    """
    is_modelopt = weight_scale_name == _SCALE_2
    for suffix in (_PACKED, "weight_scale", weight_scale_name):
        if suffix not in tensors:
            file_suffix = _WEIGHT if is_modelopt and suffix == _PACKED else suffix
            raise damaged_error(name, f"lacks '{name}.{file_suffix}'", _KIND)
    packed_weight, scales, weight_scale = tensors[_PACKED], tensors["weight_scale"], tensors[weight_scale_name]
    _check_tensors(packed_weight, scales, weight_scale, weight_scale_name, name)
    rows, columns = packed_weight.shape[0], 2 * packed_weight.shape[1]
    codes = swap_nibbles(packed_weight.detach().clone()).view(-1, 1)
    scale_bits = scales.contiguous().view(torch.uint8).reshape(-1).clone()
    weight_scale, scale_map = weight_scale.reshape(1).clone(), None
    if weight_scale_name == _DIVISOR:
        # A table of the 256 possible quotients is exact. Multiplying by the reciprocal would not be.
        scale_map, weight_scale = E4M3.to(weight_scale.device) / weight_scale, torch.ones_like(weight_scale)
    weight = nvfp4_weight(codes, scale_bits, weight_scale, (rows, columns), torch.float32, scale_map)
    if reason := not_finite(weight):
        raise damaged_error(name, reason, _KIND)
    return weight


def _check_tensors(
    packed_weight: Tensor, scales: Tensor, weight_scale: Tensor, weight_scale_name: str, name: str
) -> None:
    """Raise a CheckpointError if a tensor of a layer has a wrong dtype or shape, or the scale of the weight is bad."""
    is_matrix = packed_weight.dim() == 2
    columns = 2 * packed_weight.shape[1] if is_matrix else 0
    if packed_weight.dtype is not torch.uint8 or not is_matrix or columns % BLOCKSIZE:
        description = f"{packed_weight.dtype} {list(packed_weight.shape)}"
        raise damaged_error(name, f"has codes {description}, expected {torch.uint8} [out, in / 2]", _KIND)
    scales_shape = [packed_weight.shape[0], columns // BLOCKSIZE]
    if scales.dtype is not torch.float8_e4m3fn or list(scales.shape) != scales_shape:
        description = f"{scales.dtype} {list(scales.shape)}"
        raise damaged_error(
            name, f"has 'weight_scale' {description}, expected {torch.float8_e4m3fn} {scales_shape}", _KIND
        )
    is_one_number = weight_scale.dtype is torch.float32 and weight_scale.numel() == 1
    if not is_one_number or not weight_scale.isfinite().all() or not weight_scale.all():
        description = f"{weight_scale.dtype} {list(weight_scale.shape)}"
        if weight_scale.numel() == 1:
            description += f" = {weight_scale.item()}"
        problem = f"has '{weight_scale_name}' {description}, expected a number of {torch.float32} that is not 0"
        raise damaged_error(name, problem, _KIND)


def join_experts(projections: Sequence[PackedWeight], experts: int, name: str) -> PackedWeight:
    """Concatenate the NVFP4 weights of single experts into the parameter `name` `[experts, out, in]`.

    All experts share one table of scales. If the projections of a compressed-tensors checkpoint have different
    divisors, their scales are multiplied by the reciprocals in fp32 instead. The result may differ from the quotients
    by two units in the last place.

    Args:
        projections: the projections of the first expert, then those of the second, and so on.
        experts: number of experts.
        name: name of the parameter, for errors.

    Raises:
        PeftcoreError: the projections differ in shape, or their sizes are not multiples of 512 values.
    """
    first, per_expert = projections[0], len(projections) // experts
    if len({projection.shape for projection in projections}) > 1:
        raise damaged_error(name, "has experts of different shapes", _KIND)
    tables = [projection.nested_quant_map for projection in projections]
    assert all(table is not None for table in tables)
    common_table = tables[0]
    scales = [projection.nested_absmax[:1] for projection in projections]  # type: ignore[index]
    if not all(torch.equal(table, common_table) for table in tables):  # type: ignore[arg-type]
        # The table's value for the code of 1 is the reciprocal of the divisor.
        scales = [scale * table[_CODE_OF_ONE] for scale, table in zip(scales, tables, strict=True)]  # type: ignore[index]
        common_table = None
    shape = experts, per_expert * first.shape[0], first.shape[1]
    codes = torch.cat([projection.codes for projection in projections])
    scale_bits = torch.cat([projection.absmax for projection in projections])
    try:
        return nvfp4_weight(codes, scale_bits, torch.cat(scales), shape, first.dtype, common_table)
    except ValueError as error:
        raise PeftcoreError(f"'{name}' has experts in NVFP4 that cannot be read: {error}. {_ADVICE}") from error


def empty_nvfp4(shape: tuple[int, ...], dtype: torch.dtype, _path: str) -> PackedWeight:
    """Return an uninitialized NVFP4 weight, for memory estimates."""
    count = torch.Size(shape).numel()
    codes = torch.empty(count // 2, 1, dtype=torch.uint8)
    scale_bits = torch.empty(count // BLOCKSIZE, dtype=torch.uint8)
    weight_scales = torch.empty(torch.Size(shape[:-2]).numel())
    return nvfp4_weight(codes, scale_bits, weight_scales, shape, dtype)


# --- ModelOpt's names --------------------------------------------------------------------------------------------


def nvfp4_weight_names(files: Sequence[str]) -> set[str]:
    """Return the names of the NVFP4 weights in ModelOpt's safetensors files.

    ModelOpt gives packed weights the names of dense weights, so the names alone do not tell them apart.

    Raises:
        PeftcoreError: the files have tensors of ModelOpt that are not supported.
    """
    names, byte_weights = set(), set()
    for file in files:
        with safe_open(file, framework="pt") as file_tensors:
            for name in file_tensors.keys():  # noqa: SIM118  # it is not a mapping
                names.add(name)
                if name.endswith(_WEIGHT) and file_tensors.get_slice(name).get_dtype() == "U8":
                    byte_weights.add(name)
    # Maps the scale of each quantized weight to the weight.
    scaled_weights = {name: f"{name.removesuffix(_SCALE_2)}{_WEIGHT}" for name in names if name.endswith(_SCALE_2)}
    packed_names = set(scaled_weights.values())
    scales_without_bytes = sorted(scale for scale, weight in scaled_weights.items() if weight not in byte_weights)
    bytes_without_scales = sorted(byte_weights - packed_names)
    input_scales = sorted(name for name in names if name.endswith("pre_quant_scale"))
    unsupported_names = scales_without_bytes + bytes_without_scales + input_scales
    if unsupported_names:
        raise PeftcoreError(
            f"cannot read '{unsupported_names[0]}', a tensor of ModelOpt: only weights of layers and of single experts "
            f"are supported, stored as bytes with '{_SCALE_2}' and without 'pre_quant_scale'. {_ADVICE}"
        )
    return packed_names
