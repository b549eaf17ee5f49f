"""Weight formats of dense layers, and the search for the format of a module."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from peftcore.errors import PeftcoreError
from peftcore.model.experts import PackedExpert
from peftcore.plugin.discovery import CORE, Plugin
from peftcore.plugin.hooks import hookimpl
from peftcore.plugin.layers import has_scaled_float8, is_bitsandbytes, is_conv1d, is_wrapped
from peftcore.plugin.method import WeightFormat
from peftcore.plugin.plugin_errors import failed_at, is_passed_on
from peftcore.plugin.registry import builtin, registry


def _attention_bias(module: nn.MultiheadAttention) -> Tensor | None:
    return None if module.in_proj_bias is None else torch.cat([module.in_proj_bias, module.out_proj.bias])


DENSE = WeightFormat(
    name="dense",
    matches=lambda module: (
        (weight := module._parameters.get("weight")) is not None
        and weight.is_floating_point()
        and not is_wrapped(weight)
        and (weight.itemsize > 1 or not has_scaled_float8(module))
        and (isinstance(module, nn.Linear) or not (isinstance(module, nn.MultiheadAttention) or is_conv1d(module)))
    ),
    read=lambda module: module.weight,
    write=lambda module, weight: {"weight": weight.to(module.weight.dtype)},
)
TRANSPOSED = WeightFormat(
    name="transposed",
    matches=is_conv1d,
    read=lambda module: module.weight.T,
    write=lambda module, weight: {"weight": weight.T.to(module.weight.dtype).contiguous()},
)
ATTENTION = WeightFormat(
    name="attention",  # the projections of queries, keys, values and of the output, one below the other: [4 E, E]
    matches=lambda module: isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None,
    read=lambda module: torch.cat([module.in_proj_weight, module.out_proj.weight]),
    write=lambda module, weight: {
        "in_proj_weight": weight[: 3 * module.embed_dim].to(module.in_proj_weight.dtype).clone(),
        "out_proj.weight": weight[3 * module.embed_dim :].to(module.out_proj.weight.dtype).clone(),
    },
    read_bias=_attention_bias,
    write_bias=lambda module, bias: {
        "in_proj_bias": bias[: 3 * module.embed_dim].to(module.in_proj_bias.dtype).clone(),
        "out_proj.bias": bias[3 * module.embed_dim :].to(module.out_proj.bias.dtype).clone(),
    },
)


ONE_EXPERT = WeightFormat(
    name="one expert in 4 bits",
    matches=lambda module: isinstance(module, PackedExpert),
    read=lambda module: module.weight,
    write=lambda _module, weight: {"weight": weight},
    decode=lambda _module, tensors: tensors["weight"],
)


@hookimpl
def peftcore_weight_formats() -> list[WeightFormat]:
    return [DENSE, TRANSPOSED, ATTENTION, ONE_EXPERT]


builtin(sys.modules[__name__])


def find_weight_format(module: nn.Module) -> WeightFormat | None:
    """Return the format that reads the weight of `module`, or None; plugins' formats come first.

    Raises:
        PluginError: a plugin's hook fails; otherwise weights in its format would be mistaken for plain ones.
    """
    return _first_that_matches(module, registry.offered("peftcore_weight_formats", WeightFormat).values())


def _first_that_matches(module: nn.Module, formats: Iterable[tuple[Plugin, WeightFormat]]) -> WeightFormat | None:
    for plugin, each in formats:
        try:
            if each.matches(module):
                return each
        except Exception as error:
            if plugin is CORE or is_passed_on(error):
                raise
            raise failed_at(module, "matches", each.name, plugin, error) from error
    return None


def weight_format(module: nn.Module) -> WeightFormat:
    """Return the format that reads the weight of `module`.

    Raises:
        PeftcoreError: none does.
    """
    found = find_weight_format(module)
    if found is None:
        if is_bitsandbytes(module):
            raise PeftcoreError(
                "no weight format reads Linear4bit of bitsandbytes. Call peftcore.quantize(model) before apply: the "
                "layers keep their bits"
            )
        if has_scaled_float8(module):
            raise PeftcoreError(
                f"no weight format reads {type(module).__name__}: scales multiply its 8-bit floats. Load the model "
                "with dense weights: from_pretrained(..., quantization_config=FineGrainedFP8Config(dequantize=True))"
            )
        weight = module._parameters.get("weight")
        if weight is not None and not weight.is_floating_point():
            raise PeftcoreError(
                f"no weight format reads {type(module).__name__}: another library keeps its weight in {weight.dtype}. "
                "Use a dense base, or one in 4 bits (peftcore.quantize)"
            )
        raise PeftcoreError(
            f"no weight format reads {type(module).__name__}: it has no floating-point parameter 'weight'. "
            "If a norm computes it (parametrize, weight_norm), remove the norm before apply; otherwise a plugin can "
            "provide a format"
        )
    return found


def quantized_format(module: nn.Module, name: str) -> WeightFormat | None:
    """Return the format of the module's own quantized parameter `name`; None if it is dense."""
    if name == "weight":
        found = find_weight_format(module)
        return found if found is not None and found.decode is not None else None
    parameter = module._parameters.get(name)
    if parameter is None or parameter.is_floating_point():
        return None
    offered = registry.offered("peftcore_weight_formats", WeightFormat).values()
    named = ((plugin, each.for_parameter(name)) for plugin, each in offered if each.for_parameter is not None)
    return _first_that_matches(module, ((plugin, each) for plugin, each in named if each.decode is not None))
