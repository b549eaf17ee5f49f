"""Reader of int4 checkpoints: GPTQ, AutoAWQ and compressed-tensors.

A weight W `[out, in]` is scale * (code - zero), with codes and zeros from 0 to 15, and one scale and one zero for each
row and group of inputs. Layer X has these tensors; words are int32 with the first value in the lowest four bits:

GPTQ (GPTQModel, AutoGPTQ)
    X.qweight             words [in / 8, out], eight inputs each
    X.qzeros              words [groups, out / 8], eight outputs each; format `gptq` subtracts 0x11111111, so that each
                          zero is one less; `gptq_v2` stores the zeros themselves
    X.scales              [groups, out]
    X.g_idx               int32 [in], the group of each input; may be absent
AutoAWQ (version `gemm`)
    X.qweight             words [in, out / 8], outputs in the order 0, 2, 4, 6, 1, 3, 5, 7
    X.qzeros              words [groups, out / 8] in the same order
    X.scales              [groups, out]
compressed-tensors (`pack-quantized`)
    X.weight_packed       words [out, ceil(in / 8)], eight inputs each
    X.weight_scale        [out, groups]
    X.weight_zero_point   words [ceil(out / 8), groups], eight outputs each, or int8 [out, groups] from -8 to 7; absent
                          in symmetric layers, where each zero is 8
    X.weight_shape        int64 [2]
    X.weight_g_idx        int32 [in]; may be absent

Sources: gptqmodel/nn_modules/qlinear and gptqmodel/utils/model.py of ModelCloud/GPTQModel, awq/modules/linear/gemm.py
of casper-hansen/AutoAWQ, compressors/pack_quantized of vllm-project/compressed-tensors 0.20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.ops import PackedWeight, codebook
from peftcore.ops.huge_pages import in_huge_pages
from peftcore.ops.mxfp4 import swap_nibbles
from peftcore.ops.weight import AFFINE, DTYPES, MAX_BLOCKSIZE, MIN_BLOCKSIZE
from peftcore.plugin import CheckpointError, CheckpointLayout, PeftcoreError, validation
from peftcore_checkpoints.configs import (
    config_groups,
    damaged_error,
    dense_layers,
    read_object,
    refuse_transforms,
    unsupported_error,
)

_ONE_PER_NIBBLE = 0x11111111  # the value 1 in each of a word's eight nibbles
_CHUNK_ROWS = 256  # rows of a weight that are unpacked together, to bound temporary memory
_AWQ_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)  # position in a word of each of eight outputs


class Int4Weight(NamedTuple):
    """An int4 weight with the values of a checkpoint, in one layout for all tools.

    Args:
        codes: uint8 `[out * in / 2, 1]`, two codes per byte, the even one in the high nibble.
        scales: fp32, fp16 or bf16 `[out, groups]`.
        zeros: uint8 `[out, groups]`; None if all are 8.
        shape: `(out, in)`.
        group: number of inputs that share a scale.
        order: int64 `[in]`: column j of the codes is input `order[j]`; None: column j is input j.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    group: int
    order: Tensor | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight `[out, in]`, computed in this dtype."""
        packed = self.codes.view(self.shape[0], -1)
        codes = torch.stack((packed >> 4, packed & 15), -1).flatten(-2).to(dtype)
        zeros = 8 if self.zeros is None else self.zeros.to(dtype).repeat_interleave(self.group, 1)
        dense = (codes - zeros) * self.scales.to(dtype).repeat_interleave(self.group, 1)
        return dense if self.order is None else torch.empty_like(dense).index_copy_(1, self.order, dense)


def to_affine4(weight: Int4Weight, dtype: torch.dtype, name: str) -> PackedWeight:
    """Convert a weight to the type `affine4`.

    Args:
        weight: the weight.
        dtype: dtype of the weight when it is dequantized.
        name: name of the weight, for errors.

    Raises:
        PeftcoreError: the group size is not a multiple of 32.
    """
    block = min(weight.group & -weight.group, MAX_BLOCKSIZE)  # the largest power of two that divides a group
    if block < MIN_BLOCKSIZE:
        raise PeftcoreError(
            f"'{name}' has groups of {weight.group} inputs, but the group size must be a multiple of "
            f"{MIN_BLOCKSIZE}. Use a checkpoint with larger groups, or the dense checkpoint"
        )
    scales, zeros = weight.scales, weight.zeros
    if block < weight.group:  # affine4 needs a power of two: divide each group into blocks with the same scale
        scales = scales.repeat_interleave(weight.group // block, 1)
        zeros = None if zeros is None else zeros.repeat_interleave(weight.group // block, 1)
    return PackedWeight(
        in_huge_pages(weight.codes),
        scales.reshape(-1),
        codebook("affine4", weight.codes.device),
        weight.shape,
        block,
        dtype,
        "affine4",
        nested_blocksize=AFFINE,
        zeros=None if zeros is None else zeros.reshape(-1),
        permutation=weight.order,
    )


def join_experts(parts: Sequence[PackedWeight], experts: int, name: str) -> PackedWeight:
    """Concatenate affine4 weights of single experts into the parameter `name` `[experts, out, in]`.

    Args:
        parts: the projections of each expert, one expert after the other.
        experts: number of experts.
        name: name of the parameter, for errors.

    Raises:
        PeftcoreError: the parts differ in shape or blocks, or have a permutation, which a parameter of experts cannot.
    """
    projections, first = len(parts) // experts, parts[0]
    if any(part.permutation is not None for part in parts):
        raise PeftcoreError(
            f"'{name}' has int4 experts with act-order (`g_idx`), which gives each expert its own order of inputs and "
            "cannot be read. Quantize with desc_act=False, or use the dense checkpoint"
        )
    shapes = [(part.shape, part.blocksize) for part in parts]
    are_alike = shapes == shapes[:projections] * experts
    have_one_width = len({(shape[1], size) for shape, size in shapes}) == 1
    if not (are_alike and have_one_width):
        raise damaged_error(name, "has experts of different shapes or groups")
    zeros = None
    if any(part.zeros is not None for part in parts):
        eights = torch.full_like(first.absmax[:1], 8, dtype=torch.uint8)
        zeros = torch.cat([eights.expand_as(part.absmax) if part.zeros is None else part.zeros for part in parts])
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.absmax for part in parts])
    shape = experts, sum(part.shape[0] for part in parts[:projections]), first.shape[1]
    return first._replace(codes=codes, absmax=scales, zeros=zeros, shape=shape)


class _Scheme(NamedTuple):
    """Settings of a `quantization_config` that determine the tensors of a layer.

    Args:
        group: number of inputs in a group; -1: one group per row.
        has_zeros: groups have zero points.
        is_ordered: columns are permuted (act-order).
    """

    group: int
    has_zeros: bool
    is_ordered: bool

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> PackedWeight:
        """Return an uninitialized packed weight, for memory estimates."""
        rows, columns = math.prod(shape[:-1]), shape[-1]
        group = columns if self.group == -1 or columns % self.group else self.group
        zeros = torch.empty(rows, columns // group, dtype=torch.uint8) if self.has_zeros else None
        order = torch.empty(columns, dtype=torch.int64) if self.is_ordered and len(shape) == 2 else None
        scales = torch.empty(rows, columns // group, dtype=torch.float16)
        codes = torch.empty(rows * columns // 2, 1, dtype=torch.uint8)
        packed = to_affine4(Int4Weight(codes, scales, zeros, (rows, columns), group, order), dtype, name)
        return packed._replace(shape=shape)


def _layout(
    tool: str,
    parts: tuple[str, ...],
    read: Callable[[Mapping[str, Tensor], str], Int4Weight],
    config: Mapping[str, Any],
    scheme: _Scheme,
) -> CheckpointLayout:
    return CheckpointLayout(
        tool, "int4", "affine4", parts, read, to_affine4, join_experts, scheme.empty, dense_layers(config)
    )


def _check_bits(config: Mapping[str, Any], checkpoint: str, tool: str) -> None:
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise unsupported_error(checkpoint, f"{tool} in {validation.shown(bits)} bits", "4 bits", _ADVICE)


_ADVICE = "Use a 4-bit checkpoint of the model, or the dense checkpoint"


def gptq_layout(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout:
    """Return the layout of a GPTQ checkpoint with this `quantization_config`.

    Raises:
        PeftcoreError: the layout is not supported.
    """
    _check_bits(config, checkpoint, "GPTQ")
    default = "marlin" if config.get("is_marlin_format") else "gptq"
    file_format = config.get("checkpoint_format") or config.get("format") or default
    if file_format not in ("gptq", "gptq_v2"):
        advice = "Save it with GPTQModel in format='gptq_v2', or use the dense checkpoint"
        raise unsupported_error(
            checkpoint, f"GPTQ in format {validation.shown(file_format)}", "the format 'gptq' or 'gptq_v2'", advice
        )
    for pattern, changes in read_object(config, "dynamic", checkpoint).items():
        bits = changes.get("bits", 4) if isinstance(changes, Mapping) else 4
        if bits != 4:
            raise unsupported_error(
                checkpoint, f"GPTQ in {validation.shown(bits)} bits for layers '{pattern}'", "4 bits", _ADVICE
            )
    pack_dtype = config.get("pack_dtype", "int32")
    if str(pack_dtype).removeprefix("torch.") != "int32":
        raise unsupported_error(
            checkpoint,
            f"GPTQ in words of {validation.shown(pack_dtype)}",
            "int32",
            "Quantize it with pack_dtype='int32'",
        )
    size, is_v1 = config.get("group_size", -1), file_format == "gptq"
    quantizers = read_object(config, "meta", checkpoint).get("quantizer") or ()
    quantizers = quantizers if isinstance(quantizers, (list, tuple)) else [quantizers]
    by_gptqmodel = any(str(quantizer).startswith("gptqmodel") for quantizer in quantizers)
    read = partial(_read_gptq, size=_group_size(size, checkpoint), is_v1=is_v1, by_gptqmodel=by_gptqmodel)
    scheme = _Scheme(size, not config.get("sym", True), bool(config.get("desc_act", False)))
    return _layout("GPTQ", ("qweight", "qzeros", "scales", "g_idx"), read, config, scheme)


def awq_layout(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout:
    """Return the layout of an AWQ checkpoint (version `gemm`) with this `quantization_config`.

    Raises:
        PeftcoreError: the layout is not supported.
    """
    _check_bits(config, checkpoint, "AWQ")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm" or config.get("backend") == "llm-awq":
        version_name = "llm-awq" if version == "gemm" else version
        advice = "Quantize it with AutoAWQ in version='gemm', or use the dense checkpoint"
        raise unsupported_error(
            checkpoint, f"AWQ in the version {validation.shown(version_name)}", "the version 'gemm'", advice
        )
    size = config.get("group_size", config.get("q_group_size", -1))
    read = partial(_read_awq, size=_group_size(size, checkpoint))
    return _layout("AWQ", ("qweight", "qzeros", "scales"), read, config, _Scheme(size, True, False))


def compressed_tensors_layout(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout:
    """Return the layout of an int4 checkpoint of compressed-tensors with this `quantization_config`.

    Raises:
        PeftcoreError: the layout is not supported.
    """
    tool, advice = "compressed-tensors", "Use a W4A16 checkpoint of the model, or the dense checkpoint"
    groups = config_groups(config, checkpoint)
    default = config.get("format")
    for file_format in (default, *(group.get("format") or default for group, _ in groups.values())):
        if file_format != "pack-quantized":
            raise unsupported_error(
                checkpoint,
                f"{tool} in the format {validation.shown(file_format)}",
                "the format 'pack-quantized'",
                advice,
            )
    for name, (group, weights) in groups.items():
        number_type, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
        if (number_type, bits) != ("int", 4) or strategy not in ("group", "channel"):
            problem = f"{tool} with weights of {number_type}{bits} per {strategy} in '{name}'"
            raise unsupported_error(checkpoint, problem, "int4 per group or channel", advice)
        if group.get("input_activations") is not None:
            raise unsupported_error(checkpoint, f"{tool} with quantized inputs in '{name}'", "W4A16", advice)
    refuse_transforms(config, checkpoint, advice)
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    symmetric = {bool(weights.get("symmetric", True)) for _, weights in groups.values()}
    if len(symmetric) > 1:  # a damaged asymmetric layer without zero points would be read as a symmetric one
        raise unsupported_error(
            checkpoint, f"{tool} with symmetric and asymmetric groups", "groups of one kind", advice
        )
    _, weights = next(iter(groups.values()), ({}, {}))
    is_ordered = weights.get("actorder") in ("group", "dynamic")
    scheme = _Scheme(weights.get("group_size") or -1, not weights.get("symmetric", True), is_ordered)
    return _layout(tool, parts, partial(_read_compressed, needs_zeros=symmetric == {False}), config, scheme)


def _group_size(size: Any, checkpoint: str) -> int | None:
    """Return the number of inputs in a group; None for one group per row."""
    if type(size) is not int or (size <= 0 and size != -1):
        raise PeftcoreError(
            f"'{checkpoint}' has group_size={validation.shown(size)} in its config, expected a positive number or -1"
        )
    return None if size == -1 else size


# --- reading a weight --------------------------------------------------------------------------------------------


def _read_gptq(
    tensors: Mapping[str, Tensor], name: str, *, size: int | None, is_v1: bool, by_gptqmodel: bool
) -> Int4Weight:
    """Read a weight of GPTQ.

    Args:
        tensors: the tensors by part.
        name: name of the layer, for errors.
        size: number of inputs in a group; None: one group per row.
        is_v1: the format is `gptq`, whose zeros are one less.
        by_gptqmodel: GPTQModel wrote the file. It subtracts 0x11111111 from whole words, so that adding it also
            restores zeros of 0.
    """
    qweight, qzeros, scales = _require_parts(tensors, ("qweight", "qzeros", "scales"), name)
    rows, columns = qweight.shape[-1], 8 * qweight.shape[0]
    groups = scales.shape[0]
    _check_tensor(qweight, torch.int32, (columns // 8, rows), "qweight", name)
    _check_scales(scales, (groups, rows), "scales", name)
    _check_tensor(qzeros, torch.int32, (groups, rows // 8), "qzeros", name)
    order, group = _input_order(tensors.get("g_idx"), columns, groups, size, name)
    if is_v1:
        if not by_gptqmodel and (_unpack_nibbles(qzeros) == 15).any():
            raise CheckpointError(
                f"'{name}.qzeros' has zero points of 15 in format 'gptq', which AutoGPTQ and GPTQModel read "
                "differently. Save the checkpoint with GPTQModel in format='gptq_v2'"
            )
        qzeros = qzeros + _ONE_PER_NIBBLE
    zeros = _none_if_default(_unpack_nibbles(qzeros).T.contiguous())
    scales = scales.T.contiguous()
    if order is None:
        codes = swap_nibbles(qweight.T.contiguous().view(torch.uint8)).view(-1, 1)
    else:
        chunks = qweight.split(_CHUNK_ROWS, 1)
        codes = torch.cat([_pack_bytes(_unpack_nibbles(chunk.T)[:, order]) for chunk in chunks])
    return Int4Weight(codes, scales, zeros, (rows, columns), group, order)


def _read_awq(tensors: Mapping[str, Tensor], name: str, *, size: int | None) -> Int4Weight:
    """Read a weight of AutoAWQ. `size` is the number of inputs in a group."""
    qweight, qzeros, scales = _require_parts(tensors, ("qweight", "qzeros", "scales"), name)
    columns, rows = qweight.shape[0], 8 * qweight.shape[-1]
    groups = scales.shape[0]
    _check_tensor(qweight, torch.int32, (columns, rows // 8), "qweight", name)
    _check_scales(scales, (groups, rows), "scales", name)
    _check_tensor(qzeros, torch.int32, (groups, rows // 8), "qzeros", name)
    _, group = _input_order(None, columns, groups, size, name)
    positions = torch.tensor(_AWQ_POSITIONS, device=qweight.device)

    def unpack(words: Tensor) -> Tensor:
        """Return uint8 `[out, ...]` from words `[..., out / 8]`."""
        return _unpack_nibbles(words).view(len(words), -1, 8)[..., positions].flatten(1).T.contiguous()

    codes = torch.cat([_pack_bytes(unpack(chunk)) for chunk in qweight.split(_CHUNK_ROWS // 8, 1)])
    return Int4Weight(codes, scales.T.contiguous(), _none_if_default(unpack(qzeros)), (rows, columns), group)


def _read_compressed(tensors: Mapping[str, Tensor], name: str, *, needs_zeros: bool) -> Int4Weight:
    """Read a weight of compressed-tensors. With `needs_zeros` a weight without zero points is an error."""
    packed, scales, shape = _require_parts(tensors, ("weight_packed", "weight_scale", "weight_shape"), name)
    _check_tensor(shape, torch.int32 if shape.dtype is torch.int32 else torch.int64, (2,), "weight_shape", name)
    rows, columns = (int(size) for size in shape.tolist())
    _check_tensor(packed, torch.int32, (rows, -(-columns // 8)), "weight_packed", name)
    groups = scales.shape[-1]
    _check_scales(scales, (rows, groups), "weight_scale", name)
    order, group = _input_order(tensors.get("weight_g_idx"), columns, groups, None, name)
    disk_zeros, zeros = tensors.get("weight_zero_point"), None
    if disk_zeros is None and needs_zeros:
        raise damaged_error(name, "lacks 'weight_zero_point', but the config says symmetric=false")
    if disk_zeros is not None and disk_zeros.dtype is torch.int8:  # before compressed-tensors 0.9
        _check_tensor(disk_zeros, torch.int8, (rows, groups), "weight_zero_point", name)
        zeros = (disk_zeros.to(torch.int16) + 8).to(torch.uint8)
        if (zeros > 15).any():
            raise damaged_error(name, "has values of 'weight_zero_point' outside -8..7")
    elif disk_zeros is not None:
        _check_tensor(disk_zeros, torch.int32, (-(-rows // 8), groups), "weight_zero_point", name)
        zeros = _unpack_nibbles(disk_zeros.T.contiguous())[:, :rows].T.contiguous()
    if order is None and columns % 8 == 0:
        codes = swap_nibbles(packed.detach().clone().view(torch.uint8)).view(-1, 1)
    else:
        input_order = slice(columns) if order is None else order  # the last word may have fewer than eight columns
        chunks = packed.split(_CHUNK_ROWS)
        codes = torch.cat([_pack_bytes(_unpack_nibbles(chunk)[:, input_order]) for chunk in chunks])
    zeros = None if zeros is None else _none_if_default(zeros)
    return Int4Weight(codes, scales.contiguous(), zeros, (rows, columns), group, order)


def _unpack_nibbles(words: Tensor) -> Tensor:
    """Unpack int32 words `[..., n]` to uint8 `[..., 8 n]`, the lowest four bits first."""
    packed = words.contiguous().view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _pack_bytes(codes: Tensor) -> Tensor:
    """Pack codes `[out, in]` to uint8 `[out * in / 2, 1]`, the even one in the high nibble."""
    return (codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1)


def _none_if_default(zeros: Tensor) -> Tensor | None:
    """Return the zeros, or None if all are 8, the default of affine4."""
    return None if (zeros == 8).all() else zeros


def _input_order(
    g_idx: Tensor | None, columns: int, groups: int, size: int | None, name: str
) -> tuple[Tensor | None, int]:
    """Return (inputs sorted by group, or None if they already are; number of inputs in a group).

    Raises:
        CheckpointError: groups differ in size, or the inputs cannot be divided into them.
    """
    if columns % 2 or not groups or columns % groups:
        raise damaged_error(name, f"has {groups} groups for {columns} inputs")
    group = columns // groups
    if g_idx is None:
        if size is not None and size != group and size < columns:
            raise damaged_error(
                name, f"has {groups} groups for {columns} inputs, but the config says group_size={size}"
            )
        return None, group
    if g_idx.is_floating_point() or g_idx.shape != (columns,):
        raise damaged_error(name, f"has g_idx {g_idx.dtype} {list(g_idx.shape)}, expected {torch.int32} [{columns}]")
    if (g_idx == -1).all():  # compressed-tensors initialises it with -1, and leaves it so without act-order
        return None, group
    order = torch.argsort(g_idx, stable=True)
    expected_groups = torch.arange(groups, device=g_idx.device).repeat_interleave(group)
    if not torch.equal(g_idx[order].long(), expected_groups):
        raise damaged_error(name, f"has a g_idx whose {groups} groups do not have {group} inputs each")
    is_sorted = torch.equal(order, torch.arange(columns, device=order.device))
    return None if is_sorted else order, group


def _require_parts(tensors: Mapping[str, Tensor], parts: tuple[str, ...], name: str) -> list[Tensor]:
    """Return the tensors of these parts.

    Raises:
        CheckpointError: a part is missing, or has another number of dimensions.
    """
    for part in parts:
        if part not in tensors:
            raise damaged_error(name, f"lacks '{name}.{part}'")
    for part in parts:
        dimensions = 1 if part == "weight_shape" else 2
        if tensors[part].dim() != dimensions:
            raise damaged_error(name, f"has '{part}' of shape {list(tensors[part].shape)}")
    return [tensors[part] for part in parts]


def _check_tensor(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], part: str, name: str) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        actual = f"{tensor.dtype} {list(tensor.shape)}"
        raise damaged_error(name, f"has '{part}' {actual}, expected {dtype} {list(shape)}")


def _check_scales(scales: Tensor, shape: tuple[int, int], part: str, name: str) -> None:
    if scales.dtype not in DTYPES:
        raise damaged_error(name, f"has '{part}' {scales.dtype}, expected float32, float16 or bfloat16")
    _check_tensor(scales, scales.dtype, shape, part, name)
    if not scales.isfinite().all():
        raise damaged_error(name, f"has NaN or Inf in '{part}'")
