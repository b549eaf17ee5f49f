"""Types of `peftcore.quantize`: weight formats that can quantize a layer, those of the core and of plugins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftcore.errors import PeftcoreError, PluginError, warn
from peftcore.layers import is_conv1d
from peftcore.method import WeightFormat
from peftcore.plugin_discovery import Plugin
from peftcore.quantization.format import QUANT_TYPES
from peftcore.registry import registry
from peftcore.validation import shown


def find_type(quant_type: Any) -> tuple[Plugin, WeightFormat]:
    """Return the weight format `quant_type` and its plugin.

    Raises:
        PeftcoreError: no installed format with this name can quantize.
        PluginError: the format cannot be undone.
    """
    offered = registry.offered("peftcore_weight_formats", WeightFormat)
    known = {name: found for name, found in offered.items() if found[1].quantize is not None}
    if isinstance(quant_type, str) and quant_type in known:
        plugin, found = known[quant_type]
        if found.decode is None or found.plain is None:
            raise PluginError(
                f"the weight format '{quant_type}' of {plugin} has `quantize`, but not `decode` and `plain`. Add both"
            )
        return plugin, found
    names = ", ".join([*QUANT_TYPES, *sorted(name for name in known if name not in QUANT_TYPES)])
    raise PeftcoreError(f"quant_type={shown(quant_type)} is not known. Choose one of: {names}")


def refuse_options(quant_type: str, double_quant: bool, blocksize: int, compute_dtype: torch.dtype | None) -> None:
    """Raise a PeftcoreError for options that only the types of the core have."""
    if double_quant and blocksize == 64 and compute_dtype is None:  # the defaults
        return
    raise PeftcoreError(
        f"quant_type='{quant_type}' takes no double_quant, blocksize or compute_dtype, found {double_quant}, "
        f"{shown(blocksize)} and {compute_dtype}. Leave them out, or choose one of: {', '.join(QUANT_TYPES)}"
    )


def warn_of_experts(names: list[str], quant_type: str) -> None:
    """Warn of weights of experts, which a plugin's format does not store."""
    if names:
        warn(
            f"{len(names)} weights of experts ('{names[0]}') are left dense, because quant_type='{quant_type}' stores "
            "linear layers only",
        )


def quantize_by_plugin(plugin: Plugin, weight_format: WeightFormat, layers: Mapping[str, nn.Module]) -> None:
    """Quantize dense linear layers, by path, in a plugin's format.

    Raises:
        PluginError: the plugin fails, or leaves a layer in another format.
    """
    assert weight_format.quantize is not None
    for path, layer in layers.items():
        _make_linear(layer)
        try:
            with registry.naming(plugin, "quantize"):
                weight_format.quantize(layer)
        except PeftcoreError as error:
            raise type(error)(f"'{path}': {error}. Layers before it are quantized: load the model again") from error
        if not weight_format.matches(layer):
            raise PluginError(
                f"quantize of {plugin} left '{path}' in another format: `matches` of the format '{weight_format.name}' "
                "must be true for it"
            )


def dequantize_by_plugin(module: Any, weight_format: WeightFormat, dtype: torch.dtype | None) -> None:
    """Turn a layer in a plugin's format into an ordinary one with the values of its weight."""
    assert weight_format.plain is not None
    weight = weight_format.read(module).detach()
    module._parameters["weight"] = nn.Parameter(weight if dtype is None else weight.to(dtype), requires_grad=False)
    weight_format.plain(module)


def _make_linear(layer: Any) -> None:
    """Turn a layer that computes x Wᵀ + b, such as a Conv1D, into an `nn.Linear`."""
    if is_conv1d(layer):
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=layer.weight.requires_grad)
        for attribute in ("nf", "nx"):
            layer.__dict__.pop(attribute, None)
        layer.out_features, layer.in_features = layer.weight.shape
    layer.__class__ = nn.Linear
