"""Descriptions of other tools' 4-bit checkpoints, provided by plugins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.ops import PackedWeight


@dataclass(frozen=True)
class CheckpointLayout:
    """Layout of the 4-bit weights of a checkpoint.

    Args:
        tool, kind: names of the tool and of the kind of weights, for error messages.
        quant_type: format of the packed weights, a `quant_type` of `peftcore.quantize` such as `affine4`.
        parts: suffixes of the names of a layer's tensors: layer `X` has `X.part`. The first contains the codes.
        read: (tensors by part, name of the layer) -> weight, as an object of any type. Raises CheckpointError.
        pack: (weight returned by `read`, dtype, name) -> packed weight, which is dequantized to this dtype.
        join: (packed projections ordered by expert, number of experts, name) -> packed weight of all experts.
        empty: (shape, dtype, name) -> uninitialized packed weight on the default device.
        dense: layers that are not in the layout, as parts of their paths, regular expressions after `re:`, or paths
            with asterisks.
        known_by: name of a tensor that only weights in the layout have; by default the first part.
        ignored: names of a layer's tensors that are not read.
        packed_names: (safetensors files) -> names of the weights in the layout, if the tool gives their codes the name
            of a dense weight. Such codes are read as the first part.
        warning: warning about a difference from what the checkpoint specifies, or "".
    """

    tool: str
    kind: str
    quant_type: str
    parts: tuple[str, ...]
    read: Callable[[Mapping[str, Tensor], str], Any]
    pack: Callable[[Any, torch.dtype, str], PackedWeight]
    join: Callable[[Sequence[PackedWeight], int, str], PackedWeight]
    empty: Callable[[tuple[int, ...], torch.dtype, str], PackedWeight]
    dense: tuple[str, ...] = ()
    known_by: str = ""
    ignored: tuple[str, ...] = ()
    packed_names: Callable[[Sequence[str]], set[str]] | None = None
    warning: str = ""


@dataclass(frozen=True)
class CheckpointFormat:
    """A kind of checkpoint that a plugin reads.

    Args:
        name: `quant_method` in the `quantization_config` of such models.
        layout: (`quantization_config`, name of the checkpoint for error messages) -> layout. Raises PeftcoreError for
            unsupported weights.
    """

    name: str
    layout: Callable[[Mapping[str, Any], str], CheckpointLayout]
