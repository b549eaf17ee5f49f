"""Checkpoints that other tools stored in 4 bits, as plugins describe them."""

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
        tool, kind: names of the tool and of the kind of weights, for messages.
        quant_type: type of `peftcore.quantize` whose format the packed weights have, such as `affine4`.
        parts: names of a layer's tensors, those of the layer `X` being `X.part`. The first is the codes.
        read: (tensors by part, name of the layer) -> weight, of any type. Raises CheckpointError.
        pack: (weight that `read` returned, dtype, name) -> packed weight that is dequantized to this dtype.
        join: (packed projections, one expert after the other; experts; name) -> packed weight of all experts.
        empty: (shape, dtype, name) -> packed weight without values, made on the default device.
        dense: layers that are not in the layout: parts of their paths, regular expressions after `re:`, or paths with
            asterisks.
        known_by: name of a tensor that only a weight in the layout has. Default: the first part.
        ignored: names of a layer's tensors that are not read.
        packed_names: (safetensors files) -> names of the weights in the layout, if the tool gives their codes the name
            of a dense weight. They are read as the first part.
        warning: what is not as the checkpoint says, or "".
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
    """Checkpoints that a plugin reads.

    Args:
        name: `quant_method` of the `quantization_config` of such models.
        layout: (`quantization_config`, name of the checkpoint for messages) -> layout. Raises PeftcoreError if such
            weights are not read.
    """

    name: str
    layout: Callable[[Mapping[str, Any], str], CheckpointLayout]
