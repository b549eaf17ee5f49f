"""int4 weights of other tools on disk: GPTQ, AutoAWQ and compressed-tensors, read without these libraries.

A weight W `[out, in]` is scale * (code - zero), codes and zeros from 0 to 15, one scale and one zero for each row and
group of inputs. Layer X has these tensors; words are int32 with the first value in the lowest four bits:

GPTQ (GPTQModel, AutoGPTQ)
    X.qweight             words [in / 8, out], eight inputs each
    X.qzeros              words [groups, out / 8], eight outputs each; in format `gptq` the word minus 0x11111111, which
                          makes each zero one less; in `gptq_v2` as they are
    X.scales              [groups, out]
    X.g_idx               int32 [in], the group of each input; may be absent
AutoAWQ (version `gemm`)
    X.qweight             words [in, out / 8], outputs in the order 0, 2, 4, 6, 1, 3, 5, 7
    X.qzeros              words [groups, out / 8] in the same order
    X.scales              [groups, out]
compressed-tensors (`pack-quantized`)
    X.weight_packed       words [out, ceil(in / 8)], eight inputs each
    X.weight_scale        [out, groups]
    X.weight_zero_point   words [ceil(out / 8), groups], eight outputs each, or int8 [out, groups], 8 less; absent if
                          symmetric, where each zero is 8
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
from peftcore_checkpoints.configs import damaged, dense_layers, groups_of, object_in, refuse_transforms, refused

_ONES = 0x11111111  # one in each of a word's eight values
_ROWS = 256  # of a weight that are unpacked together, so that temporary memory stays small
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight outputs is


class Int4Weight(NamedTuple):
    """An int4 weight as a checkpoint has it.

    Args:
        codes: uint8 `[out * in / 2, 1]`, two codes a byte, the even one in the high nibble.
        scales: fp32, fp16 or bf16 `[out, groups]`.
        zeros: uint8 `[out, groups]`; None if all are 8.
        shape: `(out, in)`. group: number of inputs that share a scale.
        order: int64 `[in]`: column j of the codes is input `order[j]`; None if they are in the inputs' order.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    group: int
    order: Tensor | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight `[out, in]`, computed in this dtype."""
        bytes_ = self.codes.view(self.shape[0], -1)
        codes = torch.stack((bytes_ >> 4, bytes_ & 15), -1).flatten(-2).to(dtype)
        zeros = 8 if self.zeros is None else self.zeros.to(dtype).repeat_interleave(self.group, 1)
        dense = (codes - zeros) * self.scales.to(dtype).repeat_interleave(self.group, 1)
        return dense if self.order is None else torch.empty_like(dense).index_copy_(1, self.order, dense)


def to_affine4(weight: Int4Weight, dtype: torch.dtype, name: str) -> PackedWeight:
    """Return the weight `name` as a packed weight of the type `affine4`.

    Args:
        weight: the weight.
        dtype: dtype of the weight when it is dequantized.
        name: for messages.

    Raises:
        PeftcoreError: a group is smaller than 32 inputs or not a multiple of it.
    """
    block = min(weight.group & -weight.group, MAX_BLOCKSIZE)  # the largest power of two that divides a group
    if block < MIN_BLOCKSIZE:
        raise PeftcoreError(
            f"'{name}' has a scale for each {weight.group} inputs, and only multiples of {MIN_BLOCKSIZE} are read. Use "
            "a checkpoint in larger groups, or the dense one"
        )
    scales, zeros = weight.scales, weight.zeros
    if block < weight.group:
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


def joined_rows(parts: Sequence[PackedWeight], experts: int, name: str) -> PackedWeight:
    """Return affine4 weights joined along their rows as the weight `[experts, out, in]` of the parameter `name`.

    Args:
        parts: the projections of each expert, one expert after the other.
        experts: number of experts.
        name: for messages.

    Raises:
        PeftcoreError: the parts differ in shape or blocks, or have a permutation, which experts do not have.
    """
    per, first = len(parts) // experts, parts[0]
    if any(each.permutation is not None for each in parts):
        raise PeftcoreError(
            f"'{name}' has int4 experts with act-order (`g_idx`), each with its own order of inputs, and only experts "
            "without it are read. Quantize with desc_act=False, or use the dense checkpoint"
        )
    facts = [(each.shape, each.blocksize) for each in parts]
    if facts != facts[:per] * experts or len({(shape[1], size) for shape, size in facts}) > 1:
        raise damaged(name, "has experts of different shapes or groups")
    zeros = None
    if any(each.zeros is not None for each in parts):
        zeros = torch.cat(
            [torch.full_like(each.absmax, 8, dtype=torch.uint8) if each.zeros is None else each.zeros for each in parts]
        )
    codes, scales = torch.cat([each.codes for each in parts]), torch.cat([each.absmax for each in parts])
    shape = experts, sum(each.shape[0] for each in parts[:per]), first.shape[1]
    return first._replace(codes=codes, absmax=scales, zeros=zeros, shape=shape)


class _Scheme(NamedTuple):
    """How a `quantization_config` stores the layers of a model.

    Args:
        group: number of inputs in a group; -1: one group in each row.
        has_zeros: groups have zero points.
        is_ordered: columns are in an order of their own (act-order).
    """

    group: int
    has_zeros: bool
    is_ordered: bool

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> PackedWeight:
        """Return a packed weight without values."""
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
        tool, "int4", "affine4", parts, read, to_affine4, joined_rows, scheme.empty, dense_layers(config)
    )


def _check_bits(config: Mapping[str, Any], where: str, tool: str) -> None:
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise refused(where, f"{tool} in {validation.shown(bits)} bits", "4 bits", _OTHER)


_OTHER = "Use a checkpoint of the model in 4 bits, or the dense one"


def gptq_layout(config: Mapping[str, Any], where: str) -> CheckpointLayout:
    """Return the layout of GPTQ that a `quantization_config` describes.

    Raises:
        PeftcoreError: it is another one.
    """
    _check_bits(config, where, "GPTQ")
    default = "marlin" if config.get("is_marlin_format") else "gptq"
    stored = config.get("checkpoint_format") or config.get("format") or default
    if stored not in ("gptq", "gptq_v2"):
        again = "Save it with GPTQModel in format='gptq_v2', or use the dense checkpoint"
        raise refused(where, f"GPTQ in the format {validation.shown(stored)}", "the format 'gptq' or 'gptq_v2'", again)
    for pattern, changes in object_in(config, "dynamic", where).items():
        bits = changes.get("bits", 4) if isinstance(changes, Mapping) else 4
        if bits != 4:
            raise refused(where, f"GPTQ in {validation.shown(bits)} bits for layers '{pattern}'", "4 bits", _OTHER)
    words = config.get("pack_dtype", "int32")
    if str(words).removeprefix("torch.") != "int32":
        raise refused(
            where, f"GPTQ in words of {validation.shown(words)}", "int32", "Quantize it with pack_dtype='int32'"
        )
    size, is_v1 = config.get("group_size", -1), stored == "gptq"
    writers = object_in(config, "meta", where).get("quantizer") or ()
    writers = writers if isinstance(writers, (list, tuple)) else [writers]
    by_gptqmodel = any(str(each).startswith("gptqmodel") for each in writers)
    read = partial(_read_gptq, size=_group_size(size, where), is_v1=is_v1, by_gptqmodel=by_gptqmodel)
    scheme = _Scheme(size, not config.get("sym", True), bool(config.get("desc_act", False)))
    return _layout("GPTQ", ("qweight", "qzeros", "scales", "g_idx"), read, config, scheme)


def awq_layout(config: Mapping[str, Any], where: str) -> CheckpointLayout:
    """Return the layout of AWQ's version `gemm` that a `quantization_config` describes.

    Raises:
        PeftcoreError: it is another one.
    """
    _check_bits(config, where, "AWQ")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm" or config.get("backend") == "llm-awq":
        found = "llm-awq" if version == "gemm" else version
        again = "Quantize it with AutoAWQ in version='gemm', or use the dense checkpoint"
        raise refused(where, f"AWQ in the version {validation.shown(found)}", "the version 'gemm'", again)
    size = config.get("group_size", config.get("q_group_size", -1))
    read = partial(_read_awq, size=_group_size(size, where))
    return _layout("AWQ", ("qweight", "qzeros", "scales"), read, config, _Scheme(size, True, False))


def compressed_tensors_layout(config: Mapping[str, Any], where: str) -> CheckpointLayout:
    """Return the layout of int4 weights of compressed-tensors that a `quantization_config` describes.

    Raises:
        PeftcoreError: it is another one.
    """
    tool, again = "compressed-tensors", "Use a checkpoint of the model in W4A16, or the dense one"
    groups = groups_of(config, where)
    default = config.get("format")
    for stored in (default, *(group.get("format") or default for group, _ in groups.values())):
        if stored != "pack-quantized":
            raise refused(
                where, f"{tool} in the format {validation.shown(stored)}", "the format 'pack-quantized'", again
            )
    for name, (group, weights) in groups.items():
        kind = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
        if kind[:2] != ("int", 4) or kind[2] not in ("group", "channel"):
            found = f"{tool} with weights of {kind[0]}{kind[1]} per {kind[2]} in '{name}'"
            raise refused(where, found, "int4 per group or channel", again)
        if group.get("input_activations") is not None:
            raise refused(where, f"{tool} with quantized inputs in '{name}'", "W4A16", again)
    refuse_transforms(config, where, again)
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    symmetric = {bool(weights.get("symmetric", True)) for _, weights in groups.values()}
    if len(symmetric) > 1:  # a missing zero point would look like a symmetric layer
        raise refused(where, f"{tool} with symmetric and asymmetric groups", "groups of one kind", again)
    _, weights = next(iter(groups.values()), ({}, {}))
    is_ordered = weights.get("actorder") in ("group", "dynamic")
    scheme = _Scheme(weights.get("group_size") or -1, not weights.get("symmetric", True), is_ordered)
    return _layout(tool, parts, partial(_read_compressed, needs_zeros=symmetric == {False}), config, scheme)


def _group_size(size: Any, where: str) -> int | None:
    """Return the number of inputs in a group; None for one group in each row."""
    if type(size) is not int or (size <= 0 and size != -1):
        raise PeftcoreError(
            f"'{where}' has group_size={validation.shown(size)} in its config, expected a positive number or -1"
        )
    return None if size == -1 else size


# --- reading a weight --------------------------------------------------------------------------------------------


def _read_gptq(
    tensors: Mapping[str, Tensor], name: str, *, size: int | None, is_v1: bool, by_gptqmodel: bool
) -> Int4Weight:
    """Read GPTQ's layout.

    Args:
        tensors: the tensors by part.
        name: name of the layer, for messages.
        size: number of inputs in a group; None: one group in each row.
        is_v1: the format is `gptq`, whose zeros are one less.
        by_gptqmodel: GPTQModel wrote it, which subtracts 0x11111111 from whole words, so that adding it restores zeros
            of 0 as well.
    """
    qweight, qzeros, scales = _taken(tensors, ("qweight", "qzeros", "scales"), name)
    rows, columns = qweight.shape[-1], 8 * qweight.shape[0]
    groups = scales.shape[0]
    _check(qweight, torch.int32, (columns // 8, rows), "qweight", name)
    _check_scales(scales, (groups, rows), "scales", name)
    _check(qzeros, torch.int32, (groups, rows // 8), "qzeros", name)
    order, group = _order(tensors.get("g_idx"), columns, groups, size, name)
    if is_v1:
        if not by_gptqmodel and (_nibbles(qzeros) == 15).any():
            raise CheckpointError(
                f"'{name}.qzeros' has zero points of 15 in format 'gptq', which AutoGPTQ and GPTQModel read "
                "differently. Save the checkpoint with GPTQModel in format='gptq_v2'"
            )
        qzeros = qzeros + _ONES
    zeros = _zeros(_nibbles(qzeros).T.contiguous())
    scales = scales.T.contiguous()
    if order is None:
        codes = swap_nibbles(qweight.T.contiguous().view(torch.uint8)).view(-1, 1)
    else:
        codes = torch.cat([_bytes(_nibbles(part.T)[:, order]) for part in qweight.split(_ROWS, 1)])
    return Int4Weight(codes, scales, zeros, (rows, columns), group, order)


def _read_awq(tensors: Mapping[str, Tensor], name: str, *, size: int | None) -> Int4Weight:
    """Read AutoAWQ's layout. `size`: number of inputs in a group."""
    qweight, qzeros, scales = _taken(tensors, ("qweight", "qzeros", "scales"), name)
    columns, rows = qweight.shape[0], 8 * qweight.shape[-1]
    groups = scales.shape[0]
    _check(qweight, torch.int32, (columns, rows // 8), "qweight", name)
    _check_scales(scales, (groups, rows), "scales", name)
    _check(qzeros, torch.int32, (groups, rows // 8), "qzeros", name)
    _, group = _order(None, columns, groups, size, name)
    places = torch.tensor(_AWQ_PLACES, device=qweight.device)

    def in_order(words: Tensor) -> Tensor:
        """Return `[out, ..]` of words `[.., out / 8]`."""
        return _nibbles(words).view(len(words), -1, 8)[..., places].flatten(1).T.contiguous()

    codes = torch.cat([_bytes(in_order(part)) for part in qweight.split(_ROWS // 8, 1)])
    return Int4Weight(codes, scales.T.contiguous(), _zeros(in_order(qzeros)), (rows, columns), group)


def _read_compressed(tensors: Mapping[str, Tensor], name: str, *, needs_zeros: bool) -> Int4Weight:
    """Read compressed-tensors' layout. `needs_zeros`: the config says that all layers have zeros."""
    packed, scales, sizes = _taken(tensors, ("weight_packed", "weight_scale", "weight_shape"), name)
    _check(sizes, torch.int32 if sizes.dtype is torch.int32 else torch.int64, (2,), "weight_shape", name)
    rows, columns = (int(each) for each in sizes.tolist())
    _check(packed, torch.int32, (rows, -(-columns // 8)), "weight_packed", name)
    groups = scales.shape[-1]
    _check_scales(scales, (rows, groups), "weight_scale", name)
    order, group = _order(tensors.get("weight_g_idx"), columns, groups, None, name)
    stored, zeros = tensors.get("weight_zero_point"), None
    if stored is None and needs_zeros:
        raise damaged(name, "lacks 'weight_zero_point', but the config says symmetric=false")
    if stored is not None and stored.dtype is torch.int8:
        _check(stored, torch.int8, (rows, groups), "weight_zero_point", name)
        zeros = (stored.to(torch.int16) + 8).to(torch.uint8)
        if (zeros > 15).any():
            raise damaged(name, "has values of 'weight_zero_point' outside -8..7")
    elif stored is not None:
        _check(stored, torch.int32, (-(-rows // 8), groups), "weight_zero_point", name)
        zeros = _nibbles(stored.T.contiguous())[:, :rows].T.contiguous()
    if order is None and columns % 8 == 0:
        codes = swap_nibbles(packed.detach().clone().view(torch.uint8)).view(-1, 1)
    else:
        taken = slice(columns) if order is None else order
        codes = torch.cat([_bytes(_nibbles(part)[:, taken]) for part in packed.split(_ROWS)])
    return Int4Weight(
        codes, scales.contiguous(), None if zeros is None else _zeros(zeros), (rows, columns), group, order
    )


def _nibbles(words: Tensor) -> Tensor:
    """Return uint8 `[.., 8 n]` of int32 words `[.., n]`, the lowest four bits first."""
    bytes_ = words.contiguous().view(torch.uint8)
    return torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(-2)


def _bytes(codes: Tensor) -> Tensor:
    """Return uint8 `[n / 2, 1]` of codes `[out, in]`, the even one in the high nibble."""
    return (codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1)


def _zeros(zeros: Tensor) -> Tensor | None:
    """Return the zeros, or None if all are 8."""
    return None if (zeros == 8).all() else zeros


def _order(g_idx: Tensor | None, columns: int, groups: int, size: int | None, name: str) -> tuple[Tensor | None, int]:
    """Return the inputs in the order of their groups (None if they are in it) and the size of a group.

    Raises:
        CheckpointError: groups differ in size, or do not divide the inputs.
    """
    if columns % 2 or not groups or columns % groups:
        raise damaged(name, f"has {groups} groups for {columns} inputs")
    group = columns // groups
    if g_idx is None:
        if size is not None and size != group and size < columns:
            raise damaged(name, f"has {groups} groups for {columns} inputs, but the config says group_size={size}")
        return None, group
    if g_idx.is_floating_point() or g_idx.shape != (columns,):
        raise damaged(name, f"has g_idx {g_idx.dtype} {list(g_idx.shape)}, expected {torch.int32} [{columns}]")
    if (g_idx == -1).all():  # compressed-tensors' first value, which means that inputs are in order
        return None, group
    order = torch.argsort(g_idx, stable=True)
    wanted = torch.arange(groups, device=g_idx.device).repeat_interleave(group)
    if not torch.equal(g_idx[order].long(), wanted):
        raise damaged(name, f"has a g_idx whose {groups} groups do not have {group} inputs each")
    in_order = torch.equal(order, torch.arange(columns, device=order.device))
    return None if in_order else order, group


def _taken(tensors: Mapping[str, Tensor], parts: tuple[str, ...], name: str) -> list[Tensor]:
    missing = next((part for part in parts if part not in tensors), None)
    if missing is not None:
        raise damaged(name, f"lacks '{name}.{missing}'")
    odd = next((part for part in parts if tensors[part].dim() != (1 if part == "weight_shape" else 2)), None)
    if odd is not None:
        raise damaged(name, f"has '{odd}' of shape {list(tensors[odd].shape)}")
    return [tensors[part] for part in parts]


def _check(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], part: str, name: str) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise damaged(name, f"has '{part}' {found}, expected {dtype} {list(shape)}")


def _check_scales(scales: Tensor, shape: tuple[int, int], part: str, name: str) -> None:
    if scales.dtype not in DTYPES:
        raise damaged(name, f"has '{part}' {scales.dtype}, expected float32, float16 or bfloat16")
    _check(scales, scales.dtype, shape, part, name)
    if not scales.isfinite().all():
        raise damaged(name, f"has NaN or Inf in '{part}'")
