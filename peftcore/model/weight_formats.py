"""Weight formats of dense layers, and lookup of a module's format."""

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
    name="attention",  # projections of queries, keys, values and output, stacked: [4 E, E]
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
    name="4-bit weights of single experts",
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
        PluginError: a plugin's hook fails; without it, weights in its format would be treated as dense.
    """
    return _first_match(module, registry.offered("peftcore_weight_formats", WeightFormat).values())


def _first_match(module: nn.Module, formats: Iterable[tuple[Plugin, WeightFormat]]) -> WeightFormat | None:
    for plugin, weight_format in formats:
        try:
            if weight_format.matches(module):
                return weight_format
        except Exception as error:
            if plugin is CORE or is_passed_on(error):
                raise
            raise failed_at(module, "matches", weight_format.name, plugin, error) from error
    return None


def weight_format(module: nn.Module) -> WeightFormat:
    """Return the format that reads the weight of `module`.

    Raises:
        PeftcoreError: no format reads it.
    """
    matching_format = find_weight_format(module)
    if matching_format is None:
        if is_bitsandbytes(module):
            raise PeftcoreError(
                "no weight format reads bitsandbytes' Linear4bit. Call peftcore.quantize(model) before apply, which "
                "keeps the 4-bit values"
            )
        if has_scaled_float8(module):
            raise PeftcoreError(
                f"{type(module).__name__} stores FP8 weights with scales, which no installed weight format can read. "
                "Load the model with dense weights: from_pretrained(..., "
                "quantization_config=FineGrainedFP8Config(dequantize=True))"
            )
        weight = module._parameters.get("weight")
        if weight is not None and not weight.is_floating_point():
            raise PeftcoreError(
                f"no weight format reads {type(module).__name__}, whose weight another library stores as "
                f"{weight.dtype}. Use a dense base, or quantize a dense base with peftcore.quantize(model)"
            )
        raise PeftcoreError(
            f"no weight format reads {type(module).__name__}, which has no floating-point parameter 'weight'. If the "
            "weight is computed (parametrize, weight_norm), remove the parametrization before apply; otherwise add "
            "a weight format in a plugin"
        )
    return matching_format


def quantized_format(module: nn.Module, name: str) -> WeightFormat | None:
    """Return the format of the module's own quantized parameter `name`; None if it is dense."""
    if name == "weight":
        matching_format = find_weight_format(module)
        return matching_format if matching_format is not None and matching_format.decode is not None else None
    parameter = module._parameters.get(name)
    if parameter is None or parameter.is_floating_point():
        return None
    formats = registry.offered("peftcore_weight_formats", WeightFormat).values()
    formats_of_parameter = (
        (plugin, each.for_parameter(name)) for plugin, each in formats if each.for_parameter is not None
    )
    return _first_match(module, ((plugin, each) for plugin, each in formats_of_parameter if each.decode is not None))
