"""Int4 weights of all tools in one representation, and their conversion to peftcore's type `affine4`.

A weight W `[out, in]` is scale * (code - zero), with codes and zeros from 0 to 15, and one scale and one zero for each
row and group of inputs. GPTQ, AWQ and compressed-tensors store this in different layouts. `gptq.py`, `awq.py` and
`compressed_int4.py` read them into an `Int4Weight` and describe the checkpoint with `int4_layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftcore.ops import PackedWeight, codebook
from peftcore.ops.huge_pages import in_huge_pages
from peftcore.ops.weight import AFFINE, MAX_BLOCKSIZE, MIN_BLOCKSIZE
from peftcore.plugin import CheckpointLayout, PeftcoreError
from peftcore_checkpoints.configs import damaged_error, dense_layers


class Int4Weight(NamedTuple):
    """An int4 weight with the values of the checkpoint, in the same representation for all tools.

    Args:
        codes: uint8 `[out * in / 2, 1]`, two codes per byte, the even column in the high nibble.
        scales: fp32, fp16 or bf16 `[out, groups]`.
        zeros: uint8 `[out, groups]`; None if all are 8.
        shape: `(out, in)`.
        group: number of inputs that share a scale.
        order: int64 `[in]`: column j of the codes belongs to input `order[j]`. None: to input j.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    group: int
    order: Tensor | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        """Dequantize to the dense weight `[out, in]`, computed in this dtype."""
        code_pairs = self.codes.view(self.shape[0], -1)
        codes = torch.stack((code_pairs >> 4, code_pairs & 15), -1).flatten(-2).to(dtype)
        zeros = 8 if self.zeros is None else self.zeros.to(dtype).repeat_interleave(self.group, 1)
        dense = (codes - zeros) * self.scales.to(dtype).repeat_interleave(self.group, 1)
        if self.order is None:
            return dense
        return torch.empty_like(dense).index_copy_(1, self.order, dense)


def to_affine4(weight: Int4Weight, dtype: torch.dtype, name: str) -> PackedWeight:
    """Convert a weight to peftcore's type `affine4`.

    Args:
        weight: the weight.
        dtype: dtype of the weight when it is dequantized.
        name: name of the weight, for errors.

    Raises:
        PeftcoreError: the group size is not a multiple of 32.
    """
    # Blocks of affine4 are powers of two, so take the largest one that divides a group.
    block = min(weight.group & -weight.group, MAX_BLOCKSIZE)
    if block < MIN_BLOCKSIZE:
        raise PeftcoreError(
            f"'{name}' has groups of {weight.group} inputs, but the group size must be a multiple of "
            f"{MIN_BLOCKSIZE}. Use a checkpoint with larger groups, or the dense checkpoint"
        )
    scales, zeros = weight.scales, weight.zeros
    if block < weight.group:
        # Divide each group into blocks with the same scale and zero.
        blocks_per_group = weight.group // block
        scales = scales.repeat_interleave(blocks_per_group, 1)
        if zeros is not None:
            zeros = zeros.repeat_interleave(blocks_per_group, 1)
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


def join_experts(projections: Sequence[PackedWeight], experts: int, name: str) -> PackedWeight:
    """Concatenate the affine4 weights of single experts into the parameter `name` `[experts, out, in]`.

    Args:
        projections: the projections of the first expert, then those of the second, and so on.
        experts: number of experts.
        name: name of the parameter, for errors.

    Raises:
        PeftcoreError: the projections differ in shape or blocks, or are permuted, which a parameter of experts cannot
            represent.
    """
    if any(projection.permutation is not None for projection in projections):
        raise PeftcoreError(
            f"'{name}' has int4 experts with act-order (`g_idx`), which gives each expert its own order of inputs and "
            "cannot be read. Quantize with desc_act=False, or use the dense checkpoint"
        )
    per_expert = len(projections) // experts
    first_expert = projections[:per_expert]
    shapes = [(projection.shape, projection.blocksize) for projection in projections]
    experts_are_alike = shapes == shapes[:per_expert] * experts
    have_same_inputs = len({(shape[1], blocksize) for shape, blocksize in shapes}) == 1
    if not (experts_are_alike and have_same_inputs):
        raise damaged_error(name, "has experts of different shapes or groups")
    shape = experts, sum(projection.shape[0] for projection in first_expert), first_expert[0].shape[1]
    return first_expert[0]._replace(
        codes=torch.cat([projection.codes for projection in projections]),
        absmax=torch.cat([projection.absmax for projection in projections]),
        zeros=_join_zeros(projections),
        shape=shape,
    )


def _join_zeros(projections: Sequence[PackedWeight]) -> Tensor | None:
    """Concatenate the zeros of projections, or return None if all of them are 8."""
    if all(projection.zeros is None for projection in projections):
        return None
    zeros = []
    for projection in projections:
        if projection.zeros is None:
            zeros.append(torch.full_like(projection.absmax, 8, dtype=torch.uint8))
        else:
            zeros.append(projection.zeros)
    return torch.cat(zeros)


class Int4Scheme(NamedTuple):
    """The settings of a `quantization_config` that determine which tensors a layer has.

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
        has_one_group = self.group == -1 or columns % self.group
        group = columns if has_one_group else self.group
        codes = torch.empty(rows * columns // 2, 1, dtype=torch.uint8)
        scales = torch.empty(rows, columns // group, dtype=torch.float16)
        zeros = order = None
        if self.has_zeros:
            zeros = torch.empty(rows, columns // group, dtype=torch.uint8)
        if self.is_ordered and len(shape) == 2:
            order = torch.empty(columns, dtype=torch.int64)
        packed = to_affine4(Int4Weight(codes, scales, zeros, (rows, columns), group, order), dtype, name)
        return packed._replace(shape=shape)


def int4_layout(
    tool: str,
    parts: tuple[str, ...],
    read: Callable[[Mapping[str, Tensor], str], Int4Weight],
    config: Mapping[str, Any],
    scheme: Int4Scheme,
) -> CheckpointLayout:
    """Describe an int4 checkpoint to peftcore.

    Args:
        tool: name of the tool that wrote the checkpoint, for errors.
        parts: suffixes of the names of a layer's tensors; the first tensor has the codes.
        read: (tensors by suffix, name of the layer) -> weight.
        config: the `quantization_config`.
        scheme: its settings.
    """
    return CheckpointLayout(
        tool,
        kind="int4",
        quant_type="affine4",
        parts=parts,
        read=read,
        pack=to_affine4,
        join=join_experts,
        empty=scheme.empty,
        dense=dense_layers(config),
    )
