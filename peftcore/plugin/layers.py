"""Kinds of layers: which count as linear, and their sizes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is transformers' Conv1D (GPT-2), a linear layer whose weight is stored `[in, out]`."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Return whether `all-linear` includes this module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_unknown_linear(module: nn.Module) -> bool:
    """Return whether the module has the sizes of a linear layer but no readable weight (HQQ, GPTQ, AWQ)."""
    return (
        type(getattr(module, "in_features", None)) is int
        and type(getattr(module, "out_features", None)) is int
        and not isinstance(module, nn.Linear)
        and not any(is_linear(child) for child in module.modules())
        and not any(p is not None and p.is_floating_point() and p.dim() > 1 for p in module._parameters.values())
    )


def unknown_layers(modules: Iterable[nn.Module]) -> str:
    """Return a sentence about unreadable layers for error messages; empty if there are none."""
    kinds = sorted({type(module).__name__ for module in modules if is_unknown_linear(module)})
    if not kinds:
        return ""
    return (
        f". Its layers are {' and '.join(kinds)}, whose weights cannot be read. Use a dense base (quantized by "
        "peftcore.quantize if needed), or a base whose layers are still nn.Linear, as with torchao"
    )


def is_wrapped(tensor: Tensor) -> bool:
    """Return whether the tensor is another library's subclass that wraps a quantized weight (torchao, quanto)."""
    return (
        type(tensor) is not nn.Parameter
        and is_traceable_wrapper_subclass(tensor)
        and not type(tensor).__module__.startswith("torch.")  # DTensor
    )


def has_scaled_float8(module: nn.Module) -> bool:
    """Return whether the module stores its weight as scaled FP8, like transformers' FP8Linear."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.is_floating_point()
        and weight.itemsize == 1
        and any("scale" in name for name in (*module._parameters, *module._buffers))
    )


def is_bitsandbytes(module: nn.Module) -> bool:
    """Return whether the module is a 4-bit linear layer of bitsandbytes, with or without adapters."""
    library = sys.modules.get("bitsandbytes.nn.modules")
    return library is not None and isinstance(module, library.Linear4bit)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Return (input, output) sizes of a linear layer, or of another layer's weight viewed as a linear map.

    A convolution maps the values under its kernel in one group to channels, and an embedding maps tokens to vectors.
    """
    layer: Any = module  # of whatever class
    if isinstance(module, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(module, Convolution):
        return math.prod(module.weight.shape[1:]), module.out_channels
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return (layer.nx, layer.nf) if is_conv1d(module) else (layer.in_features, layer.out_features)


def shape_of(module: nn.Module, name: str) -> tuple[int, ...]:
    """Return the shape of the weight that the module's own parameter `name` represents, even if it is packed."""
    if hasattr(type(module), "packings"):  # of `quantization.parameters.PackedParameters`
        packings: Any = module.packings
        if name in packings:
            shard: Any = getattr(module, "weight_shard", None)  # this rank has a shard of the weight
            return tuple(packings[name].shape if shard is None else shard.shape)
    parameter = module._parameters.get(name)
    if parameter is None:
        parameter = module.get_parameter(name)
    if name == "weight" and is_linear(module) and not parameter.is_floating_point():  # bitsandbytes'
        return sizes(module)[::-1]
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves empty tensors
