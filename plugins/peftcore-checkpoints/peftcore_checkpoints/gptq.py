"""Reader of GPTQ checkpoints, written by GPTQModel or AutoGPTQ.

Layer X has these tensors; words are int32 with the first value in the lowest four bits:

    X.qweight   words [in / 8, out], eight inputs each
    X.qzeros    words [groups, out / 8], eight outputs each; the format `gptq` stores each zero minus one (it subtracts
                0x11111111 from the word), `gptq_v2` stores the zeros themselves
    X.scales    [groups, out]
    X.g_idx     int32 [in], the group of each input (act-order); may be absent

Source: gptqmodel/nn_modules/qlinear and gptqmodel/utils/model.py of ModelCloud/GPTQModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftcore.ops.mxfp4 import swap_nibbles
from peftcore.plugin import CheckpointError, CheckpointLayout, validation
from peftcore_checkpoints.configs import INT4_ADVICE, check_bits, read_object, unsupported_error
from peftcore_checkpoints.int4 import Int4Scheme, Int4Weight, int4_layout
from peftcore_checkpoints.int4_tensors import (
    CHUNK_ROWS,
    check_scales,
    check_tensor,
    group_size,
    input_order,
    inputs_per_group,
    none_if_default,
    pack_codes,
    require_tensors,
    unpack_nibbles,
)

_ONE_PER_NIBBLE = 0x11111111  # the value 1 in each of a word's eight nibbles


def gptq_layout(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout:
    """Return the layout of a GPTQ checkpoint with this `quantization_config`.

    Raises:
        PeftcoreError: the layout is not supported.
    """
    file_format = _file_format(config)
    _check_supported(config, file_format, checkpoint)
    size = config.get("group_size", -1)
    read = partial(
        _read_weight,
        config_size=group_size(size, checkpoint),
        is_v1=file_format == "gptq",
        is_by_gptqmodel=_is_by_gptqmodel(config, checkpoint),
    )
    scheme = Int4Scheme(size, not config.get("sym", True), bool(config.get("desc_act", False)))
    return int4_layout("GPTQ", ("qweight", "qzeros", "scales", "g_idx"), read, config, scheme)


def _file_format(config: Mapping[str, Any]) -> Any:
    default = "marlin" if config.get("is_marlin_format") else "gptq"
    return config.get("checkpoint_format") or config.get("format") or default


def _check_supported(config: Mapping[str, Any], file_format: Any, checkpoint: str) -> None:
    """Raise a PeftcoreError if the weights are not 4-bit values in int32 words of a known format."""
    check_bits(config, checkpoint, "GPTQ")
    if file_format not in ("gptq", "gptq_v2"):
        advice = "Save it with GPTQModel in format='gptq_v2', or use the dense checkpoint"
        raise unsupported_error(
            checkpoint, f"GPTQ in format {validation.shown(file_format)}", "the format 'gptq' or 'gptq_v2'", advice
        )
    # `dynamic` overrides settings for the layers that match a pattern.
    for pattern, overrides in read_object(config, "dynamic", checkpoint).items():
        bits = overrides.get("bits", 4) if isinstance(overrides, Mapping) else 4
        if bits != 4:
            raise unsupported_error(
                checkpoint, f"GPTQ in {validation.shown(bits)} bits for layers '{pattern}'", "4 bits", INT4_ADVICE
            )
    pack_dtype = config.get("pack_dtype", "int32")
    if str(pack_dtype).removeprefix("torch.") != "int32":
        raise unsupported_error(
            checkpoint,
            f"GPTQ in words of {validation.shown(pack_dtype)}",
            "int32",
            "Quantize it with pack_dtype='int32'",
        )


def _is_by_gptqmodel(config: Mapping[str, Any], checkpoint: str) -> bool:
    """Return whether the config names GPTQModel as the tool that quantized the checkpoint."""
    quantizers = read_object(config, "meta", checkpoint).get("quantizer") or ()
    if not isinstance(quantizers, (list, tuple)):
        quantizers = [quantizers]
    return any(str(quantizer).startswith("gptqmodel") for quantizer in quantizers)


def _read_weight(
    tensors: Mapping[str, Tensor], name: str, *, config_size: int | None, is_v1: bool, is_by_gptqmodel: bool
) -> Int4Weight:
    """Read a weight.

    Args:
        tensors: the tensors of the layer by suffix.
        name: name of the layer, for errors.
        config_size: number of inputs in a group; None: one group per row.
        is_v1: the format is `gptq`, which stores each zero minus one.
        is_by_gptqmodel: GPTQModel wrote the file.

    Raises:
        CheckpointError: a tensor is missing or does not fit the layout.
    """
    qweight, qzeros, scales = require_tensors(tensors, ("qweight", "qzeros", "scales"), name)
    rows, columns = qweight.shape[-1], 8 * qweight.shape[0]
    groups = scales.shape[0]
    check_tensor(qweight, torch.int32, (columns // 8, rows), "qweight", name)
    check_scales(scales, (groups, rows), "scales", name)
    check_tensor(qzeros, torch.int32, (groups, rows // 8), "qzeros", name)
    g_idx = tensors.get("g_idx")
    if g_idx is None:
        group, order = inputs_per_group(columns, groups, config_size, name), None
    else:
        group = inputs_per_group(columns, groups, None, name)
        order = input_order(g_idx, groups, group, name)
    if is_v1:
        # GPTQModel subtracts 0x11111111 from the whole word, so adding it also restores a zero of 0. In files of
        # AutoGPTQ, a stored zero of 15 is ambiguous.
        if not is_by_gptqmodel and (unpack_nibbles(qzeros) == 15).any():
            raise CheckpointError(
                f"'{name}.qzeros' has zero points of 15 in format 'gptq', which AutoGPTQ and GPTQModel read "
                "differently. Save the checkpoint with GPTQModel in format='gptq_v2'"
            )
        qzeros = qzeros + _ONE_PER_NIBBLE
    zeros = none_if_default(unpack_nibbles(qzeros).T.contiguous())
    scales = scales.T.contiguous()
    if order is None:
        codes = swap_nibbles(qweight.T.contiguous().view(torch.uint8)).view(-1, 1)
    else:
        chunks = qweight.split(CHUNK_ROWS, 1)
        codes = torch.cat([pack_codes(unpack_nibbles(chunk.T)[:, order]) for chunk in chunks])
    return Int4Weight(codes, scales, zeros, (rows, columns), group, order)
