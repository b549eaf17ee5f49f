"""Kinds of layer: what counts as linear, and sizes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def is_conv1d(module: nn.Module) -> bool:
    """Is this transformers' Conv1D (GPT-2), a linear whose weight is stored `[in, out]`?"""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """A linear layer in the sense of `all-linear`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_unknown_linear(module: nn.Module) -> bool:
    """Has it the sizes of a linear layer and no weight that could be read, as HQQ's, GPTQ's and AWQ's layers have?"""
    features = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return (
        all(type(each) is int for each in features)
        and not any(is_linear(each) for each in module.modules())
        and not any(p is not None and p.is_floating_point() and p.dim() > 1 for p in module._parameters.values())
    )


def unknown_layers(modules: Iterable[nn.Module]) -> str:
    """What is to be said of such layers where others were sought; empty if there are none."""
    kinds = sorted({type(module).__name__ for module in modules if is_unknown_linear(module)})
    if not kinds:
        return ""
    return (
        f". Its layers are {' and '.join(kinds)}, whose weight cannot be read: take a base that is dense (in 4 bits by "
        "peftcore.quantize), or whose layers are still nn.Linear, as torchao leaves them"
    )


def is_wrapped(tensor: Tensor) -> bool:
    """Is it of another library's class, which stands for a weight that it keeps in other tensors (torchao, quanto)?"""
    return (
        type(tensor) is not nn.Parameter
        and is_traceable_wrapper_subclass(tensor)
        and not type(tensor).__module__.startswith("torch.")  # DTensor
    )


def sizes(module: nn.Module) -> tuple[int, int]:
    """(input, output) of a linear layer; of others those of the linear map that the weight is.

    A convolution maps the numbers under its kernel, in one group, to channels; an embedding maps tokens to vectors.
    """
    layer: Any = module  # of whatever class
    if isinstance(module, Convolution):
        return math.prod(module.weight.shape[1:]), module.out_channels
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
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
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves no elements of its own
