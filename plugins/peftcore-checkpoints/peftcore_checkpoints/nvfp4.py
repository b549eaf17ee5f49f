"""NVFP4 weights of other tools on disk: ModelOpt and compressed-tensors, read without these libraries.

A weight W `[out, in]` is code * scale, codes in E2M1 and one scale for each row and 16 inputs: the number of E4M3 in
the file, times a scale of the whole weight (ModelOpt) or divided by one (compressed-tensors), in fp32. Layer X has:

ModelOpt
    X.weight               uint8 [out, in / 2], the even input in the lowest four bits
    X.weight_scale         E4M3 [out, in / 16]
    X.weight_scale_2       fp32, one number, that multiplies
    X.input_scale          not read
compressed-tensors (`nvfp4-pack-quantized`)
    X.weight_packed        uint8 [out, in / 2] likewise
    X.weight_scale         E4M3 [out, in / 16]
    X.weight_global_scale  fp32 [1], that divides
    X.input_global_scale   not read

The inputs of layers, which these tools round to NVFP4, too (W4A4), keep their dtype here, with a warning.

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
from peftcore_checkpoints.configs import damaged, dense_layers, groups_of, refuse_transforms, refused

_PACKED, _WEIGHT = "weight_packed", "weight"
_SCALE_2, _DIVISOR = "weight_scale_2", "weight_global_scale"  # that multiplies, and that divides
_ONE = 56  # E4M3's code of 1
_KIND = "NVFP4"
_WARNING = "'{}' rounds the inputs of layers to 4 bits, which is not done here: its weights alone are in NVFP4"
_DENSE = "Use a checkpoint in NVFP4, or the dense one"


def modelopt_layout(config: Mapping[str, Any], where: str) -> CheckpointLayout:
    """Return the layout of ModelOpt's NVFP4 that a `quantization_config` describes.

    Raises:
        PeftcoreError: it is another one.
    """
    algorithm = config.get("quant_algo")
    if algorithm not in ("NVFP4", "W4A16_NVFP4"):
        raise refused(where, f"ModelOpt in {validation.shown(algorithm)}", "'NVFP4' and 'W4A16_NVFP4'", _DENSE)
    sizes = (weights.get("group_size") for _, weights in groups_of(config, where).values())
    _check_sizes([config.get("group_size"), *sizes], "ModelOpt", where)
    warning = _WARNING.format(where) if algorithm == "NVFP4" else ""
    return _layout("ModelOpt", _SCALE_2, "input_scale", config, warning)


def is_nvfp4(config: Mapping[str, Any], where: str) -> bool:
    """Return whether a `quantization_config` of compressed-tensors has weights in NVFP4."""
    groups = groups_of(config, where).values()
    return "nvfp4-pack-quantized" in (config.get("format"), *(group.get("format") for group, _ in groups))


def compressed_tensors_layout(config: Mapping[str, Any], where: str) -> CheckpointLayout:
    """Return the layout of compressed-tensors' NVFP4 that a `quantization_config` describes.

    Raises:
        PeftcoreError: it is another one.
    """
    tool, dense = "compressed-tensors", "Use a checkpoint of the model in one format, or the dense one"
    groups = groups_of(config, where).values()
    for group, weights in groups:
        kind = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
        stored = group.get("format") or config.get("format")
        if stored != "nvfp4-pack-quantized" or kind != ("float", 4, "tensor_group"):
            one = f"{validation.shown(stored)} with weights of {kind[0]}{kind[1]}"
            found = f"{tool} in several formats, of which one is {one}"
            raise refused(where, found, "'nvfp4-pack-quantized' by itself", dense)
        if not weights.get("symmetric", True):
            raise refused(where, f"{tool} with zero points", "symmetric weights", dense)
    _check_sizes([weights.get("group_size") for _, weights in groups], tool, where)
    refuse_transforms(config, where, dense)
    has_inputs = any(group.get("input_activations") is not None for group, _ in groups)
    return _layout(tool, _DIVISOR, "input_global_scale", config, _WARNING.format(where) if has_inputs else "")


def _check_sizes(sizes: Iterable[Any], tool: str, where: str) -> None:
    for size in sizes:
        if size not in (None, BLOCKSIZE):
            raise refused(where, f"{tool} in groups of {validation.shown(size)}", f"groups of {BLOCKSIZE}", _DENSE)


def _layout(tool: str, outer: str, unread: str, config: Mapping[str, Any], warning: str) -> CheckpointLayout:
    """Return a layout, given the names of the whole weight's scale and of the tensor that is not read."""
    return CheckpointLayout(
        tool,
        _KIND,
        "nvfp4",
        (_PACKED, "weight_scale", outer),
        partial(_read, outer=outer),
        lambda weight, dtype, name: weight._replace(dtype=dtype, codes=in_huge_pages(weight.codes)),
        joined_rows,
        empty_nvfp4,
        dense_layers(config),
        known_by=outer,
        ignored=(unread,),
        packed_names=names_of_packed if outer == _SCALE_2 else None,
        warning=warning,
    )


# --- reading a weight --------------------------------------------------------------------------------------------


