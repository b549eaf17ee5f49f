"""How a weight is read and written to merge into it: in plugins' formats, in few bits, transposed, or plainly dense."""

from __future__ import annotations

import torch
from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.method import WeightFormat
from peftcore.registry import registry
from peftcore.targets import is_conv1d

DENSE = WeightFormat(
    name="dense",
    matches=lambda module: (weight := module._parameters.get("weight")) is not None and weight.is_floating_point(),
    read=lambda module: module.weight.detach(),
    write=lambda module, weight: {"weight": weight.to(module.weight.dtype)},
)
TRANSPOSED = WeightFormat(
    name="transposed",
    matches=is_conv1d,
    read=lambda module: module.weight.detach().T,
    write=lambda module, weight: {"weight": weight.T.to(module.weight.dtype).contiguous()},
)
ATTENTION = WeightFormat(
    name="attention",  # the projections of queries, keys, values and of the output, one below the other: [4 E, E]
    matches=lambda module: isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None,
    read=lambda module: torch.cat([module.in_proj_weight.detach(), module.out_proj.weight.detach()]),
    write=lambda module, weight: {
        "in_proj_weight": weight[: 3 * module.embed_dim].to(module.in_proj_weight.dtype).clone(),
        "out_proj.weight": weight[3 * module.embed_dim :].to(module.out_proj.weight.dtype).clone(),
    },
)


def weight_format(module: nn.Module) -> WeightFormat:
    """The format that reads the weight of `module`; those of plugins are asked first."""
    for candidate in (*registry.weight_formats(), TRANSPOSED, ATTENTION, DENSE):
        if candidate.matches(module):
            return candidate
    raise PeftcoreError(
        f"no weight format reads {type(module).__name__}: it has no floating parameter 'weight' of its own. "
        "Where a norm computes that (parametrize, weight_norm), take the norm off before apply; else a plugin can "
        "provide a format"
    )
