"""Kinds of layer: what counts as linear, and its sizes."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Is this transformers' Conv1D (GPT-2), a linear whose weight is stored `[in, out]`?"""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """A linear layer in the sense of `all-linear`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def sizes(module: nn.Module) -> tuple[int, int]:
    """(input, output) of a linear layer."""
    layer: Any = module  # of whatever class
    return (layer.nx, layer.nf) if is_conv1d(module) else (layer.in_features, layer.out_features)


def shape_of(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of the weight that the parameter `name` of `module` itself stands for; in 4 bits it has another."""
    if hasattr(type(module), "packings"):  # of `quantization.parameters.PackedParameters`
        packings: Any = module.packings
        if name in packings:
            return tuple(packings[name].shape)
    parameter = module._parameters.get(name)
    if parameter is None:
        parameter = module.get_parameter(name)
    if name == "weight" and is_linear(module) and not parameter.is_floating_point():  # bitsandbytes'
        return sizes(module)[::-1]
    return tuple(parameter.shape)