def _read(tensors: Mapping[str, Tensor], name: str, *, outer: str) -> PackedWeight:
    """Read a weight. `outer`: name of the scale of the whole weight."""
    is_modelopt = outer == _SCALE_2
    for part in (_PACKED, "weight_scale", outer):
        if part not in tensors:
            raise damaged(name, f"lacks '{name}.{_WEIGHT if is_modelopt and part == _PACKED else part}'", _KIND)
    packed, scales, whole = tensors[_PACKED], tensors["weight_scale"], tensors[outer]
    rows, columns = (packed.shape[0], 2 * packed.shape[1]) if packed.dim() == 2 else (0, 0)
    if packed.dtype is not torch.uint8 or packed.dim() != 2 or columns % BLOCKSIZE:
        raise damaged(
            name, f"has codes {packed.dtype} {list(packed.shape)}, expected {torch.uint8} [out, in / 2]", _KIND
        )
    wanted = [rows, columns // BLOCKSIZE]
    if scales.dtype is not torch.float8_e4m3fn or list(scales.shape) != wanted:
        found = f"{scales.dtype} {list(scales.shape)}"
        raise damaged(name, f"has 'weight_scale' {found}, expected {torch.float8_e4m3fn} {wanted}", _KIND)
    if whole.dtype is not torch.float32 or whole.numel() != 1 or not whole.isfinite().all() or not whole.all():
        found = f"{whole.dtype} {list(whole.shape)}{f' = {whole.item()}' if whole.numel() == 1 else ''}"
        raise damaged(name, f"has '{outer}' {found}, expected a number of {torch.float32} that is not 0", _KIND)
    codes = swap_nibbles(packed.detach().clone()).view(-1, 1)
    bits, whole, scale_map = scales.contiguous().view(torch.uint8).reshape(-1).clone(), whole.reshape(1).clone(), None
    if outer == _DIVISOR:
        scale_map, whole = E4M3.to(whole.device) / whole, torch.ones_like(whole)
    weight = nvfp4_weight(codes, bits, whole, (rows, columns), torch.float32, scale_map)
    if reason := not_finite(weight):
        raise damaged(name, reason, _KIND)
    return weight


def joined_rows(parts: Sequence[PackedWeight], experts: int, name: str) -> PackedWeight:
    """Return weights joined along their rows as the weight `[experts, out, in]` of the parameter `name`.

    Parts that compressed-tensors divides by different scales are multiplied by the reciprocals in fp32, which may
    differ from the quotients by two units in the last place: all experts share a table of scales.

    Args:
        parts: the projections of each expert, one expert after the other.
        experts: number of experts.
        name: for messages.

    Raises:
        PeftcoreError: the parts differ in shape, or are not multiples of 512 values.
    """
    first, per = parts[0], len(parts) // experts
    if len({each.shape for each in parts}) > 1:
        raise damaged(name, "has experts of different shapes", _KIND)
    maps = [each.nested_quant_map for each in parts]
    assert all(each is not None for each in maps)
    shared, scales = maps[0], [each.nested_absmax[:1] for each in parts]  # type: ignore[index]
    if not all(torch.equal(each, shared) for each in maps):  # type: ignore[arg-type]
        scales = [scale * each[_ONE] for scale, each in zip(scales, maps, strict=True)]  # type: ignore[index]
        shared = None
    shape = experts, per * first.shape[0], first.shape[1]
    codes, bits = torch.cat([each.codes for each in parts]), torch.cat([each.absmax for each in parts])
    try:
        return nvfp4_weight(codes, bits, torch.cat(scales), shape, first.dtype, shared)
    except ValueError as error:
        raise PeftcoreError(f"'{name}' has experts in NVFP4 that are not read: {error}. {_DENSE}") from error


def empty_nvfp4(shape: tuple[int, ...], dtype: torch.dtype, _path: str) -> PackedWeight:
    """Return an NVFP4 weight without values, with the parts of one that is read."""
    count = torch.Size(shape).numel()
    codes, scales = torch.empty(count // 2, 1, dtype=torch.uint8), torch.empty(count // BLOCKSIZE, dtype=torch.uint8)
    return nvfp4_weight(codes, scales, torch.empty(torch.Size(shape[:-2]).numel()), shape, dtype)


# --- ModelOpt's names --------------------------------------------------------------------------------------------


def names_of_packed(files: Sequence[str]) -> set[str]:
    """Return the names of ModelOpt's weights in NVFP4 in these safetensors files: a dense weight has the same name.

    Raises:
        PeftcoreError: some tensors in NVFP4 are not read.
    """
    names, bytes_ = set(), set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is not a mapping
                names.add(name)
                if name.endswith(_WEIGHT) and opened.get_slice(name).get_dtype() == "U8":
                    bytes_.add(name)
    scaled = {name for name in names if name.endswith(_SCALE_2)}
    packed = {f"{name.removesuffix(_SCALE_2)}{_WEIGHT}" for name in scaled}
    odd = sorted(name for name in scaled if f"{name.removesuffix(_SCALE_2)}{_WEIGHT}" not in bytes_)
    odd += sorted(bytes_ - packed) + sorted(name for name in names if name.endswith("pre_quant_scale"))
    if odd:
        raise PeftcoreError(
            f"the checkpoint has '{odd[0]}', a tensor of ModelOpt that is not read. Read are weights of layers and of "
            f"single experts, as bytes with '{_SCALE_2}', without scales of the inputs. {_DENSE}"
        )
    return packed
