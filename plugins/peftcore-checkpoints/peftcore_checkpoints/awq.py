"""Reader of AWQ checkpoints, written by AutoAWQ in its version `gemm`.

Layer X has these tensors; words are int32 with eight outputs each:

    X.qweight   words [in, out / 8]; from the lowest four bits, a word has the outputs 0, 2, 4, 6, 1, 3, 5, 7
    X.qzeros    words [groups, out / 8] in the same order
    X.scales    [groups, out]

Source: awq/modules/linear/gemm.py of casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftcore.plugin import CheckpointLayout, validation
from peftcore_checkpoints.configs import check_bits, unsupported_error
from peftcore_checkpoints.int4 import Int4Scheme, Int4Weight, int4_layout
from peftcore_checkpoints.int4_tensors import (
    CHUNK_ROWS,
    check_scales,
    check_tensor,
    group_size,
    inputs_per_group,
    none_if_default,
    pack_codes,
    require_tensors,
    unpack_nibbles,
)

_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)  # the position in a word of each of its eight outputs


def awq_layout(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout:
    """Return the layout of an AWQ checkpoint (version `gemm`) with this `quantization_config`.

    Raises:
        PeftcoreError: the layout is not supported.
    """
    check_bits(config, checkpoint, "AWQ")
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm" or config.get("backend") == "llm-awq":
        version_name = "llm-awq" if version == "gemm" else version
        advice = "Quantize it with AutoAWQ in version='gemm', or use the dense checkpoint"
        raise unsupported_error(
            checkpoint, f"AWQ in the version {validation.shown(version_name)}", "the version 'gemm'", advice
        )
    size = config.get("group_size", config.get("q_group_size", -1))
    read = partial(_read_weight, config_size=group_size(size, checkpoint))
    scheme = Int4Scheme(size, has_zeros=True, is_ordered=False)
    return int4_layout("AWQ", ("qweight", "qzeros", "scales"), read, config, scheme)


def _read_weight(tensors: Mapping[str, Tensor], name: str, *, config_size: int | None) -> Int4Weight:
    """Read a weight.

    Args:
        tensors: the tensors of the layer by suffix.
        name: name of the layer, for errors.
        config_size: number of inputs in a group; None: one group per row.

    Raises:
        CheckpointError: a tensor is missing or does not fit the layout.
    """
    qweight, qzeros, scales = require_tensors(tensors, ("qweight", "qzeros", "scales"), name)
    columns, rows = qweight.shape[0], 8 * qweight.shape[-1]
    groups = scales.shape[0]
    check_tensor(qweight, torch.int32, (columns, rows // 8), "qweight", name)
    check_scales(scales, (groups, rows), "scales", name)
    check_tensor(qzeros, torch.int32, (groups, rows // 8), "qzeros", name)
    group = inputs_per_group(columns, groups, config_size, name)
    chunks = qweight.split(CHUNK_ROWS // 8, 1)
    codes = torch.cat([pack_codes(_unpack_outputs(chunk)) for chunk in chunks])
    zeros = none_if_default(_unpack_outputs(qzeros))
    return Int4Weight(codes, scales.T.contiguous(), zeros, (rows, columns), group)


def _unpack_outputs(words: Tensor) -> Tensor:
    """Unpack words `[n, out / 8]` to uint8 `[out, n]` in the order of the outputs."""
    positions = torch.tensor(_POSITIONS, device=words.device)
    return unpack_nibbles(words).view(len(words), -1, 8)[..., positions].flatten(1).T.contiguous()
