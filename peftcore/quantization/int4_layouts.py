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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.ops.mxfp4 import swap_nibbles
from peftcore.ops.weight import DTYPES, PackedWeight
from peftcore.quantization.affine4_format import Int4Weight, to_affine4
from peftcore.validation import shown

_ONES = 0x11111111  # one in each of a word's eight values
_ROWS = 256  # of a weight that are unpacked together, so that temporary memory stays small
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight outputs is


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


@dataclass(frozen=True)
class CheckpointLayout:
    """Layout of the 4-bit weights of a checkpoint.

    Args:
        tool, kind: names of the tool and of the kind of weights, for messages.
        parts: names of a layer's tensors. The first is the codes.
        read: (tensors by part, name of the layer) -> weight. Raises CheckpointError.
        pack: (weight, dtype, name) -> packed weight of this dtype.
        join: (packed projections, one expert after the other; experts; name) -> packed weight of all experts.
        quant_type: format of the packed weights.
        ignored: names of a layer's tensors that are not read.
        warning: what is not as the checkpoint says, or "".
    """

    tool: str
    parts: tuple[str, ...]
    read: Callable[[Mapping[str, Tensor], str], Any]
    kind: str = "int4"
    pack: Callable[[Any, torch.dtype, str], PackedWeight] = to_affine4
    join: Callable[[Sequence[PackedWeight], int, str], PackedWeight] = joined_rows
    quant_type: str = "affine4"
    ignored: tuple[str, ...] = ()
    warning: str = ""

    @property
    def known_by(self) -> str:
        """Name of a tensor that only a weight in the layout has."""
        return self.parts[-1] if self.kind == "NVFP4" else self.parts[0]


def int4_layout(config: Mapping[str, Any], where: str) -> CheckpointLayout | None:
    """Return the int4 layout that a model's `quantization_config` describes; None if another kind of format does.

    Raises:
        PeftcoreError: the format is GPTQ, AWQ or compressed-tensors, with a layout that is not read.
    """
    method = config.get("quant_method")
    make = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}.get(str(method))
    return None if make is None else make(config, where)


def refused(where: str, found: str, needed: str, what_to_do: str) -> PeftcoreError:
    """Return the error for a checkpoint of a tool in a layout that is not read."""
    return PeftcoreError(f"'{where}' is quantized with {found}, but only {needed} can be read. {what_to_do}")


def object_in(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Return the JSON object `key` of a `quantization_config`, empty if it is missing.

    Raises:
        PeftcoreError: it is another value.
    """
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise PeftcoreError(f"'{where}' has {key}={shown(found)} in its config, expected an object")
    return found


def groups_of(config: Mapping[str, Any], where: str) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return (group, its `weights`) of the `config_groups` of a `quantization_config`, by name.

    Raises:
        PeftcoreError: a group is not an object, such as the name of a preset without its settings.
    """
    groups = object_in(config, "config_groups", where)
    made = {name: object_in(groups, name, where) for name in groups}
    return {name: (group, object_in(group, "weights", where)) for name, group in made.items()}


def refuse_transforms(config: Mapping[str, Any], where: str, what_to_do: str) -> None:
    """Raise a PeftcoreError if compressed-tensors stored transforms of the activations, or sparse weights."""
    if config.get("transform_config"):
        found = "compressed-tensors with transforms of the activations"
        raise refused(where, found, "a model without them", what_to_do)
    sparse = object_in(config, "sparsity_config", where).get("format", "dense")
    if sparse != "dense":
        found = f"compressed-tensors with sparse weights ({shown(sparse)})"
        raise refused(where, found, "a dense layout", what_to_do)


def _check_bits(config: Mapping[str, Any], where: str, tool: str) -> None:
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise refused(where, f"{tool} in {shown(bits)} bits", "4 bits", _OTHER)


_OTHER = "Use a checkpoint of the model in 4 bits, or the dense one"


def _gptq(config: Mapping[str, Any], where: str) -> CheckpointLayout:
    _check_bits(config, where, "GPTQ")
    default = "marlin" if config.get("is_marlin_format") else "gptq"
    stored = config.get("checkpoint_format") or config.get("format") or default
    if stored not in ("gptq", "gptq_v2"):
        again = "Save it with GPTQModel in format='gptq_v2', or use the dense checkpoint"
        raise refused(where, f"GPTQ in the format {shown(stored)}", "the format 'gptq' or 'gptq_v2'", again)
    for pattern, changes in object_in(config, "dynamic", where).items():
        bits = changes.get("bits", 4) if isinstance(changes, Mapping) else 4
        if bits != 4:
            raise refused(where, f"GPTQ in {shown(bits)} bits for layers '{pattern}'", "4 bits", _OTHER)
    words = config.get("pack_dtype", "int32")
    if str(words).removeprefix("torch.") != "int32":
        raise refused(where, f"GPTQ in words of {shown(words)}", "int32", "Quantize it with pack_dtype='int32'")
    size, is_v1 = config.get("group_size", -1), stored == "gptq"
    writers = object_in(config, "meta", where).get("quantizer") or ()
    writers = writers if isinstance(writers, (list, tuple)) else [writers]
    by_gptqmodel = any(str(each).startswith("gptqmodel") for each in writers)
    return CheckpointLayout(
        "GPTQ",
        ("qweight", "qzeros", "scales", "g_idx"),
        partial(_read_gptq, size=_group_size(size, where), is_v1=is_v1, by_gptqmodel=by_gptqmodel),
    )


def _awq(config: Mapping[str, Any], where: str) -> CheckpointLayout:
    _check_bits(config, where, "AWQ")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm" or config.get("backend") == "llm-awq":
        found = "llm-awq" if version == "gemm" else version
        again = "Quantize it with AutoAWQ in version='gemm', or use the dense checkpoint"
        raise refused(where, f"AWQ in the version {shown(found)}", "the version 'gemm'", again)
    size = _group_size(config.get("group_size", config.get("q_group_size", -1)), where)
    return CheckpointLayout("AWQ", ("qweight", "qzeros", "scales"), partial(_read_awq, size=size))


def _compressed_tensors(config: Mapping[str, Any], where: str) -> CheckpointLayout:
    tool, again = "compressed-tensors", "Use a checkpoint of the model in W4A16, or the dense one"
    groups = groups_of(config, where)
    default = config.get("format")
    for stored in (default, *(group.get("format") or default for group, _ in groups.values())):
        if stored != "pack-quantized":
            raise refused(where, f"{tool} in the format {shown(stored)}", "the format 'pack-quantized'", again)
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
    return CheckpointLayout(tool, parts, partial(_read_compressed, needs_zeros=symmetric == {False}))


def _group_size(size: Any, where: str) -> int | None:
    """Return the number of inputs in a group; None for one group in each row."""
    if type(size) is not int or (size <= 0 and size != -1):
        raise PeftcoreError(f"'{where}' has group_size={shown(size)} in its config, expected a positive number or -1")
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


def damaged(name: str, what: str, kind: str = "int4") -> CheckpointError:
    """Return the error for a weight of a layer that is not as its layout says."""
    return CheckpointError(f"the {kind} weight '{name}' {what}. The checkpoint is damaged or has another format")
